"""An update dW = B A kept as its factors: its norm, its best approximation, sums. In float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """dW = B A with the scale inside B.  a: [rank, d_in].  b: [d_out, rank].  Both float64."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def norm(self) -> float:
        """Frobenius norm, without forming dW or losing half the digits in a Gram matrix."""
        _, left = torch.linalg.qr(self.b)
        _, right = torch.linalg.qr(self.a.T)
        return torch.linalg.matrix_norm(left @ right.T).item()


def weighted_stack(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ p_k B_k A_k, exactly: A = [p_1 A_1; ...], B = [B_1, ...], rank Σ r_k."""
    scaled = [weight * update.a for update, weight in zip(updates, weights, strict=True)]
    return LowRank(torch.cat(scaled), torch.cat([update.b for update in updates], dim=1))


def compress(update: LowRank, rank: int | None = None) -> LowRank:
    """The best approximation of rank `rank` [Eckart and Young, 1936]; None: all but rounding.

    A = √S Vᵀ and B = U √S, so both sides weigh alike in a narrower dtype.
    """
    left, left_r = torch.linalg.qr(update.b)
    right, right_r = torch.linalg.qr(update.a.T)
    u, s, vt = torch.linalg.svd(left_r @ right_r.T)
    if rank is None:
        # Relative to the factors: in a sum that cancels, what is left is rounding.
        size = torch.linalg.matrix_norm(left_r) * torch.linalg.matrix_norm(right_r)
        eps = torch.finfo(s.dtype).eps * max(update.a.shape[1], update.b.shape[0])
        rank = max(1, int((s > eps * size).sum()))
    root = s[:rank].sqrt()
    return LowRank(root[:, None] * (vt[:rank] @ right.T), left @ u[:, :rank] * root)


def distance(update: LowRank, other: LowRank) -> float:
    """‖dW - dW'‖, Frobenius."""
    return weighted_stack([update, other], [1.0, -1.0]).norm()
