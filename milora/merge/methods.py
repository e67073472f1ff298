"""Merging the updates of one module: what becomes of B_1 A_1 ... B_K A_K and p_1 ... p_K."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from milora.merge.lego import lego
from milora.merge.low_rank import LowRank, compress, weighted_stack

Updates = Sequence[LowRank]
Weights = Sequence[float]


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        apply: (updates, weights, rank, **options) -> the merged update.
        default_weight: of each of K adapters: "mean" is 1 / K, "one" is 1.
        takes_rank: whether a rank may be asked for.
        takes_partial: whether a module may be missing from some adapters, as an update of 0.
        options: further named settings, with their defaults.
    """

    apply: Callable[..., LowRank]
    summary: str
    default_weight: str = "mean"
    takes_rank: bool = False
    takes_partial: bool = True
    options: dict[str, object] = field(default_factory=dict)

    def weights(self, count: int) -> list[float]:
        return [1.0 if self.default_weight == "one" else 1.0 / count] * count


def stack(updates: Updates, weights: Weights, rank: int | None) -> LowRank:
    """Exact, rank Σ r_k: A = [p_1 A_1; ...], B = [B_1, ...].   [FLoRA, arXiv 2409.05976]

    FLoRA's code multiplies alpha by the number of clients to keep alpha / rank; here each
    adapter's own scale is inside its B, so scales may differ too.
    """
    return weighted_stack(updates, weights)


def exact_sum(updates: Updates, weights: Weights, rank: int | None) -> LowRank:
    """The same update as `stack` at the smallest rank that holds it."""
    return compress(weighted_stack(updates, weights))


def svd(updates: Updates, weights: Weights, rank: int | None) -> LowRank:
    """The best approximation of the weighted sum; rank None is the largest of the adapters'."""
    total = weighted_stack(updates, weights)
    return compress(total, max(update.rank for update in updates) if rank is None else rank)


def ffa(updates: Updates, weights: Weights, rank: int | None) -> LowRank:
    """Mean of the B of adapters that share one A: exact.   [FFA-LoRA, arXiv 2403.12313]

    Raises:
        ValueError: their A differ.
    """
    first = updates[0]
    if not all(torch.equal(update.a, first.a) for update in updates):
        raise ValueError(
            "ffa: the adapters must share one A (expert ffa_lora with one seed); use stack or svd"
        )
    return LowRank(first.a, sum(p * u.b for p, u in zip(weights, updates, strict=True)))


def fair(
    updates: Updates,
    weights: Weights,
    rank: int | None,
    *,
    regularization: float = 0.01,
    solver: str = "ridge",
    steps: int = 200,
) -> LowRank:
    """Means of A and B, and a residual on B towards the true mean.   [LoRA-FAIR, arXiv 2411.14961]

    With T = Σ p_k B_k A_k, Ā = Σ p_k A_k and B̄ = Σ p_k B_k the result is (B̄ + D) Ā. The solver
    "ridge" minimises ‖T - (B̄ + D) Ā‖² + λ ‖D‖² in closed form,

        D = (T - B̄ Ā) Āᵀ (Ā Āᵀ + λ I)⁻¹

    "cosine" is the paper's own objective, the dissimilarity 1 - cos(T, (B̄ + D) Ā) + λ ‖D‖, by
    `steps` of gradient descent. (The paper's step size was not seen; each step here is a
    hundredth of ‖B̄‖ along the gradient.) T is never formed: all that is needed is T Āᵀ, ‖T‖.

    Raises:
        ValueError: ranks differ, λ is negative, or there is no such solver.
    """
    if len({update.rank for update in updates}) > 1:
        raise ValueError(
            "fair: the adapters must have one rank, got "
            f"{sorted({update.rank for update in updates})}; use stack or svd"
        )
    if not regularization >= 0 or solver not in ("ridge", "cosine"):
        raise ValueError(
            "fair: regularization must be >= 0 and solver ridge or cosine, got "
            f"{regularization} and {solver!r}"
        )
    mean_a = sum(p * u.a for p, u in zip(weights, updates, strict=True))
    mean_b = sum(p * u.b for p, u in zip(weights, updates, strict=True))
    total = weighted_stack(updates, weights)
    projected = total.b @ (total.a @ mean_a.T)  # T Āᵀ [d_out, rank]
    gram = mean_a @ mean_a.T
    if solver == "cosine":
        delta = _descend(projected, gram, mean_b, total.norm(), regularization, steps)
    else:
        wanted = projected - mean_b @ gram
        damped = gram + regularization * torch.eye(len(gram), dtype=gram.dtype)
        delta = wanted @ torch.linalg.pinv(damped, hermitian=True)
    return LowRank(mean_a, mean_b + delta)


def _descend(
    projected: torch.Tensor,
    gram: torch.Tensor,
    mean_b: torch.Tensor,
    norm: float,
    regularization: float,
    steps: int,
) -> torch.Tensor:
    """The best D that gradient descent on LoRA-FAIR's objective meets, D = 0 included."""
    if norm == 0.0 or not mean_b.any():
        return torch.zeros_like(mean_b)
    delta = torch.zeros_like(mean_b, requires_grad=True)
    best, best_loss = delta.detach().clone(), float("inf")
    for step in range(steps):
        b = mean_b + delta
        inner = (b * projected).sum()
        length = (b @ gram * b).sum().clamp(min=0).sqrt().clamp(min=1e-300)
        size = (delta.square().sum() + 1e-300).sqrt()
        loss = 1 - inner / (norm * length) + regularization * size
        if loss.item() < best_loss:
            best, best_loss = delta.detach().clone(), loss.item()
        (gradient,) = torch.autograd.grad(loss, delta)
        if not (reach := gradient.norm()) > 0:
            break
        pace = 0.01 * mean_b.norm() * (1 - step / steps) / reach
        delta = (delta.detach() - pace * gradient).requires_grad_()
    return best


METHODS: dict[str, Method] = {
    "stack": Method(stack, "exact weighted sum, ranks add up (FLoRA)"),
    "sum": Method(exact_sum, "exact weighted sum at its own rank"),
    "svd": Method(svd, "weighted sum, best approximation of a rank", takes_rank=True),
    "ffa": Method(ffa, "mean of B of adapters that share A (FFA-LoRA)", takes_partial=False),
    "fair": Method(
        fair,
        "means of A and B, corrected towards the mean update (LoRA-FAIR)",
        takes_partial=False,
        options={"regularization": 0.01, "solver": "ridge", "steps": 200},
    ),
    "lego": Method(
        lego, "clusters of rank-one units (LoRA-LEGO)", default_weight="one", takes_rank=True
    ),
}
