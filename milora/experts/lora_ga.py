"""LoRA-GA: LoRA whose first step follows the full gradient.   [Wang et al., arXiv 2407.05000]

With the mean gradient G ≈ U S Vᵀ of the base weight, A_0 = c V_{1..r}ᵀ, B_0 = c U_{r+1..2r} and
c = d_out^{1/4} / √gamma: the first SGD step on A and B then moves dW along the best approximation
of G of rank 2 r. That is the authors' code (direction "ArB2r", scale "stable"). PEFT's
`lora_ga_init` multiplies B by the singular values, with which this does not hold; it is not
followed.

The paper takes scale · B_0 A_0 off the base weight. Here the base stays what it is and
dW = scale · (B A - B_0 A_0) has rank 2 r; A_0 and B_0 are saved.

`milora.init_from_gradients` does this. Before it the expert starts as LoRA's: B = 0.
"""

from __future__ import annotations

from torch import Tensor

from milora.experts.base import ExpertSpec, WeightSource, kaiming_uniform, zeros
from milora.experts.chain import FactorChain
from milora.experts.decompose import top_svd


class LoraGa(FactorChain):
    """A [rank, d_in], B [d_out, rank] trainable; their start is fixed."""

    name = "lora_ga"
    summary = "B A - B0 A0 from a gradient"
    prefix = "lora_ga"
    fixed = frozenset({"lora_ga_start_A", "lora_ga_start_B"})

    def is_anchored(self, spec: ExpertSpec) -> bool:
        return True

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        a = kaiming_uniform(spec.rank, spec.d_in, spec.seed)
        return self.anchor(spec, self.named(a, zeros(spec.d_out, spec.rank)))

    def init_from_gradient(
        self, spec: ExpertSpec, gradient: Tensor, *, gamma: float = 16.0
    ) -> dict[str, Tensor]:
        """Initial values from G = dL/dW [d_out, d_in].

        Raises:
            ValueError: the module is too small for 2 · rank singular directions.
        """
        if 2 * spec.rank > min(spec.d_in, spec.d_out):
            raise ValueError(
                f"lora_ga: rank {spec.rank} takes {2 * spec.rank} singular directions, a "
                f"{spec.d_in} x {spec.d_out} module has {min(spec.d_in, spec.d_out)}"
            )
        u, _, vt = top_svd(gradient, 2 * spec.rank, spec.seed)
        c = spec.d_out**0.25 / gamma**0.5
        a, b = c * vt[: spec.rank], c * u[:, spec.rank :]
        return self.anchor(spec, self.named(a, b))
