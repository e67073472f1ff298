"""MoRA, type 1 (sharing): dW = scale · D M C with one square M.   [Jiang et al., arXiv 2405.12130]

M is [q, q] with q = round(√((d_in + d_out) r)), about as many numbers as a LoRA of rank r has. C
sums the chunks of q entries of x (padded to a multiple of q with the first ones again), D repeats
M C x down to d_out. The update has rank q, which kernels take up to 256: on a 4096 x 4096 module r
may be at most 8, on 4096 x 11008 at most 4. Larger ones are refused by name.

MoRA knows no alpha: with alpha = rank, the default, scale is 1. Its type 6 (rotations) has no low
rank and is not built.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from milora.experts.base import ExpertKind, ExpertSpec, WeightSource, zeros


class Mora(ExpertKind):
    """M [q, q], zero at the start."""

    name = "mora"
    summary = "D M C, one square M (type 1)"

    def served_rank(self, spec: ExpertSpec) -> int:
        return int(math.sqrt((spec.d_in + spec.d_out) * spec.rank) + 0.5)

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        q = self.served_rank(spec)
        return {"lora_mora_M": (q, q)}

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        return {"lora_mora_M": zeros(*self.tensors(spec)["lora_mora_M"])}

    def factors(self, values: dict[str, Tensor], spec: ExpertSpec) -> tuple[Tensor, Tensor]:
        m = values["lora_mora_M"]
        q, device = len(m), m.device
        padded = torch.arange(-(-spec.d_in // q) * q, device=device)
        a = m.new_zeros(q, spec.d_in)
        # Entry i of the padded x is x[i mod d_in] and is summed into i mod q.
        a.index_put_((padded % q, padded % spec.d_in), m.new_ones(()), accumulate=True)
        return a, m[torch.arange(spec.d_out, device=device) % q]
