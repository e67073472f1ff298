"""MELoRA: dW = scale · blockdiag(B_1 A_1, ..., B_n A_n).   [Ren et al., arXiv 2402.17263]

x is cut into n slices and y too; mini LoRA j of rank r maps slice j to slice j. It trains as many
numbers as one LoRA of rank r, r (d_in + d_out), and its update has rank n r.

As (A, B) it is of rank n r with blocks of zeros; n must divide d_in and d_out.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from milora.experts.base import (
    ExpertKind,
    ExpertSpec,
    WeightSource,
    check_positive,
    kaiming_uniform,
    zeros,
)


class Melora(ExpertKind):
    """A_1 ... A_n kaiming-uniform, stacked; B_1 ... B_n zero, stacked. Option: `num_blocks`, n."""

    name = "melora"
    summary = "blockdiag(B_j A_j)"
    defaults: ClassVar[dict[str, Any]] = {"num_blocks": 4}

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        n = self.option(spec, "num_blocks")
        return {"melora_A": (n * spec.rank, spec.d_in // n), "melora_B": (spec.d_out, spec.rank)}

    def served_rank(self, spec: ExpertSpec) -> int:
        return self.option(spec, "num_blocks") * spec.rank

    def check(self, spec: ExpertSpec) -> None:
        super().check(spec)
        n = self.option(spec, "num_blocks")
        if spec.d_in % n or spec.d_out % n:
            raise ValueError(
                f"melora: num_blocks must divide d_in and d_out, got {n} on a {spec.d_in} x "
                f"{spec.d_out} module"
            )

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_positive(self.name, options, "num_blocks", most=256)

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        shape = self.tensors(spec)["melora_A"]
        return {
            "melora_A": kaiming_uniform(*shape, spec.seed),
            "melora_B": zeros(spec.d_out, spec.rank),
        }

    def factors(self, values: dict[str, Tensor], spec: ExpertSpec) -> tuple[Tensor, Tensor]:
        n = self.option(spec, "num_blocks")
        a = torch.block_diag(*values["melora_A"].chunk(n))
        b = torch.block_diag(*values["melora_B"].chunk(n))
        return a, b
