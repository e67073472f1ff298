"""Bone-row, also called MiSS: dW = scale · D [I I ... I].   [Kang, arXiv 2409.15371]

The chunks of r entries of x are summed (x is padded with zeros) and go through one trained matrix
D [d_out, r]: half of LoRA's numbers and a start at 0. Bone knows no alpha: with alpha = rank, the
default, scale is 1.

The paper's other form, BAT (W_ab D_a + D_a on each block of W), has no low rank and is not
built. This file follows PEFT's port and the authors' README, not the paper's text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from milora.experts.base import ExpertKind, ExpertSpec, WeightSource, zeros


class Bone(ExpertKind):
    """D [d_out, rank], zero at the start."""

    name = "bone"
    summary = "D (I I ... I) (Bone-row, MiSS)"

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        return {"lora_bone_B": (spec.d_out, spec.rank)}

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        return {"lora_bone_B": zeros(spec.d_out, spec.rank)}

    def factors(self, values: dict[str, Tensor], spec: ExpertSpec) -> tuple[Tensor, Tensor]:
        b = values["lora_bone_B"]
        columns = torch.arange(spec.d_in, device=b.device)
        rows = torch.arange(spec.rank, device=b.device)
        a = (columns % spec.rank == rows[:, None]).to(b.dtype)
        return a, b
