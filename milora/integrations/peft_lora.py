"""PEFT's LoRA and DoRA adapters: read as experts that are always on, and written from a route."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from milora.blocks import find_blocks
from milora.config import MiLoRAConfig, matches
from milora.errors import AdapterError

PREFIX = "base_model.model."
# Options of PEFT's LoraConfig that change the update in ways an expert does not have.
UNSUPPORTED = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "arrow_config",
)


def config_of_lora(
    model: nn.Module, data: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> MiLoRAConfig:
    """The configuration, without a router, that a PEFT LoRA folder stands for.

    Raises:
        milora.AdapterError: it uses what experts do not have, or targets modules outside blocks.
    """
    problems = [f"{key} is not supported" for key in UNSUPPORTED if data.get(key)]
    if data.get("bias", "none") != "none":
        problems.append(f"bias must be 'none', got {data['bias']!r}")
    paths = sorted({_module_path(key) for key in tensors})
    everything = MiLoRAConfig(router=False, rank=1)
    places = {
        f"{block.path}.{path}": (block.path, path)
        for block in find_blocks(model, everything)
        for path in block.experts
    }
    problems += [f"{path} is no linear module inside a block" for path in paths if path not in places]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise AdapterError(f"{folder}: this LoRA cannot be read as experts:\n{listed}")
    rank = data.get("r", 8)
    alpha = data.get("lora_alpha", rank)
    ranks = {p: int(tensors[f"{PREFIX}{p}.lora_A.weight"].shape[0])
             for p in paths if f"{PREFIX}{p}.lora_A.weight" in tensors}  # fmt: skip
    alphas = {
        path: value
        for path in paths
        if (value := _pattern(data.get("alpha_pattern") or {}, path)) is not None
    }
    try:
        return MiLoRAConfig(
            router=False,
            rank=rank,
            alpha=alpha,
            expert="dora" if data.get("use_dora") else "lora",
            rslora=bool(data.get("use_rslora")),
            dropout=float(data.get("lora_dropout") or 0.0),
            target_modules=_targets(paths, places),
            rank_pattern={path: value for path, value in ranks.items() if value != rank},
            alpha_pattern=alphas,
        )
    except ValueError as error:
        raise AdapterError(f"{folder}: this LoRA cannot be read as experts: {error}") from None


def _module_path(key: str) -> str:
    return key.removeprefix(PREFIX).rsplit(".lora_", 1)[0]


def _pattern(patterns: dict[str, Any], path: str) -> Any:
    block, _, name = path.rpartition(".")
    return next((value for key, value in patterns.items() if matches(key, block, name)), None)


def _targets(paths: list[str], places: dict[str, tuple[str, str]]) -> list[str]:
    """Paths inside a block where every block has the same ones, else whole paths."""
    inner = sorted({places[path][1] for path in paths})
    blocks = {block for block, _ in places.values()}
    whole = {f"{block}.{path}" for block in blocks for path in inner} & set(places)
    return inner if whole == set(paths) else paths
