"""FFA-LoRA: dW = scale · B A with a frozen random A.   [Sun et al., arXiv 2403.12313]

Clients of a federation start from one seed and so have one A; the mean of their updates is then
the update of the mean B, exactly (`milora.merge`, method "ffa"), and noise that is added to B for
privacy enters dW linearly.

A is uniform with LoRA's bound 1 / √d_in and made again from the seed, so a file holds B alone.
Source of this file: the abstract and a detailed note on the paper, not its code.
"""

from __future__ import annotations

import math

from torch import Tensor

from milora.experts.base import ExpertSpec, WeightSource, seeded, zeros
from milora.experts.chain import FactorChain
from milora.random import uniform


class FfaLora(FactorChain):
    """B [d_out, rank] zero, trainable; A [rank, d_in] follows from the spec's seed."""

    name = "ffa_lora"
    summary = "B A, A frozen"
    prefix = "ffa_lora"

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        return {"ffa_lora_B": zeros(spec.d_out, spec.rank)}

    def frozen_shapes(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        return {"ffa_lora_A": (spec.rank, spec.d_in)}

    def frozen(self, spec: ExpertSpec) -> dict[str, Tensor]:
        values = uniform((spec.rank, spec.d_in), spec.seed)
        return {"ffa_lora_A": seeded(values, 1 / math.sqrt(spec.d_in))}
