"""LoRA-XS: dW = scale · B R A with a trained R [rank, rank].   [Bałazy et al., arXiv 2405.17604]

With the base weight W = U S Vᵀ the fixed factors are A = S_r V_rᵀ and B = U_r: the singular values
sit in A alone, as in the authors' code. R starts as N(0, 1e-5²), so dW does not start at exactly 0.

SVD bits differ between machines, so A and B are saved with the adapter: its file is as large as
LoRA's although it trains rank² numbers. They do not depend on the adapter's seed, so that adapters
of one base and rank, made on one machine, share them in an `AdapterPool`. `factors="random"` (the
authors' option too) draws A and B from the seed, kaiming-uniform, and its file holds R alone.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from milora.experts.base import ExpertSpec, WeightSource, check_choice, seeded, zeros
from milora.experts.chain import FactorChain
from milora.experts.decompose import top_svd
from milora.random import uniform


class LoraXs(FactorChain):
    """R trainable, A and B not. Option `factors`: "svd" (of the base weight) or "random"."""

    name = "lora_xs"
    summary = "B R A, R trained"
    prefix = "lora_xs"
    core = "square"
    fixed = frozenset({"lora_xs_A", "lora_xs_B"})
    defaults: ClassVar[dict[str, Any]] = {"factors": "svd"}

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        generator = torch.Generator("cpu").manual_seed(spec.seed)
        core = zeros(spec.rank, spec.rank).normal_(0.0, 1e-5, generator=generator)
        if self.frozen_shapes(spec):
            return {"lora_xs_core": core}
        u, s, vt = top_svd(self.base_weight(spec, weight), spec.rank)
        return self.named(s[:, None] * vt, u, core)

    def frozen_shapes(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        if self.option(spec, "factors") == "svd":
            return {}
        return {"lora_xs_A": (spec.rank, spec.d_in), "lora_xs_B": (spec.d_out, spec.rank)}

    def frozen(self, spec: ExpertSpec) -> dict[str, Tensor]:
        return {
            name: seeded(uniform(shape, spec.seed, stream), 1 / math.sqrt(shape[1]))
            for stream, (name, shape) in enumerate(self.frozen_shapes(spec).items())
        }

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_choice(self.name, options, "factors", ("svd", "random"))
