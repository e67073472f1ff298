"""LoRA-LEGO: cluster the rank-one units of several adapters.   [Zhao et al., arXiv 2409.16167]

A unit is a row a_j of A and the column b_j of B. k-means over the vectors (a_j, b_j) of all
adapters, whatever their ranks, gives k units: each is its cluster's mean, rescaled to the mean norm
of the cluster's members. Two freedoms of a factorisation would hide equal units from each other,
and are taken out first: |a_j| = |b_j|, and the entry of a_j of largest magnitude is positive.

Source of this file: the abstract and the reviews, not the paper's text. Its second reweighting, of
the output's variance, was not seen and is not done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from milora.merge.low_rank import LowRank

_ROUNDS = 100


def lego(updates: Sequence[LowRank], weights: Sequence[float], rank: int | None) -> LowRank:
    """`rank` units; None: the largest rank of the adapters. As many as there are: the exact sum.

    The result does not depend on the order of the adapters (but for exact ties): k-means starts
    from the longest unit and then from the one that is farthest from those chosen, without chance.
    """
    d_in = updates[0].a.shape[1]
    rank = max(update.rank for update in updates) if rank is None else rank
    units = torch.cat(
        [_units(update, weight) for update, weight in zip(updates, weights, strict=True)]
    )
    units = units[units.norm(dim=1) > 0]
    if len(units) > rank:
        units = _centroids(units[_order(units)], rank)
    elif len(units) == 0:
        units = torch.zeros(1, d_in + updates[0].b.shape[0], dtype=torch.float64)
    return LowRank(units[:, :d_in].contiguous(), units[:, d_in:].T.contiguous())


def _units(update: LowRank, weight: float) -> Tensor:
    """[rank, d_in + d_out], balanced, signs canonical, the weight's root on either side."""
    a, b = update.a, weight * update.b.T
    norm_a, norm_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    tiny = torch.finfo(a.dtype).tiny
    root = (norm_a * norm_b).sqrt()
    sign = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
    a, b = a / norm_a.clamp(min=tiny), b / norm_b.clamp(min=tiny)
    return torch.cat([a, b], 1) * sign * root


def _order(units: Tensor) -> Tensor:
    """Indices that put units in an order of their own: by length, ties by their entries."""
    keys = [units.norm(dim=1), *units[:, : min(4, units.shape[1])].T]
    order = torch.arange(len(units))
    for key in reversed(keys):
        order = order[torch.sort(key[order], descending=True, stable=True).indices]
    return order


def _centroids(units: Tensor, count: int) -> Tensor:
    """Cluster means, rescaled to the mean norm of their members."""
    means = units[_far_apart(units, count)]
    assigned = None
    for _ in range(_ROUNDS):
        nearest = _distances(units, means).argmin(1)
        # Numbered anew: where equal units are fewer than clusters some are empty, and go.
        nearest = nearest.unique(return_inverse=True)[1]
        if assigned is not None and torch.equal(nearest, assigned):
            break
        assigned = nearest
        members = [units[assigned == cluster] for cluster in range(int(assigned.max()) + 1)]
        means = torch.stack([cluster.mean(0) for cluster in members])
    norms = torch.stack([c.norm(dim=1).mean() for c in members])
    lengths = means.norm(dim=1)
    return means * (norms / lengths.clamp(min=torch.finfo(means.dtype).tiny))[:, None]


def _far_apart(units: Tensor, count: int) -> list[int]:
    chosen = [0]
    nearest = _distances(units, units[:1]).squeeze(1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        distance = _distances(units, units[chosen[-1]][None]).squeeze(1)
        nearest = torch.minimum(nearest, distance)
    return chosen


def _distances(units: Tensor, means: Tensor) -> Tensor:
    # The other modes go through scalar products, which cannot tell nearly equal units apart.
    return torch.cdist(units, means, compute_mode="donot_use_mm_for_euclid_dist")
