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

import hashlib
import math
from typing import Any, ClassVar

from torch import Tensor

from milora.experts.base import (
    ExpertKind,
    ExpertSpec,
    ExpertWeights,
    WeightSource,
    kaiming_uniform,
    zeros,
)
from milora.random import uniform


class LoraMini(ExpertKind):
    """M_1 kaiming-uniform and M_2 zero, trainable; N_1 and N_2 follow from the spec's seed.

    Options: `inner_in` and `inner_out` (the paper's a and b), 64 each.
    """

    name = "lora_mini"
    defaults: ClassVar[dict[str, Any]] = {"inner_in": 64, "inner_out": 64}

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        # Not lora_A and lora_B: PEFT would take tensors of that name for a LoRA of another shape.
        return {
            "lora_mini_A": (spec.rank, self.option(spec, "inner_in")),
            "lora_mini_B": (self.option(spec, "inner_out"), spec.rank),
        }

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        shapes = self.tensors(spec)
        return {
            "lora_mini_A": kaiming_uniform(*shapes["lora_mini_A"], spec.seed),
            "lora_mini_B": zeros(*shapes["lora_mini_B"]),
        }

    def frozen(self, spec: ExpertSpec) -> dict[str, Tensor]:
        """`outer_in`: N_1 [inner_in, d_in].  `outer_out`: N_2 [d_out, inner_out]."""
        inner_in, inner_out = self.option(spec, "inner_in"), self.option(spec, "inner_out")
        return {
            "outer_in": _unit_rows(inner_in, spec.d_in, spec.seed, stream=0),
            "outer_out": _unit_rows(inner_out, spec.d_out, spec.seed, stream=1).T.contiguous(),
        }

    def checksum(self, spec: ExpertSpec, frozen: dict[str, Tensor] | None = None) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted((frozen or self.frozen(spec)).items()):
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        for name, value in options.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"lora_mini: {name} must be a positive integer, got {value!r}")

    def materialise(
        self,
        tensors: dict[str, Tensor],
        frozen: dict[str, Tensor],
        spec: ExpertSpec,
        weight: WeightSource | None = None,
    ) -> ExpertWeights:
        a = tensors["lora_mini_A"] @ frozen["outer_in"]
        b = frozen["outer_out"] @ tensors["lora_mini_B"]
        return ExpertWeights(a, b, spec.scale)


def _unit_rows(num_rows: int, length: int, seed: int, stream: int) -> Tensor:
    """[num_rows, length] float32, uniform, variance 1 / length: E‖row‖² = 1.

    √ and the float64 product are correctly rounded by IEEE 754, hence the same everywhere.
    """
    return uniform((num_rows, length), seed, stream).mul_(math.sqrt(3.0 / length)).float()
