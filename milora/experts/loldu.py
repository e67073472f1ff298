"""LoLDU: dW = scale · P L_r diag(z - z_0) U_r.   [Shi et al., arXiv 2410.13618]

With W = P L D U (L and U of unit diagonal) the paper trains z, which starts as z_0 = diag(D)_r, and
takes scale · P L_r diag(z_0) U_r off the base weight. Here the base stays what it is, and z - z_0
is what is trained and saved: the same function, and one base serves all adapters.

Against the authors' code, z starts at z_0 alone (its other starts change the model) and scale is no
parameter: it would only rescale z.
"""

from __future__ import annotations

from torch import Tensor

from milora.experts.base import ExpertSpec, WeightSource, zeros
from milora.experts.chain import FactorChain
from milora.experts.decompose import leading_lu


class Loldu(FactorChain):
    """z - z_0 [rank] trainable; A = U_r and B = P L_r fixed."""

    name = "loldu"
    summary = "B diag(z) A of W's LU, z trained"
    prefix = "lora_loldu"
    core = "diagonal"
    fixed = frozenset({"lora_loldu_A", "lora_loldu_B"})

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        lower, _, upper = leading_lu(self.base_weight(spec, weight), spec.rank)
        return self.named(upper, lower, zeros(spec.rank))
