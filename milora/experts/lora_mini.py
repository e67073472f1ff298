"""LoRA-Mini: dW = scale · N_2 M_2 M_1 N_1, with frozen random outer factors.   [arXiv 2411.15804]

The trainable M_1 [rank, inner_in] and M_2 [inner_out, rank] do not grow with the module:
rank · (inner_in + inner_out) numbers, whatever d_in and d_out are. A = M_1 N_1 and B = N_2 M_2 have
rank `rank`, so every op takes this for an ordinary LoRA.

The paper's own initialisation is not public. Its outer factors are those of HyperDreamBooth
[arXiv 2307.06949, section 4.2]: random and orthonormal. Ours are independent uniform numbers of
variance 1 / d_in in N_1 and 1 / d_out in N_2: the inner_in rows of N_1 and the inner_out columns of
N_2 have norm 1 in expectation (to about 0.45 / √d) and scalar products of about 1 / √d, 0.016 at
d = 4096. Making them exactly orthonormal takes a QR, whose bits differ between machines, and a
trained M would then meet other factors than it was trained with; `checksum` guards against that.
N_1's variance makes a fresh A spread exactly like LoRA's. An entry of B moves by about
√(inner_out / d_out) of an entry of M_2: a larger alpha or learning rate than LoRA's is in order.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from milora.experts.base import (
    ExpertSpec,
    WeightSource,
    check_positive,
    kaiming_uniform,
    seeded,
    zeros,
)
from milora.experts.chain import FactorChain
from milora.random import uniform


class LoraMini(FactorChain):
    """M_1 kaiming-uniform and M_2 zero, trainable; N_1 and N_2 follow from the spec's seed.

    Options: `inner_in` and `inner_out` (the paper's a and b), 64 each.
    """

    name = "lora_mini"
    summary = "N2 M2 M1 N1, N frozen"
    # Not lora_A and lora_B: PEFT would take tensors of that name for a LoRA of another shape.
    prefix = "lora_mini"
    defaults: ClassVar[dict[str, Any]] = {"inner_in": 64, "inner_out": 64}

    def inner(self, spec: ExpertSpec) -> tuple[int, int]:
        return self.option(spec, "inner_in"), self.option(spec, "inner_out")

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        shapes = self.tensors(spec)
        return {
            "lora_mini_A": kaiming_uniform(*shapes["lora_mini_A"], spec.seed),
            "lora_mini_B": zeros(*shapes["lora_mini_B"]),
        }

    def frozen_shapes(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        inner_in, inner_out = self.inner(spec)
        return {"outer_in": (inner_in, spec.d_in), "outer_out": (spec.d_out, inner_out)}

    def frozen(self, spec: ExpertSpec) -> dict[str, Tensor]:
        """`outer_in`: N_1 [inner_in, d_in].  `outer_out`: N_2 [d_out, inner_out]."""
        inner_in, inner_out = self.inner(spec)
        return {
            "outer_in": _unit_rows(inner_in, spec.d_in, spec.seed, stream=0),
            "outer_out": _unit_rows(inner_out, spec.d_out, spec.seed, stream=1).T.contiguous(),
        }

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_positive(self.name, options, "inner_in", "inner_out")


def _unit_rows(num_rows: int, length: int, seed: int, stream: int) -> Tensor:
    """[num_rows, length] float32, uniform, variance 1 / length: E‖row‖² = 1."""
    return seeded(uniform((num_rows, length), seed, stream), math.sqrt(3.0 / length))
