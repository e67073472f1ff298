"""The reference of end-to-end tests: one ordinary model per prompt, its route merged into it.

With a fixed route every targeted linear module is y = W' x + bias with a W' of its own, so a bare
model with those weights must give the attached model's logits for that prompt. Nothing of the
product computes here but the stored adapter tensors and the state's gates.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from milora import RoutingState
from milora.attach import runtime_of
from milora.nn import MiLoRALinear


def update_of(linear: MiLoRALinear, adapter: str, weight: Tensor) -> Tensor:
    """What the expert adds to `weight` [d_out, d_in] at gate 1, in float64.

    LoRA: s B A.  LoRA-Mini: s N_2 M_2 M_1 N_1.  DoRA: diag(c) (W + s B A) - W with
    c = m / ‖W + s B A‖, so that the bias is not rescaled.
    """
    spec, kind = linear.specs[adapter], linear.kinds[adapter]
    t = {k: v.detach().double() for k, v in linear.tensors(adapter).items()}
    if kind == "lora_mini":
        outer = {k: getattr(linear, k)[adapter].weight.double() for k in ("outer_in", "outer_out")}
        return spec.scale * (
            outer["outer_out"] @ t["lora_mini_B"] @ t["lora_mini_A"] @ outer["outer_in"]
        )
    update = spec.scale * (t["lora_B"] @ t["lora_A"])
    if kind == "dora":
        total = weight + update
        c = t["lora_magnitude_vector"] / total.norm(dim=1)
        return c[:, None] * total - weight
    return update


def dense(module: nn.Module) -> Tensor:
    """The weight of a linear module as [d_out, d_in]; a view."""
    return module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data


@torch.no_grad()
def plain_model(
    model: nn.Module, bare: nn.Module, state: RoutingState, row: int, dtype: torch.dtype
) -> nn.Module:
    """A copy of `bare` whose weights are those that prompt `row` of `state` meets in `model`.

    Args:
        model: the attached model.  bare: the same model before anything was attached.
        dtype: of the copy; weights are merged in float64 first.
    """
    plain = copy.deepcopy(bare).to(dtype)
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")  # the grouped one has no float64
    adapter = state.adapters[row]
    runtime = runtime_of(model)
    for index, (block, names) in enumerate(zip(state.blocks, state.names, strict=True)):
        for column, path in enumerate(names):
            gate = state.block_gates[index][row, column].double()
            linear = runtime.blocks[index].module.get_submodule(path)
            if adapter is None or adapter not in linear.specs or gate == 0:
                continue
            weight = dense(bare.get_submodule(f"{block}.{path}")).double()
            merged = weight + gate * update_of(linear, adapter, weight)
            dense(plain.get_submodule(f"{block}.{path}")).copy_(merged)
    return plain
