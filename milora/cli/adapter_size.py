"""An adapter's parameters, counted from its files alone: no base model, no weights in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from milora.adapter_files import WEIGHTS_FILE, read_config
from milora.adapter_validation import PREFIX
from milora.cli.models import user_errors
from milora.errors import UserError
from milora.experts import REGISTRY
from milora.runtime import ROUTER_NAME

ROUTER_PARTS = {"w_r": "router", "w_sa": "pooler", "theta": "activation"}


@dataclass(frozen=True)
class AdapterSize:
    """Numbers of parameters; `activated` is the worst case: the routers and the `top_k` largest
    experts of each block. The mean is over experts, as if all were equally likely. `fixed` numbers
    stand in the file but are never trained; nothing else counts them.
    """

    folder: str
    config: dict[str, Any]
    blocks: dict[str, dict[str, int]]  # block -> expert -> parameters
    experts: int
    router: int
    pooler: int
    activation: int
    fixed: int
    activated: int
    activated_mean: float

    @property
    def total(self) -> int:
        return self.experts + self.router + self.pooler + self.activation

    @property
    def experts_per_block(self) -> str:
        counts = sorted({len(experts) for experts in self.blocks.values()})
        return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "adapter": self.folder,
            "config": {k: v for k, v in self.config.items() if k not in ("experts", "checksums")},
            "num_blocks": len(self.blocks),
            "fixed_numbers": self.fixed,
            "parameters": {
                "total": self.total,
                "experts": self.experts,
                "router": self.router,
                "pooler": self.pooler,
                "activation": self.activation,
                "activated": self.activated,
                "activated_mean": round(self.activated_mean, 1),
            },
        }


def read_size(folder: Path) -> AdapterSize:
    """Count the parameters of an adapter folder: MiLoRA's, or PEFT's LoRA (which is all active).

    Raises:
        UserError: no adapter there, or damaged files.
    """
    with user_errors(FileNotFoundError):
        config = read_config(folder)
    counts = _tensor_sizes(folder / WEIGHTS_FILE)
    parts = dict.fromkeys(ROUTER_PARTS.values(), 0)
    modules: dict[str, int] = {}
    kind = REGISTRY.get(str(config.get("expert")))
    fixed = 0
    for key, count in counts.items():
        path = key.removeprefix(PREFIX)
        owner, _, name = path.removesuffix(".weight").rpartition(".")
        if owner.endswith("." + ROUTER_NAME) and name in ROUTER_PARTS:
            parts[ROUTER_PARTS[name]] += count
        elif kind is not None and name in kind.fixed:
            fixed += count
        else:
            modules[owner] = modules.get(owner, 0) + count
    blocks = _by_block(folder, modules, config.get("experts"))
    routed = config.get("router", False) is True
    activated, mean = 0, 0.0
    for experts in blocks.values():
        sizes = sorted(experts.values(), reverse=True)
        kept = min(config["top_k"], len(sizes)) if routed else len(sizes)
        activated += sum(sizes[:kept])
        mean += kept * sum(sizes) / max(len(sizes), 1)
    if kind is not None and kind.shares_tensors:  # each stands with the first expert that has it
        activated, mean = sum(modules.values()), sum(modules.values())
    routing = sum(parts.values())
    return AdapterSize(
        folder=str(folder),
        config=config,
        blocks=blocks,
        experts=sum(modules.values()),
        fixed=fixed,
        activated=activated + routing,
        activated_mean=mean + routing,
        **parts,
    )


def _by_block(
    folder: Path, modules: dict[str, int], named: dict[str, list[str]] | None
) -> dict[str, dict[str, int]]:
    if named is None:  # a PEFT adapter: "model.layers.3.self_attn.q_proj" is of block ...layers.3
        blocks: dict[str, dict[str, int]] = {}
        for path, count in modules.items():
            parts = path.split(".")
            last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=0)
            block = ".".join(parts[: last + 1])
            blocks.setdefault(block, {})[".".join(parts[last + 1 :])] = count
        return blocks
    blocks = {
        block: {path: modules.get(f"{block}.{path}", 0) for path in paths}
        for block, paths in named.items()
    }
    if sum(sum(experts.values()) for experts in blocks.values()) != sum(modules.values()):
        raise UserError(f"{folder}: its weights are not of the experts that its config names")
    return blocks


def _tensor_sizes(path: Path) -> dict[str, int]:
    import torch

    try:
        with safe_open(path, framework="pt") as file:  # reads the header alone
            names = list(file.keys())
            return {n: torch.Size(file.get_slice(n).get_shape()).numel() for n in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
