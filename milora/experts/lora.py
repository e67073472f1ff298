"""LoRA: dW = scale · B A.   [Hu et al., arXiv 2106.09685]"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from milora.experts.base import ExpertSpec, WeightSource, kaiming_uniform, zeros
from milora.experts.chain import FactorChain


class Lora(FactorChain):
    """A [rank, d_in] kaiming-uniform, B [d_out, rank] zero; both trainable."""

    name = "lora"
    summary = "B A"
    prefix: ClassVar[str] = "lora"
    has_products = False

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        return {
            "lora_A": kaiming_uniform(spec.rank, spec.d_in, spec.seed),
            "lora_B": zeros(spec.d_out, spec.rank),
        }
