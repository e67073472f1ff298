"""Write a fixed route as an ordinary PEFT adapter, which every engine loads."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from milora.adapters import PREFIX, expert_key, write_folder
from milora.attach import runtime_of
from milora.nn import MiLoRALinear
from milora.routing import RoutingState


@torch.no_grad()
def export_route(
    model: nn.Module, state: RoutingState, folder: str | os.PathLike, row: int = 0
) -> None:
    """Write the route of one prompt as a PEFT LoRA folder (DoRA where the experts are DoRA).

    With the gate folded into B a fixed route is exactly an ordinary LoRA. For a DoRA expert with
    factor c and gate g:  u = 1 − g + g c,  B' = diag(g c / u) B,  m' = u ⊙ ‖W + s B' A‖, which is
    exactly an ordinary DoRA with weights (A, B', m').   [row norms: DoRA, arXiv 2402.09353]

    Args:
        state: the route; its prompt `row` is exported. Modules with gate 0 are left out (under
            DoRA too: gate 0 means the bare module).
    Raises:
        ValueError: the prompt ran on the bare model, or no module of its route is on.
    """
    runtime = runtime_of(model)
    state = state.select(row)
    name = state.adapters[0]
    if name is None or name not in runtime.configs:
        raise ValueError(f"export_route: prompt {row} has adapter {name!r}, nothing to export")
    config = runtime.configs[name]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    uses_dora = False
    for index, linears in enumerate(runtime.linears):
        block = runtime.blocks[index]
        gates = state.block_gates[index][0].tolist()
        for linear in linears:
            gate = gates[linear.column]
            if gate == 0 or name not in linear.specs:
                continue
            path = block.experts[linear.column]
            a, b, magnitude = _plain(linear, name, gate)
            whole = f"{block.path}.{path}"
            ranks[whole] = a.shape[0]
            alphas[whole] = linear.weights(name).scale * a.shape[0]  # PEFT: scale = alpha / rank
            tensors[expert_key(block.path, path, "lora_A")] = a
            tensors[expert_key(block.path, path, "lora_B")] = b
            if magnitude is not None:
                uses_dora = True
                tensors[f"{PREFIX}{whole}.lora_magnitude_vector"] = magnitude
    if not tensors:
        raise ValueError(f"export_route: no module is on in the route of prompt {row}")
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    write_folder(
        folder,
        {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()},
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if runtime.is_causal else None,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
            "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
            "target_modules": sorted(ranks),
            "use_dora": uses_dora,
            "use_rslora": False,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "fan_in_fan_out": any(
                not isinstance(linear.base_layer, nn.Linear) for block in runtime.linears for linear in block
            ),
            "base_model_name_or_path": getattr(
                getattr(runtime.model, "config", None), "_name_or_path", None
            ),
            "milora_expert": config.expert,
        },
    )  # fmt: skip


def _plain(linear: MiLoRALinear, name: str, gate: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and, for a kind with an output vector, DoRA's magnitudes, with the gate folded in."""
    weights = linear.weights(name)
    a, b = weights.a.float(), weights.b.float()
    if weights.output is None:
        return a, gate * b, None
    u = 1.0 + gate * weights.output.float()  # 1 − g + g c
    b = (gate / u)[:, None] * b  # weights.b already holds diag(c) B
    merged = linear.dense_weight().float() + weights.scale * (b @ a)
    return a, b, u * merged.norm(dim=1)
