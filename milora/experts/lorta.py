"""LoRTA: one tensor for all modules, in CP form.   [Hounie et al., arXiv 2410.04060]

The updates of a whole model are slices of a tensor over (input, head dimension, head, matrix,
layer). Head h of d_h outputs of matrix m in layer l is

    dW[h] = scale · B_h diag(c_head[h] ⊙ c_matrix[m] ⊙ c_layer[l]) A

with A [rank, d_in] and B_h [d_h, rank] common to all modules, a row c_head per head, one c_matrix
per kind of module, one c_layer per layer: rank · (d_in + d_h + heads + matrices + layers) numbers
for the whole model. As (A, B) of one module: A, and B the d_out / d_h copies of B_h, each with its
own diagonal. A and all c start kaiming-uniform, B_h at 0.

The authors' code takes q, k, v and o of d x d alone. Here any modules: A is common to those of one
d_in, c_head to those of one d_out, and `head_dim` must divide every d_out. Modules that share a
tensor must lie on one device; FSDP would shard it more than once and is not supported.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from milora.experts.base import (
    ExpertKind,
    ExpertSpec,
    WeightSource,
    check_positive,
    kaiming_uniform,
    zeros,
)
from milora.random import derive_seed


class Lorta(ExpertKind):
    """Options: `head_dim`, d_h; `init_scale`, on the start of the c."""

    name = "lorta"
    summary = "slices of one CP tensor"
    shares_tensors = True
    defaults: ClassVar[dict[str, Any]] = {"head_dim": 128, "init_scale": 1.0}

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        head_dim = self.option(spec, "head_dim")
        return {
            "lora_lorta_A": (spec.rank, spec.d_in),
            "lora_lorta_B": (head_dim, spec.rank),
            "lora_lorta_head": (spec.d_out // head_dim, spec.rank),
            "lora_lorta_matrix": (1, spec.rank),
            "lora_lorta_layer": (1, spec.rank),
        }

    def shared(self, spec: ExpertSpec) -> dict[str, str]:
        block, path = spec.place
        # The rank comes in since a pattern may give some modules another one.
        owners = {
            "lora_lorta_A": f"d_in {spec.d_in}",
            "lora_lorta_B": "all",
            "lora_lorta_head": f"d_out {spec.d_out}",
            "lora_lorta_matrix": f"matrix {path}",
            "lora_lorta_layer": f"layer {block}",
        }
        return {name: f"{owner}, rank {spec.rank}" for name, owner in owners.items()}

    def check(self, spec: ExpertSpec) -> None:
        super().check(spec)
        if spec.d_out % (head_dim := self.option(spec, "head_dim")):
            raise ValueError(
                f"lorta: head_dim must divide d_out, got {head_dim} on a {spec.d_in} x "
                f"{spec.d_out} module; choose another by expert_options"
            )

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_positive(self.name, options, "head_dim")
        scale = options.get("init_scale", 1.0)
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not is_number or not math.isfinite(scale) or scale <= 0:
            raise ValueError(f"lorta: init_scale must be a number above 0, got {scale!r}")

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        values = {}
        for name, shape in self.tensors(spec).items():
            seed = derive_seed(spec.seed, name)
            values[name] = zeros(*shape) if name.endswith("_B") else kaiming_uniform(*shape, seed)
            if not name.endswith(("_A", "_B")):
                values[name] *= self.option(spec, "init_scale")
        return values

    def factors(self, values: dict[str, Tensor], spec: ExpertSpec) -> tuple[Tensor, Tensor]:
        diagonals = (
            values["lora_lorta_head"] * values["lora_lorta_matrix"] * values["lora_lorta_layer"]
        )  # [heads, rank]
        b = (values["lora_lorta_B"] * diagonals[:, None, :]).flatten(0, 1)
        return values["lora_lorta_A"], b
