"""`milora train`: fine-tune a base model on a JSONL file, with the paper's defaults."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora.cli.console import add_json_option, note, writable_folder, write_json
from milora.cli.memory import BYTES_PER_TRAINED_PARAMETER, check_memory
from milora.cli.models import load_model, max_positions, user_errors
from milora.cli.train_options import (
    TrainOptions,
    add_train_options,
    file_sums,
    parse_expert_options,
    resolve,
    save_options,
)
from milora.errors import UserError

GRADIENT_BATCHES = 32
GRADIENT_BYTES = 4 << 30  # of gradients at a time

EPILOG = """each line of the data is one of
  {"prompt": "2+2=", "completion": "4"}
  {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}

examples:
  milora train --model ./llama --data train.jsonl --output ./adapter
  milora train --model ./llama --data train.jsonl --dev-data dev.jsonl --activation-data dev
  milora train --resume --output ./adapter          (after Ctrl-C; options are remembered)
  milora train --model ./llama --data train.jsonl --rank 16 --target-modules q_proj v_proj
"""
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_train_options(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --output"
    )
    parser.add_argument("--no-plot", action="store_true", help="draw no training.png")
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    options = resolve(namespace, resume=namespace.resume)
    output = Path(options.output)
    checkpoint, ended = None, None
    if namespace.resume:
        checkpoint, ended = _where_to_resume(output)
    else:
        _refuse_old_run(output)
    examples = _read_files(options)  # before the slow imports: a bad line is found at once
    files = file_sums(options, resume=namespace.resume)
    if ended is not None:
        _say_finished(output, ended, namespace)
        return 0
    with writable_folder(output):
        trainer, stop, bar = _prepare(examples, options)
        if checkpoint is None:
            _start_from_gradients(trainer, options)
        save_options(options, files)  # not before: a command that failed leaves nothing
    started = time.perf_counter()
    with stop, bar, user_errors(FileNotFoundError):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if stop.stopped:
        note(
            f"interrupted: step {trainer.state.global_step} of {trainer.state.max_steps} is saved; "
            f"go on with: milora train --resume --output {output}"
        )
        return EXIT_INTERRUPTED
    _finish(trainer, options, result, time.perf_counter() - started, namespace)
    return 0


def _prepare(examples: dict[str, Any], options: TrainOptions):
    """What `_make_trainer` returns, for the model and the data that the options name."""
    import transformers

    transformers.set_seed(options.seed)
    model, tokenizer = load_model(options.model, options.dtype, options.device)
    data = _encode(examples, options, tokenizer, max_positions(model))
    _attach(model, options)
    return _make_trainer(model, tokenizer, data, options)


# ---- data -------------------------------------------------------------------------------------


@dataclass
class _Data:
    """Encoded datasets; `dev` and `activation` may be None."""

    train: Any
    dev: Any
    activation: Any


def _read_files(options: TrainOptions) -> dict[str, Any]:
    from milora.data import read_examples

    files = {"train": read_examples(options.data)}
    if options.dev_data:
        files["dev"] = read_examples(options.dev_data)
    if options.activation_data not in ("holdout", "dev") and not options.no_bilevel:
        files["activation"] = read_examples(options.activation_data)
    if options.chat_template:
        try:
            files["template"] = Path(options.chat_template).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --chat-template: {error}") from None
    return files


def _encode(
    files: dict[str, Any], options: TrainOptions, tokenizer, positions: int | None
) -> _Data:
    """Encode and split; texts end at --max-length or, where that is less, at `positions`."""
    import torch

    from milora.data import EncodedDataset, Encoder, encode_examples

    encoder = Encoder(tokenizer, files.pop("template", None))
    limit, why = options.max_length, f"--max-length {options.max_length}"
    if positions is not None and positions < limit:
        limit, why = positions, f"{positions} tokens, which are all that the model takes"
    encoded = {}
    for name, examples in files.items():
        encoded[name] = data = encode_examples(examples, encoder, limit)
        if data.truncated:
            note(f"{name}: {data.truncated} answers cut at {why}")
        if data.dropped:
            note(
                f"{name}: {len(data.dropped)} examples left out, whose prompts alone have "
                f"{limit} tokens or more; the first is {data.dropped[0]}"
            )
    train, dev = encoded["train"], encoded.get("dev")
    if dev is None and options.dev_share > 0:
        size = round(len(train) * options.dev_share)
        if size:
            # Not torch's global generator: the split must not depend on what ran before.
            generator = torch.Generator().manual_seed(options.seed)
            order = torch.randperm(len(train), generator=generator).tolist()
            dev = EncodedDataset([train[i] for i in sorted(order[:size])])
            train = EncodedDataset([train[i] for i in sorted(order[size:])])
    activation = encoded.get("activation")
    if options.activation_data == "dev":
        if dev is None:
            raise UserError("--activation-data dev needs --dev-data or --dev-share")
        activation = dev
    if activation is None and not options.no_bilevel and len(train) < 2:
        raise UserError(
            f"{options.data}: 1 example is too few to hold out a tenth of them",
            hint="add examples, or pass --no-bilevel",
        )
    return _Data(train, dev, activation)


# ---- model ------------------------------------------------------------------------------------


def _attach(model, options: TrainOptions) -> None:
    import milora

    with user_errors(ValueError):
        config = milora.MiLoRAConfig(
            rank=options.rank,
            alpha=options.alpha,
            top_k=options.top_k,
            router=not options.no_router,
            target_modules=options.target_modules or "all-linear",
            expert=options.expert,
            expert_options=parse_expert_options(options.expert_options),
            pooler=options.pooler,
            activation=options.activation,
            gate=options.gate,
            router_norm=options.router_norm,
            dropout=options.dropout,
            rslora=options.rslora,
            balance_coef=options.balance_coef,
            seed=options.seed,
            bilevel=not options.no_bilevel,
        )
        milora.attach(model, config)
    count = milora.count_parameters(model)
    check_memory(
        count.trainable * BYTES_PER_TRAINED_PARAMETER, str(model.device), "training this adapter"
    )
    note(
        f"{count.trainable:,} trainable parameters, {count.activated:,} of them active for a prompt"
    )


def _start_from_gradients(trainer, options: TrainOptions) -> None:
    """Give kinds that start from the task's gradients their start, from examples of all the data.

    In the order of the files, so that no random number is drawn that a resumed run would not draw.
    """
    from torch.utils.data import DataLoader, Subset

    import milora
    from milora.experts import get_kind

    if not hasattr(get_kind(options.expert), "init_from_gradient"):
        return
    note(f"taking the gradients that {options.expert} starts from")
    count = len(trainer.train_dataset)
    step = -(-count // (GRADIENT_BATCHES * options.batch_size))
    examples = Subset(trainer.train_dataset, range(0, count, step))
    batches = DataLoader(examples, options.batch_size, collate_fn=trainer.data_collator)
    widest = max(p.numel() for p in trainer.model.parameters())
    with user_errors(ValueError):
        milora.init_from_gradients(
            trainer.model, batches, modules_per_pass=max(1, GRADIENT_BYTES // (4 * widest))
        )


def _make_trainer(model, tokenizer, data: _Data, options: TrainOptions):
    """The trainer, the callback that turns Ctrl-C into a checkpoint, and the progress bar."""
    import transformers

    from milora.cli.train_progress import TrainProgress
    from milora.data.collator import CompletionCollator, pad_token_id
    from milora.train.bilevel import MiLoRATrainer
    from milora.train.interrupt import InterruptCallback

    stop, bar = InterruptCallback(), TrainProgress()
    callbacks = [stop, bar]
    if data.dev is not None and options.patience:
        callbacks.append(transformers.EarlyStoppingCallback(options.patience))
    with user_errors(ValueError):
        trainer = MiLoRATrainer(
            model=model,
            args=_training_arguments(model, options, has_dev=data.dev is not None),
            train_dataset=data.train,
            eval_dataset=data.dev,
            data_collator=CompletionCollator(pad_token_id(tokenizer)),
            callbacks=callbacks,
            activation_dataset=data.activation,
            activation_lr=options.activation_lr,
            activation_max_grad_norm=options.activation_max_grad_norm,
        )
    trainer.remove_callback(transformers.PrinterCallback)  # it would print dicts on stdout
    return trainer, stop, bar


def _training_arguments(model, options: TrainOptions, *, has_dev: bool):
    import transformers

    extra: dict[str, Any] = {}
    if options.gradient_checkpointing:
        # transformers 5.23 renamed it, and 5.17 knows the old name only.
        names = transformers.TrainingArguments.__dataclass_fields__
        new = "activation_checkpointing" in names
        extra["activation_checkpointing" if new else "gradient_checkpointing"] = True
    if has_dev:
        extra |= {
            "eval_strategy": "steps",
            "eval_steps": options.eval_every,
            "metric_for_best_model": "perplexity",
            "greater_is_better": False,
            "load_best_model_at_end": True,
        }
    return transformers.TrainingArguments(
        output_dir=options.output,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps if options.max_steps > 0 else -1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.lr,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,  # a float below 1 is a share of the steps
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch",
        save_strategy="steps",
        save_steps=options.eval_every,
        save_total_limit=2,
        logging_steps=options.log_every,
        logging_first_step=True,
        seed=options.seed,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type != "cpu",
        report_to="none",
        disable_tqdm=True,
        **extra,
    )


# ---- the run's folder -------------------------------------------------------------------------


def _refuse_old_run(output: Path) -> None:
    if output.is_dir() and any(output.glob("checkpoint-*")):
        raise UserError(
            f"{output} holds the checkpoints of an earlier run",
            hint="go on with it by --resume, or choose another --output",
        )


def _where_to_resume(output: Path) -> tuple[str | None, dict[str, Any] | None]:
    """The checkpoint to go on from, and, if the run is finished, Trainer's state at its end.

    A checkpoint counts if it was written to its end: a full disk or a killed process leaves half
    a folder; Trainer writes its state last. One of the run's last step is never gone on from:
    Trainer would take one step more. A run that was killed after it, before its adapter was
    saved, goes on from the checkpoint before, or (None) begins again.
    """
    from milora.adapter_files import CONFIG_FILE

    folders = [path for path in output.glob("checkpoint-*") if path.name[11:].isdecimal()]
    at_end = False
    for folder in sorted(folders, key=lambda path: int(path.name[11:]), reverse=True):
        try:
            state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            note(f"{folder} is incomplete and left out")
            continue
        if state["global_step"] < state["max_steps"]:
            return str(folder), None
        if (output / CONFIG_FILE).is_file():
            return None, state
        at_end = True
    if at_end:
        return None, None
    raise UserError(f"nothing to resume in {output}: no checkpoint")


def _say_finished(output: Path, state: dict[str, Any], namespace) -> None:
    note(f"the run in {output} is finished, after {state['global_step']} steps: nothing to do")
    plot = output / "training.png"
    write_json(namespace.json, _summary(output, state, plot if plot.is_file() else None))


def _summary(
    output: Path,
    state: dict[str, Any],
    plot: Path | None,
    train_loss: float | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """What `--json` writes; without `train_loss`, of a run that was finished before."""
    from milora.train.metrics import METRICS_FILE

    return {
        "output": str(output),
        "steps": state["global_step"],
        "planned_steps": state["max_steps"],
        "train_loss": train_loss,
        "best_perplexity": state["best_metric"],
        "best_step": state["best_global_step"] if state["best_metric"] is not None else None,
        "seconds": round(seconds, 1),
        "metrics": str(output / METRICS_FILE),
        "plot": None if plot is None else str(plot),
    }


def _finish(trainer, options: TrainOptions, result, seconds: float, namespace) -> None:
    import milora
    from milora.train.metrics import METRICS_FILE

    output = Path(options.output)
    milora.save(trainer.model, output)
    state, plot = trainer.state, None
    if not namespace.no_plot:
        from milora.cli.plots import draw_training

        plot = output / "training.png"
        draw_training(output / METRICS_FILE, plot)
    note(f"adapter saved in {output} after {state.global_step} steps, {seconds:.0f} s")
    if state.best_metric is not None:
        note(f"best dev perplexity {state.best_metric:.4g} at step {state.best_global_step}")
    summary = _summary(output, vars(state), plot, result.training_loss, seconds)
    write_json(namespace.json, summary)
