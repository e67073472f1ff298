"""PEFT's LoRA and DoRA adapters, read as experts that are always on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from milora.blocks import find_blocks
from milora.config import MiLoRAConfig
from milora.errors import AdapterError
from milora.patterns import matches, problem_of

PREFIX = "base_model.model."
# Keys of LoraConfig that say nothing about the update, or say it in the tensors' names and shapes.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "rank_pattern",
    "revision",
    "runtime_config",
    "sha256",
    "target_modules",
    "task_type",
}
READ = {"alpha_pattern", "bias", "lora_alpha", "lora_dropout", "r", "use_dora", "use_rslora"}
# These change the base weights when PEFT builds the adapter, which makes the file a difference to
# other weights than the model has. PEFT can convert such an adapter when it saves it.
MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def config_of_lora(
    model: nn.Module, data: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path
) -> MiLoRAConfig:
    """The configuration, without a router, that a PEFT LoRA folder stands for.

    Args:
        data: its `adapter_config.json`.
        shapes: of its tensors, by key. What is targeted and each rank is taken from them.
    Raises:
        milora.AdapterError: it uses what experts do not have, or targets modules outside blocks.
    """
    paths = sorted({_module_path(key) for key in shapes})
    try:
        blocks = find_blocks(model, MiLoRAConfig(router=False, rank=1))
    except ValueError as error:
        raise AdapterError(f"{folder}: {error}") from None
    places = {
        f"{block.path}.{path}": (block.path, path) for block in blocks for path in block.experts
    }
    problems = _unsupported(data)
    problems += [
        f"{path} is no linear module inside a block" for path in paths if path not in places
    ]
    if not paths:
        problems.append("it holds no tensors")
    if not problems:
        rank, alpha = data.get("r", 8), data.get("lora_alpha", 8)
        first = {path: shapes.get(f"{PREFIX}{path}.lora_A.weight", ())[:1] for path in paths}
        alphas = {path: _pattern(data.get("alpha_pattern") or {}, path) for path in paths}
        try:
            return MiLoRAConfig(
                router=False,
                rank=rank,
                alpha=alpha,
                expert="dora" if data.get("use_dora") else "lora",
                rslora=data.get("use_rslora") or False,
                dropout=data.get("lora_dropout") or 0.0,
                target_modules=_targets(paths, places),
                rank_pattern={path: r[0] for path, r in first.items() if r and r[0] != rank},
                alpha_pattern={path: a for path, a in alphas.items() if a is not None},
            )
        except ValueError as error:
            problems.append(str(error))
    listed = "\n".join(f"  - {problem}" for problem in problems)
    raise AdapterError(f"{folder}: this LoRA cannot be read as experts:\n{listed}")


def scales_of_lora(
    data: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path
) -> dict[str, float]:
    """Each module's factor on B A, by its path, without the model.

    Raises:
        milora.AdapterError: it is no plain LoRA.
    """
    problems = _unsupported(data)
    if data.get("use_dora"):
        problems.append("use_dora: a DoRA is no low-rank update")
    scales = {}
    for path in sorted({_module_path(key) for key in shapes}) if not problems else ():
        alpha = _pattern(data.get("alpha_pattern") or {}, path)
        alpha = data.get("lora_alpha", 8) if alpha is None else alpha
        rank = (shapes.get(f"{PREFIX}{path}.lora_A.weight") or (0,))[0]
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or rank < 1:
            problems.append(f"{path}: alpha {alpha!r} and rank {rank!r} give no scale")
        else:
            scales[path] = alpha / (rank**0.5 if data.get("use_rslora") else rank)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise AdapterError(f"{folder}: this LoRA cannot be merged:\n{listed}")
    return scales


def _unsupported(data: dict[str, Any]) -> list[str]:
    """What the config asks for and an expert cannot do, options of later releases included.

    Variants of LoRA are switched on by a flag, a list or a dict; the numbers and words that they
    bring along stand in every file.
    """
    problems = [
        f"{key} is not supported, got {value!r}"
        for key, value in sorted(data.items())
        if key not in HARMLESS | READ and isinstance(value, bool | dict | list) and value
    ]
    if data.get("bias", "none") != "none":
        problems.append(f"bias must be 'none', got {data['bias']!r}")
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MUTATING):
        problems.append(
            f"init_lora_weights={start!r} changed the base weights; save it once more with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    patterns = data.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or any(map(problem_of, patterns)):
        problems.append(f"alpha_pattern must map patterns to numbers, got {patterns!r}")
    return problems


def _module_path(key: str) -> str:
    return key.removeprefix(PREFIX).rsplit(".lora_", 1)[0]


def _pattern(patterns: dict[str, Any], path: str) -> Any:
    """The value of the first pattern that matches, as PEFT's `get_pattern_key` does it."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path))
    return next(found, None)


def _targets(paths: list[str], places: dict[str, tuple[str, str]]) -> list[str]:
    """Paths inside a block where these select exactly the LoRA's modules, else whole paths."""
    inner = sorted({places[path][1] for path in paths})
    selected = [p for p, place in places.items() if any(matches(i, *place) for i in inner)]
    return inner if sorted(selected) == paths else paths
