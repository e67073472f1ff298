"""DyLoRA: one training serves every rank up to R.   [Valipour et al., arXiv 2210.07558]

Each training forward draws a rank n, uniform from min_rank to R, and uses the first n rows of A and
columns of B, each times √(R / n):

    dW = scale · (R / n) · B[:, :n] A[:n],  that is alpha / n · B[:, :n] A[:n]

so that what the first ranks learn does not rest on later ones, and inference may take any rank
(`rank` in the options, or `milora.set_rank`). Under `frozen` only row n of A and column n of B get
a gradient. The draw comes from torch's global generator on the CPU, as dropout's do; each module
draws its own.

The factors are sliced and scaled as in the authors' `dynamic` class; that both of them are, which
gives alpha / n, is read off that class and not checked against their training runs. A later port
(kohya's) keeps all rows in the forward, which is another method.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from milora.experts.base import (
    ExpertSpec,
    WeightSource,
    check_choice,
    check_positive,
    kaiming_uniform,
    zeros,
)
from milora.experts.chain import FactorChain

_DRAWN = "dylora_rank"  # the rank of a training forward


class DyLora(FactorChain):
    """A kaiming-uniform, B zero; both trainable.

    Options: `rank`, of inference (0: all ranks; a module with fewer uses them all); `min_rank`, the
    lowest rank of training; `frozen`.
    """

    name = "dylora"
    summary = "B A of the first n ranks"
    prefix = "dylora"
    defaults: ClassVar[dict[str, Any]] = {"rank": 0, "min_rank": 1, "frozen": False}

    def served_rank(self, spec: ExpertSpec) -> int:
        return min(self.option(spec, "rank") or spec.rank, spec.rank)

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_positive(self.name, options, "min_rank")
        check_choice(self.name, options, "frozen", (False, True))
        rank = options.get("rank", 0)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"dylora: rank must be an integer >= 0, got {rank!r}")

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        return {
            "dylora_A": kaiming_uniform(spec.rank, spec.d_in, spec.seed),
            "dylora_B": zeros(spec.d_out, spec.rank),
        }

    def drawn(self, tensors: dict[str, Tensor], spec: ExpertSpec) -> dict[str, Any]:
        lowest = min(self.option(spec, "min_rank"), spec.rank)
        return {_DRAWN: int(torch.randint(lowest, spec.rank + 1, (), device="cpu"))}

    def factors(self, values: dict[str, Tensor], spec: ExpertSpec) -> tuple[Tensor, Tensor]:
        n = values.get(_DRAWN, self.served_rank(spec))
        a, b = values["dylora_A"][:n], values["dylora_B"][:, :n]
        if _DRAWN in values and self.option(spec, "frozen"):
            a = torch.cat([a[:-1].detach(), a[-1:]])
            b = torch.cat([b[:, :-1].detach(), b[:, -1:]], dim=1)
        factor = math.sqrt(spec.rank / n)
        return factor * a, factor * b
