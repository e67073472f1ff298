"""NOLA: A and B are combinations of random bases.   [Koohpayegani et al., arXiv 2310.02556]

    A = A_0 + Σ_j α_j A_j,   B = Σ_j β_j B_j,   j = 1 ... k

The 2 k coefficients are all that is trained and saved, whatever the module's size and the rank. The
entries of A_j and B_j are uniform on (-1, 1) / √k, drawn from the seed by the counter-based
generator. A_0 is uniform with LoRA's bound, B_0 is 0: with α = β = 0 the update starts at 0 and β
has a gradient, as in the authors' LLaMA code.

The bases are never kept: forward and backward draw them again, one at a time, which is k times a
LoRA's numbers each; on a CPU that is about 3 s for a 4096 x 4096 module of rank 32 and k = 256. For
serving they are drawn once, when the adapter is packed.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from milora.experts.base import ExpertKind, ExpertSpec, WeightSource, check_positive, seeded, zeros
from milora.random import uniform

# Streams of a module's seed: A_0, then A_j and B_j in turn.
_START = 0


class Nola(ExpertKind):
    """α [k] and β [k], both 0 at the start. Option: `num_basis`, k."""

    name = "nola"
    summary = "sums of random bases"
    defaults: ClassVar[dict[str, Any]] = {"num_basis": 256}

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        k = self.option(spec, "num_basis")
        return {"lora_nola_A": (k,), "lora_nola_B": (k,)}

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_positive(self.name, options, "num_basis", most=1 << 14)

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        return {name: zeros(*shape) for name, shape in self.tensors(spec).items()}

    def frozen_shapes(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        return {"nola_start_A": (spec.rank, spec.d_in)}

    def frozen(self, spec: ExpertSpec) -> dict[str, Tensor]:
        values = uniform((spec.rank, spec.d_in), spec.seed, _START)
        return {"nola_start_A": seeded(values, 1 / math.sqrt(spec.d_in))}

    def factors(self, values: dict[str, Tensor], spec: ExpertSpec) -> tuple[Tensor, Tensor]:
        a = Combination.apply(values["lora_nola_A"], (spec.rank, spec.d_in), spec.seed, 1)
        b = Combination.apply(values["lora_nola_B"], (spec.d_out, spec.rank), spec.seed, 2)
        return values["nola_start_A"] + a, b


class Combination(torch.autograd.Function):
    """Σ_j c_j M_j for random matrices M_j of `shape` in streams first, first + 2, ... of `seed`.

    Backward: dL/dc_j = <dL/dsum, M_j>, with M_j drawn again.
    """

    @staticmethod
    def forward(ctx, coefficients: Tensor, shape: tuple[int, int], seed: int, first: int) -> Tensor:
        ctx.save_for_backward(coefficients)
        ctx.place = (shape, seed, first)
        total = coefficients.new_zeros(shape)
        for j, value in enumerate(coefficients.tolist()):
            if value != 0.0:
                total.add_(_basis(coefficients, ctx.place, j), alpha=value)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        (like,) = ctx.saved_tensors
        products = [torch.sum(grad * _basis(like, ctx.place, j)) for j in range(len(like))]
        return torch.stack(products), None, None, None


def _basis(like: Tensor, place: tuple[tuple[int, int], int, int], j: int) -> Tensor:
    """M_j, on the device and in the dtype of the coefficients `like` [k]."""
    shape, seed, first = place
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = uniform(shape, seed, first + 2 * j, device=like.device, dtype=dtype)
    return values.mul_(1 / math.sqrt(len(like))).to(like.dtype)
