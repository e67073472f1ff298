"""Experts without effect: on modules whose weight a model reads without calling the module.

Mamba's `dt_proj` is one, and its fused CUDA kernels read more of them. An expert adds its update
when its module is called, so here it would do nothing, get no gradient, and be saved all the same.
What a model does with a module only a forward shows.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from milora.runtime import Runtime


def warn_of_uncalled(runtime: Runtime, called: set[nn.Module]) -> None:
    """Warn of experts whose modules a whole forward has not called.

    Args:
        called: the `MiLoRALinear`s that it has called. A block with none of them did not run
            (layer dropout, early exit), which says nothing about its modules.
    """
    if any(_is_compiled(module) for module in runtime.model.modules()):
        return  # compiled code does not tell
    counts: dict[str, int] = {}
    for block, linears in zip(runtime.blocks, runtime.linears, strict=True):
        if called.isdisjoint(linears):
            continue
        for linear in linears:
            if linear.specs and linear not in called:
                path = block.experts[linear.column]
                counts[path] = counts.get(path, 0) + 1
    if counts:
        listed = ", ".join(f"{path} (in {count} blocks)" for path, count in counts.items())
        warnings.warn(
            f"milora: the experts on {listed} have no effect and will not train: the model reads "
            "these modules' weights without calling the modules. Leave them out of target_modules",
            stacklevel=2,
        )


def _is_compiled(module: nn.Module) -> bool:
    """By module.compile(), torch.compile(module), or torch.compile of its forward."""
    return (
        module._compiled_call_impl is not None
        or type(module).__name__ == "OptimizedModule"
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
    )
