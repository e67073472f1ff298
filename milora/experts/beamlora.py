"""BeamLoRA: dW = scale · B diag(ŝ) A, ŝ = rank · softmax(q / tau).   [arXiv 2502.13604]

The trained q [rank] weighs the ranks against each other. It starts at 0, so ŝ starts at 1 and the
whole as a LoRA; the ŝ of a module always sum to its rank. From time to time training removes the
ranks of least ŝ and puts copies of the best ones in their places: `milora.train.BeamCallback`.

The authors take tau = 0.05, and 0.03 for learning rates below 1e-4.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from milora.experts.base import ExpertSpec, WeightSource, kaiming_uniform, zeros
from milora.experts.chain import FactorChain


class BeamLora(FactorChain):
    """A kaiming-uniform, B and q (`lora_beam_core`) zero; all trainable. Option: `tau`."""

    name = "beamlora"
    summary = "B diag(s) A, s = r softmax(q / tau)"
    prefix = "lora_beam"
    core = "diagonal"
    defaults: ClassVar[dict[str, Any]] = {"tau": 0.05}

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        tau = options.get("tau", 1.0)
        is_number = isinstance(tau, int | float) and not isinstance(tau, bool)
        if not is_number or not math.isfinite(tau) or tau <= 0:
            raise ValueError(f"beamlora: tau must be a number above 0, got {tau!r}")

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        a = kaiming_uniform(spec.rank, spec.d_in, spec.seed)
        return self.named(a, zeros(spec.d_out, spec.rank), zeros(spec.rank))

    def shares(self, values: dict[str, Tensor], spec: ExpertSpec) -> Tensor:
        """ŝ: [rank], summing to rank."""
        return spec.rank * torch.softmax(values["lora_beam_core"] / self.option(spec, "tau"), 0)

    def factors(self, values: dict[str, Tensor], spec: ExpertSpec) -> tuple[Tensor, Tensor]:
        return values["lora_beam_A"], values["lora_beam_B"] * self.shares(values, spec)
