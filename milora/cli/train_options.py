"""The options of `milora train`: one table for defaults, flags, help and the stored run.

Options are stored beside the checkpoints, so that `--resume` needs nothing but the folder, and so
that a resumed run cannot silently become another experiment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from milora.errors import UserError

OPTIONS_FILE = "train_options.json"
VERSION = 1


@dataclass
class TrainOptions:
    """Defaults: the paper's where it states one, else ours (its help says which)."""

    model: str | None = None
    data: str | None = None
    output: str = "milora-adapter"
    dev_data: str | None = None
    dev_share: float = 0.05
    activation_data: str = "holdout"
    chat_template: str | None = None
    max_length: int = 1024

    expert: str = "lora"
    expert_options: list[str] | None = None
    rank: int = 32
    alpha: float | None = None
    top_k: int = 3
    target_modules: list[str] | None = None
    pooler: str = "self_attention"
    activation: str = "rational"
    gate: str = "probability"
    router_norm: str = "none"
    balance_coef: float = 1e-2
    dropout: float = 0.0
    rslora: bool = False
    no_router: bool = False

    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 8
    gradient_accumulation: int = 1
    lr: float = 1e-4
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    no_bilevel: bool = False
    activation_lr: float = 1e-6
    activation_max_grad_norm: float = 1.0
    eval_every: int = 200
    patience: int = 10
    log_every: int = 10
    seed: int = 0

    dtype: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False


# How a run is carried out, not what it computes: these may change on a resume.
FREE_ON_RESUME = {"device", "log_every", "output"}

# group -> (option, metavar or choices or None for a switch, help)
_TABLE: dict[str, list[tuple[str, Any, str]]] = {
    "data": [
        ("model", "PATH_OR_ID", "folder of the base model, or its Hugging Face Hub id"),
        ("data", "FILE", "JSONL, a line: prompt and completion, or messages"),
        ("output", "DIR", "where adapter, checkpoints, metrics and plot go"),
        ("dev_data", "FILE", "JSONL for the perplexity that stops the training"),
        ("dev_share", "X", "share of the data held out when there is no --dev-data; 0 for none"),
        ("activation_data", "X", "data of the rational activation's steps: holdout (a tenth of the "
         "training data), dev (the paper's choice), or a JSONL file"),
        ("chat_template", "FILE", "Jinja chat template that replaces the tokenizer's"),
        ("max_length", "N", "tokens of prompt and answer; longer answers are cut"),
    ],
    "adapter (paper: rank 32, top-k 3, self-attention pooler, rational activation)": [
        ("expert", "KIND", "lora, dora, lora_mini ...; `milora methods` lists them"),
        ("expert_options", "NAME=VALUE", "options of the kind, as head_dim=32 of lorta"),
        ("rank", "R", "rank of each expert"),
        ("alpha", "X", "the update is scaled by alpha / rank; not given: alpha = rank"),
        ("top_k", "K", "experts on per block and prompt"),
        ("target_modules", "NAME", "module names or patterns; not given: all linear modules"),
        ("pooler", ("self_attention", "mean", "max", "last"), "how a prompt becomes one vector"),
        ("activation", ("rational", "gelu", "relu"), "the router's activation"),
        ("gate", ("probability", "renormalized", "hard"), "what multiplies an expert's update"),
        ("router_norm", ("none", "rms"), "norm of the pooled vector"),
        ("balance_coef", "X", "weight of the load-balance loss"),
        ("dropout", "P", "dropout on the experts' input"),
        ("rslora", None, "scale by alpha / sqrt(rank)"),
        ("no_router", None, "no router: plain LoRA on every module"),
    ],
    "training (paper: AdamW, lr 1e-4, linear decay, 6 % warm-up, patience 10)": [
        ("epochs", "X", "passes over the data"),
        ("max_steps", "N", "stop after N steps instead; -1 for --epochs"),
        ("batch_size", "N", "examples of one forward"),
        ("gradient_accumulation", "N", "forwards of one step"),
        ("lr", "X", "learning rate"),
        ("schedule", "NAME", "of the learning rates, as transformers names it"),
        ("warmup", "X", "share of the steps, or (1 and more) their number"),
        ("weight_decay", "X", "AdamW's weight decay"),
        ("max_grad_norm", "X", "gradient clipping"),
        ("no_bilevel", None, "leave the rational activation as it is initialised"),
        ("activation_lr", "X", "learning rate of the rational activation"),
        ("activation_max_grad_norm", "X", "its own gradient clipping"),
        ("eval_every", "N", "steps between two evaluations; each writes a checkpoint"),
        ("patience", "N", "stop after N evaluations without a better perplexity; 0 for never"),
        ("log_every", "N", "steps between two lines of metrics"),
        ("seed", "N", "of initial values, data order and splits"),
    ],
    "machine": [
        ("dtype", ("auto", "float32", "bfloat16", "float16"), "of the base model"),
        ("device", "NAME", "cpu, cuda, cuda:1 ..."),
        ("gradient_checkpointing", None, "less memory, more time"),
    ],
}  # fmt: skip


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add the table's flags. Absent ones leave no attribute: `resolve` must know what was given."""
    types = {field.name: field.type for field in fields(TrainOptions)}
    defaults = TrainOptions()
    for title, options in _TABLE.items():
        group = parser.add_argument_group(title)
        for name, form, text in options:
            flag = "--" + name.replace("_", "-")
            default = getattr(defaults, name)
            known = default is not None and form is not None
            keywords: dict[str, Any] = {
                "default": argparse.SUPPRESS,
                "help": f"{text} (default: {default})" if known else text,
            }
            if form is None:
                keywords["action"] = "store_true"
            elif isinstance(form, tuple):
                keywords["choices"] = form
            else:
                keywords["metavar"] = form
                keywords["type"] = _converter(types[name])
                if types[name].startswith("list"):
                    keywords["nargs"] = "+"
            group.add_argument(flag, **keywords)


def _converter(annotation: str) -> type:
    return {"int": int, "float": float}.get(annotation.removesuffix(" | None"), str)


def resolve(namespace: argparse.Namespace, *, resume: bool) -> TrainOptions:
    """Defaults, then (with `resume`) the stored run's options, then what was given.

    Raises:
        UserError: something needed is missing, out of range, or differs from the resumed run's.
    """
    names = {field.name for field in fields(TrainOptions)}
    given = {name: value for name, value in vars(namespace).items() if name in names}
    if not resume:
        options = TrainOptions(**given)
    else:
        stored = load_options(Path(given.get("output", TrainOptions.output)))
        changed = sorted(
            name for name in given if name not in FREE_ON_RESUME and given[name] != stored.get(name)
        )
        if changed:
            lines = ", ".join(f"{name} {stored.get(name)} -> {given[name]}" for name in changed)
            raise UserError(
                f"a resumed run keeps its options; these differ: {lines}",
                hint="leave them out, or start a new run in another --output",
            )
        options = TrainOptions(**{**stored, **given})
    check_options(options)
    return options


def parse_expert_options(given: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE words as MiLoRAConfig takes them: a value is a number or what else JSON has, or a
    word.

    Raises:
        UserError: a word without a name or without "=".
    """
    options: dict[str, Any] = {}
    for word in given or ():
        name, separator, value = word.partition("=")
        if not name or not separator:
            _refuse("expert_options", "NAME=VALUE", word)
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def check_options(options: TrainOptions) -> None:
    """Ranges that neither MiLoRAConfig nor transformers would name by the flag."""
    for name in ("model", "data"):
        if not getattr(options, name):
            raise UserError(f"--{name} is required")
    for name in ("batch_size", "gradient_accumulation", "eval_every", "log_every"):
        if getattr(options, name) < 1:
            _refuse(name, "at least 1", getattr(options, name))
    for name in ("lr", "activation_lr", "weight_decay", "warmup", "patience", "balance_coef"):
        if not getattr(options, name) >= 0:
            _refuse(name, "at least 0", getattr(options, name))
    for name in ("max_grad_norm", "activation_max_grad_norm"):
        if not getattr(options, name) >= 0:
            _refuse(name, "at least 0 (0: no clipping)", getattr(options, name))
    parse_expert_options(options.expert_options)
    if not 0 <= options.dev_share < 1:
        _refuse("dev_share", "in [0, 1)", options.dev_share)
    if options.max_length < 2:
        _refuse("max_length", "at least 2", options.max_length)
    if options.max_steps < 1 and options.epochs <= 0:
        _refuse("epochs", "more than 0", options.epochs)


def _refuse(name: str, allowed: str, value: Any) -> None:
    raise UserError(f"--{name.replace('_', '-')} must be {allowed}, got {value}")


def file_sums(options: TrainOptions, *, resume: bool) -> dict[str, str]:
    """The sums of the files that the options name.

    Raises:
        UserError: with `resume`: a file has changed since the run began.
    """
    named = [options.data, options.dev_data, options.activation_data, options.chat_template]
    sums = {
        name: hashlib.sha256(Path(name).read_bytes()).hexdigest()
        for name in named
        if name and Path(name).is_file()
    }
    if resume:
        stored = (Path(options.output) / OPTIONS_FILE).read_text("utf-8")
        before = json.loads(stored).get("files", {})
        if changed := [name for name in before if before[name] != sums.get(name)]:
            raise UserError(
                f"these files have changed since the run began: {', '.join(changed)}",
                hint="restore them, or start a new run in another --output",
            )
    return sums


def save_options(options: TrainOptions, files: dict[str, str]) -> None:
    """Store the options, and the sums of the files that they name, for `--resume`."""
    path = Path(options.output) / OPTIONS_FILE
    record = {"version": VERSION, "files": files, **asdict(options)}
    path.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def load_options(output: Path) -> dict[str, Any]:
    """The stored options of the run in `output`.

    Raises:
        UserError: there is none, or it is of another version.
    """
    path = output / OPTIONS_FILE
    if not path.is_file():
        raise UserError(f"nothing to resume in {output}: no {OPTIONS_FILE}")
    try:
        stored = json.loads(path.read_text("utf-8"))
        version = stored.pop("version")
        stored.pop("files", None)
        TrainOptions(**stored)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no file of stored options: {error}") from None
    if version != VERSION:
        raise UserError(f"{path} has version {version}, this milora reads version {VERSION}")
    return stored
