"""RandLoRA: full-rank updates from scaled random bases.   [Albert et al., arXiv 2502.00987]

With p = min(d_in, d_out), q = max(d_in, d_out) and n = ceil(p / r)

    dW = scale · Σ_j B_j diag(λ_j) A diag(γ_j),   j = 1 ... n

(transposed where d_in > d_out). A [r, p] and B_j [q, r] are random, of unit variance, and follow
from the seed; λ [r, n] (0 at the start) and γ [n, p] (1 / p) are trained.

The update has rank n r, at least p: full rank is the method's point, so as an (A, B) of rank at
most 256 it exists only where the smaller side of the module is at most 256. Larger modules are
refused by name.

PEFT's code flattens λ A γ in the order (rank, basis) and the B_j in the order (basis, rank), which
pairs other slices than the paper's sum; `layout="peft"` does the same, the default is the paper's.
PEFT shares one set of bases between modules; here each module has its own seed, so PEFT's
checkpoints cannot be read.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from milora.experts.base import ExpertKind, ExpertSpec, WeightSource, check_choice, seeded, zeros
from milora.random import uniform


class Randlora(ExpertKind):
    """λ [rank, n] zero, γ [n, p] constant. Option: `layout`, "paper" or "peft"."""

    name = "randlora"
    summary = "full rank, scaled random bases"
    defaults: ClassVar[dict[str, Any]] = {"layout": "paper"}

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        smaller, n = _sizes(spec)
        return {"randlora_lambda": (spec.rank, n), "randlora_gamma": (n, smaller)}

    def served_rank(self, spec: ExpertSpec) -> int:
        return spec.rank * _sizes(spec)[1]

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_choice(self.name, options, "layout", ("paper", "peft"))

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        shapes = self.tensors(spec)
        gamma = shapes["randlora_gamma"]
        return {
            "randlora_lambda": zeros(*shapes["randlora_lambda"]),
            "randlora_gamma": zeros(*gamma).fill_(1 / max(gamma)),
        }

    def frozen_shapes(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        smaller, n = _sizes(spec)
        larger = max(spec.d_in, spec.d_out)
        return {"randlora_A": (spec.rank, smaller), "randlora_B": (larger, n * spec.rank)}

    def frozen(self, spec: ExpertSpec) -> dict[str, Tensor]:
        return {
            name: seeded(uniform(shape, spec.seed, stream), math.sqrt(3.0))
            for stream, (name, shape) in enumerate(self.frozen_shapes(spec).items())
        }

    def factors(self, values: dict[str, Tensor], spec: ExpertSpec) -> tuple[Tensor, Tensor]:
        scaled = (
            values["randlora_lambda"].T[:, :, None]
            * values["randlora_A"]
            * values["randlora_gamma"][:, None, :]
        )  # [n, rank, p]
        if self.option(spec, "layout") == "peft":
            scaled = scaled.transpose(0, 1)
        a, b = scaled.flatten(0, 1), values["randlora_B"]
        if spec.d_in > spec.d_out:
            a, b = b.T.contiguous(), a.T.contiguous()
        return a, b


def _sizes(spec: ExpertSpec) -> tuple[int, int]:
    """p and n."""
    smaller = min(spec.d_in, spec.d_out)
    return smaller, -(-smaller // spec.rank)
