"""FlyLoRA: dW x = scale · B (m(x) ⊙ A x), A frozen and sparse, its own router.   [arXiv 2510.08396]

A rank is on for a token if its |A x + d| is among the top_k largest: m is 0 or 1, and no router is
trained. Row j of A has round(d_in · top_k / rank) entries that are not 0, at places drawn without
replacement; d is the selection bias of `rank_gated`. A follows from the seed, so a file holds B and
d alone.

Of the authors' two codes this follows the standalone one. `absolute=False` selects by A x + d, as
their fork of PEFT does; that fork also computes A x without a gradient, so that none reaches x
through the adapter, which is not copied. The paper's entries are normal with variance 1 / rank²;
ours are uniform with that variance, whose bits are the same on every machine.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from milora.experts.base import ExpertSpec, WeightSource, check_choice, seeded, zeros
from milora.experts.rank_gated import RankGated, project
from milora.random import uniform


class FlyLora(RankGated):
    """B [d_out, rank] zero, trainable; d [rank] zero, fixed; A [rank, d_in] frozen.

    Options: `top_k`; `absolute`, select by |A x + d|; `bias_step`.
    """

    name = "flylora"
    summary = "B (m(x) A), A sparse and frozen"
    prefix = "flylora"
    fixed = frozenset({"flylora_bias"})
    defaults: ClassVar[dict[str, Any]] = {"top_k": 8, "absolute": True, "bias_step": 1e-3}

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        return {"flylora_B": zeros(spec.d_out, spec.rank), "flylora_bias": zeros(spec.rank)}

    def frozen_shapes(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        return {"flylora_A": (spec.rank, spec.d_in)}

    def frozen(self, spec: ExpertSpec) -> dict[str, Tensor]:
        share = min(self.option(spec, "top_k"), spec.rank) / spec.rank
        count = max(1, round(spec.d_in * share))
        # The places of the smallest of d_in random keys; equal keys go by their index.
        keys = uniform((spec.rank, spec.d_in), spec.seed, stream=1)
        places = keys.sort(dim=1, stable=True).indices[:, :count]
        values = seeded(uniform((spec.rank, count), spec.seed), math.sqrt(3.0) / spec.rank)
        return {"flylora_A": zeros(spec.rank, spec.d_in).scatter_(1, places, values)}

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_choice(self.name, options, "absolute", (False, True))

    @torch.no_grad()
    def rank_gates(self, x: Tensor, values: dict[str, Tensor], spec: ExpertSpec) -> Tensor:
        scores = project(x, values["flylora_A"]) + values["flylora_bias"].float()
        return self.selected(scores.abs() if self.option(spec, "absolute") else scores, spec)
