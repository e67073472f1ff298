"""LoRA-SB: LoRA-XS's form, started from a gradient.   [Ponkshe et al., arXiv 2411.19557]

With G the gradient of the base weight, summed over a few batches, T = -eta · sign(G) is the first
step that AdamW would take on W itself. Its truncated SVD T ≈ U_r S_r V_rᵀ gives B = U_r, A = V_rᵀ
(orthonormal, fixed) and R = S_r / scale (trained), so that dW starts as the best approximation of
that step of rank r, and not at 0. With BᵀB = A Aᵀ = I a gradient step on R moves dW by the
projection of the full gradient, without the usual correction.

`milora.init_from_gradients` does this. Before it, A and B are the leading singular vectors of the
base weight and R is 0. The base weight is not compensated for dW. Adapters started from one
gradient have A and B in common, which an `AdapterPool` then keeps once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from milora.experts.base import ExpertSpec, WeightSource, zeros
from milora.experts.chain import FactorChain
from milora.experts.decompose import top_svd


class LoraSb(FactorChain):
    """R [rank, rank] trainable; A [rank, d_in] and B [d_out, rank] fixed, orthonormal."""

    name = "lora_sb"
    summary = "B R A of a gradient, R trained"
    prefix = "lora_sb"
    core = "square"
    fixed = frozenset({"lora_sb_A", "lora_sb_B"})

    def init(self, spec: ExpertSpec, weight: WeightSource | None = None) -> dict[str, Tensor]:
        u, _, vt = top_svd(self.base_weight(spec, weight), spec.rank)
        return self.named(vt, u, zeros(spec.rank, spec.rank))

    def init_from_gradient(
        self, spec: ExpertSpec, gradient: Tensor, *, step: float = 1e-3
    ) -> dict[str, Tensor]:
        """Initial values from G = dL/dW [d_out, d_in]; `step` is eta."""
        u, s, vt = top_svd(-step * gradient.sign(), spec.rank)
        return self.named(vt, u, torch.diag(s) / spec.scale)
