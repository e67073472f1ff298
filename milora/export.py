"""Write a fixed route as an ordinary PEFT adapter, which every engine loads."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from milora.adapter_files import write_folder
from milora.adapter_validation import expert_key
from milora.experts.dora import row_norm
from milora.nn import MiLoRALinear
from milora.rank_gates import is_rank_gated
from milora.routing import RoutingState
from milora.runtime import runtime_of


@torch.no_grad()
def export_route(
    model: nn.Module, state: RoutingState, folder: str | os.PathLike, row: int = 0
) -> None:
    """Write the route of one prompt as a PEFT LoRA folder (DoRA where the experts are DoRA).

    With the gate folded into B a fixed route is exactly an ordinary LoRA. For a DoRA expert with
    factor c and gate g:  u = 1 − g + g c,  B' = diag(g c / u) B,  m' = u ⊙ ‖W + s B' A‖, which is
    exactly an ordinary DoRA with weights (A, B', m').   [row norms: DoRA, arXiv 2402.09353]

    The scale is folded into B as well, so that alpha = rank for every module: engines that know
    no patterns then compute the same.

    Args:
        state: the route; its prompt `row` is exported. Modules with gate 0 are left out (under
            DoRA too: gate 0 means the bare module).
    Raises:
        ValueError: the prompt ran on the bare model, no module of its route is on, the route is of
            another model, or a DoRA row cannot be written.
    """
    runtime = runtime_of(model)
    state = state.select(row)
    name = state.adapters[0]
    if name is None or name not in runtime.configs:
        raise ValueError(f"export_route: prompt {row} has adapter {name!r}, nothing to export")
    if state.names != runtime.names or not state.complete:
        raise ValueError(
            "export_route: state must be a complete route through this model, got one that "
            "was made for other modules or never finished"
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    fan_in_fan_out = False
    for index, (block, linears) in enumerate(zip(runtime.blocks, runtime.linears, strict=True)):
        gates = state.block_gates[index][0].tolist()
        for linear in linears:
            gate = gates[linear.column]
            if gate == 0 or name not in linear.specs:
                continue
            path = block.experts[linear.column]
            whole = f"{block.path}.{path}"
            fan_in_fan_out |= type(linear.base_layer).__name__ == "Conv1D"
            for tensor, value in _plain(linear, name, gate, whole).items():
                tensors[expert_key(block.path, path, tensor)] = value.to("cpu").contiguous()
                if tensor == "lora_A":
                    ranks[whole] = value.shape[0]
    if not tensors:
        raise ValueError(f"export_route: no module is on in the route of prompt {row}")
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {path: r for path, r in ranks.items() if r != rank}
    base = getattr(runtime.model, "config", None)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if runtime.is_causal else None,
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_dora": any(key.endswith("lora_magnitude_vector") for key in tensors),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }
    write_folder(folder, tensors, config)


def _plain(linear: MiLoRALinear, name: str, gate: float, path: str) -> dict[str, Tensor]:
    """One module's float32 tensors, with gate and scale folded in, by PEFT's names."""
    if is_rank_gated(linear, name):
        raise ValueError(
            f"export_route: {path} has an expert of kind {linear.kinds[name]}, which gates each "
            "rank by the token; no LoRA computes the same"
        )
    weights = linear.weights(name)
    a, b = weights.a.float(), weights.scale * weights.b.float()
    if weights.output is None:
        return {"lora_A": a, "lora_B": gate * b}
    u = 1.0 + gate * weights.output.float()  # 1 − g + g c
    b = (gate / u)[:, None] * b  # weights.b already holds diag(c) B
    norm = row_norm(linear.dense_weight(), a, b)
    if not (b.isfinite().all() and norm.all()):
        raise ValueError(
            f"export_route: {path} has a row whose weights vanish, which DoRA's form m W / ‖W‖ "
            "cannot express"
        )
    return {"lora_A": a, "lora_B": b, "lora_magnitude_vector": u * norm}
