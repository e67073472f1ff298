"""SLoRA, NLoRA and IntTune: dW = scale · B N A with a core N [rank, rank].   [arXiv 2502.14482]

SLoRA trains all three factors, A and N kaiming-uniform, B zero. NLoRA starts from the Nystrom
form of the base weight: A = W[:r, :], B = W[:, :r] and N from W[:r, :r]. IntTune starts as NLoRA
and trains N alone.

The paper's Nystrom core is the pseudo-inverse of W[:r, :r], and B N A then has W's first r rows and
columns exactly. The released code uses the block itself and does not take B N A off the base, so
the model changes at the start. Both are options: `core` "block" (the code) or "pinv" (the
paper), and `residual` False (the code) or True, which takes the start off the update: dW then
starts at 0 and has rank 2 r. The defaults are the code's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from milora.experts.base import ExpertSpec, WeightSource, check_choice, kaiming_uniform, zeros
from milora.experts.chain import FactorChain
from milora.random import derive_seed


class Slora(FactorChain):
    """A, N and B trained."""

    name = "slora"
    summary = "B N A, all trained"
    prefix = "slora"
    core = "square"

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        a = kaiming_uniform(spec.rank, spec.d_in, spec.seed)
        core = kaiming_uniform(spec.rank, spec.rank, derive_seed(spec.seed, "core"))
        return self.named(a, zeros(spec.d_out, spec.rank), core)


class Nlora(FactorChain):
    """A, N and B trained, from the base weight. Options: `core`, `residual`."""

    name = "nlora"
    summary = "B N A from W's rows and columns"
    prefix = "nlora"
    core = "square"
    fixed = frozenset({"nlora_start_A", "nlora_start_B"})
    defaults: ClassVar[dict[str, Any]] = {"core": "block", "residual": False}

    def is_anchored(self, spec: ExpertSpec) -> bool:
        return self.option(spec, "residual")

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        dense, r = self.base_weight(spec, weight).float(), spec.rank
        a, b, core = zeros(r, spec.d_in), zeros(spec.d_out, r), zeros(r, r)
        a[: spec.d_out], b[:, : spec.d_in] = dense[:r], dense[:, :r]  # a rank above both: zeros
        block = dense[:r, :r]
        if self.option(spec, "core") == "pinv":
            block = torch.linalg.pinv(block.double())
        core[: block.shape[0], : block.shape[1]] = block
        return self.anchor(spec, self.named(a, b, core))

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_choice(self.name, options, "core", ("block", "pinv"))
        check_choice(self.name, options, "residual", (False, True))


class IntTune(Nlora):
    """NLoRA's start, N alone trained."""

    name = "inttune"
    summary = "NLoRA, only N trained"
    prefix = "lora_inttune"
    fixed = frozenset(f"lora_inttune_{name}" for name in ("A", "B", "start_A", "start_B"))
