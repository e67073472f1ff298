"""DoRA: W' = diag(m / ‖W + scale B A‖_row) (W + scale B A).   [Liu et al., arXiv 2402.09353]

With MiLoRA's routing this is the paper's MiDoRA (table 1, where it has no definition of its own).
For y = W x + bias and c = m / ‖W + scale B A‖_row the gated update is

    y += g · (c ⊙ scale B A x + (c - 1) ⊙ (y - bias))

so that gate 0 or B = 0 leave the base untouched, and the bias is not rescaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from milora.experts.base import ExpertSpec, ExpertWeights, WeightSource
from milora.experts.lora import Lora

# Elements of W + scale B A at a time: what stays in a CPU's cache, what fills a GPU (64 MiB).
_CPU_CHUNK, _GPU_CHUNK = 1 << 20, 1 << 24


class Dora(Lora):
    """LoRA's A and B, and the magnitudes m [d_out], which start as the row norms of W."""

    name = "dora"
    summary = "m W' / |W'|, W' = W + B A"
    has_output = True
    has_products = True

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        return {**super().tensors(spec), "lora_magnitude_vector": (spec.d_out,)}

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        tensors = super().init(spec)
        norm = row_norm(self.base_weight(spec, weight))
        return {**tensors, "lora_magnitude_vector": norm.float().cpu()}

    def materialise(
        self,
        tensors: dict[str, Tensor],
        frozen: dict[str, Tensor],
        spec: ExpertSpec,
        weight: WeightSource | None = None,
    ) -> ExpertWeights:
        """Like `Lora`, times c. The norm in c is a constant for autograd (DoRA, section 4.3)."""
        a, b, m = tensors["lora_A"], tensors["lora_B"], tensors["lora_magnitude_vector"]
        # Rounded as m was, so that c starts as 1 exactly on a float64 base too.
        norm = row_norm(self.base_weight(spec, weight), a, b, spec.scale).to(m.dtype)
        # A row of W that is 0 (pruned) has m = 0 too: c = 0 keeps it, where 0 / 0 would give NaN.
        c = m / norm.where(norm > 0, 1.0)
        return ExpertWeights(a, c[:, None] * b, spec.scale, c - 1.0)


@torch.no_grad()
def row_norm(
    weight: Tensor, a: Tensor | None = None, b: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """‖W + scale B A‖ of every row: [d_out] float32, detached.

    The sum W + scale B A is formed, in float32 (float64 for a float64 W) and a band of rows at a
    time. Expanding the square instead would cancel where the update opposes W. Squares are summed
    in float64: the order of summation, that is the device or the thread count, then changes the
    float32 result only next to a tie in its rounding, so a fresh m / norm is 1 on either device.

    Args:
        weight: [d_out, d_in], any float dtype.  a: [rank, d_in].  b: [d_out, rank].
    """
    d_out, d_in = weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    out = torch.empty(d_out, dtype=dtype, device=weight.device)
    chunk = _CPU_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK
    num_rows = max(1, chunk // d_in)
    for begin in range(0, d_out, num_rows):
        rows = slice(begin, begin + num_rows)
        total = weight[rows].to(dtype)
        if a is not None and b is not None:
            total = torch.addmm(total, b[rows].to(dtype), a.to(dtype), alpha=scale)
        out[rows] = torch.linalg.vector_norm(total, dim=1, dtype=torch.float64)
    return out
