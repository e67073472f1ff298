"""SMoRA: dW x = scale · B (r(x) ⊙ A x), each rank an expert of a token router.   [arXiv 2501.15103]

z = sigmoid(W_g x), each entry repeated `partition` times; a token uses the top_k ranks with the
largest z + b and

    r_j = rank · (z + b)_j / Σ_selected (z + b),  0 for the others

so the gates sum to the rank. The authors' code has gates that sum to top_k and a scale of
alpha / top_k: the same product, since scale here is alpha / rank. With top_k = rank and equal z it
is a LoRA. As in that code the bias b enters the gates too, and not the choice alone as in
DeepSeek's scheme that it comes from.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from milora.experts.base import ExpertSpec, WeightSource, check_positive, kaiming_uniform, zeros
from milora.experts.rank_gated import RankGated, project
from milora.random import derive_seed


class Smora(RankGated):
    """A kaiming-uniform, B zero, W_g [rank / partition, d_in] as `nn.Linear` starts: trainable.
    b [rank] zero, fixed.

    Options: `top_k`; `partition`, ranks that share a row of W_g; `bias_step`.
    """

    name = "smora"
    summary = "B (r(x) A), r from a token router"
    prefix = "lora_smora"
    fixed = frozenset({"lora_smora_bias"})
    defaults: ClassVar[dict[str, Any]] = {"top_k": 8, "partition": 1, "bias_step": 1e-5}

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        groups = spec.rank // self.option(spec, "partition")
        return {**super().tensors(spec), "lora_smora_router": (groups, spec.d_in)}

    def check(self, spec: ExpertSpec) -> None:
        super().check(spec)
        if spec.rank % (partition := self.option(spec, "partition")):
            raise ValueError(f"smora: partition must divide the rank {spec.rank}, got {partition}")

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_positive(self.name, options, "partition", most=256)

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        router = self.tensors(spec)["lora_smora_router"]
        return {
            "lora_smora_A": kaiming_uniform(spec.rank, spec.d_in, spec.seed),
            "lora_smora_B": zeros(spec.d_out, spec.rank),
            "lora_smora_bias": zeros(spec.rank),
            "lora_smora_router": kaiming_uniform(*router, derive_seed(spec.seed, "router")),
        }

    def rank_gates(self, x: Tensor, values: dict[str, Tensor], spec: ExpertSpec) -> Tensor:
        z = project(x, values["lora_smora_router"]).sigmoid()
        biased = z.repeat_interleave(self.option(spec, "partition"), dim=1)
        biased = biased + values["lora_smora_bias"].float()
        kept = biased * self.selected(biased, spec)
        return spec.rank * kept / kept.sum(dim=1, keepdim=True)
