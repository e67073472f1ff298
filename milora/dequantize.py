"""The dense weight of a linear module, whatever quantizes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dequantized(linear: nn.Module) -> Tensor | None:
    """The weight in the shape and dtype that `linear` computes with, None where it keeps none."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if is_repacked(linear):  # products with unit vectors: its layout is bitsandbytes' own
        return linear(torch.eye(linear.in_features, device=weight.device)).T
    if getattr(weight, "quant_state", None) is not None:  # bitsandbytes, 4 bit
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):  # bitsandbytes, 8 bit; the scales move on the first forward
        scale = linear.state.SCB if weight.SCB is None else weight.SCB
        return weight if scale is None else weight.data.float() * (scale[:, None] / 127.0)
    if type(weight).dequantize is not Tensor.dequantize:  # torchao, quanto
        return weight.dequantize()
    return weight


def is_repacked(linear: nn.Module) -> bool:
    """Whether bitsandbytes has rearranged a 4-bit weight for AVX-512 inference on a CPU.

    It does so in place on the first forward in eval mode; such a weight passes no gradient on.
    """
    quant_state = getattr(getattr(linear, "weight", None), "quant_state", None)
    return bool(getattr(quant_state, "packing_format_for_cpu", False))
