"""LoRA: dW = scale · B A.   [Hu et al., arXiv 2106.09685]"""

from __future__ import annotations

from torch import Tensor

from milora.experts.base import (
    ExpertKind,
    ExpertSpec,
    ExpertWeights,
    WeightSource,
    kaiming_uniform,
    zeros,
)


class Lora(ExpertKind):
    """A [rank, d_in] kaiming-uniform, B [d_out, rank] zero; both trainable."""

    name = "lora"

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (spec.rank, spec.d_in), "lora_B": (spec.d_out, spec.rank)}

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        return {
            "lora_A": kaiming_uniform(spec.rank, spec.d_in, spec.seed),
            "lora_B": zeros(spec.d_out, spec.rank),
        }

    def materialise(
        self,
        tensors: dict[str, Tensor],
        frozen: dict[str, Tensor],
        spec: ExpertSpec,
        weight: WeightSource | None = None,
    ) -> ExpertWeights:
        return ExpertWeights(tensors["lora_A"], tensors["lora_B"], spec.scale)
