"""How sure a difference is: paired by seed, with a sign test and a bootstrap interval."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from math import comb

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """Differences a − b over the seeds that both have.

    Args:
        mean: their mean; low, high: its 95 % bootstrap interval.
        up, down: seeds in which a is above, below.
        sign_p: two-sided sign test; with n seeds that all agree it is 2^(1 − n).
    """

    mean: float
    low: float
    high: float
    up: int
    down: int
    num_seeds: int
    sign_p: float

    @property
    def direction(self) -> int:
        """1 or -1 if every seed agrees on the sign, else 0: the two are not told apart."""
        return (self.up == self.num_seeds) - (self.down == self.num_seeds)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison:
    """Compare two methods' values by seed.

    Raises:
        ValueError: they share no seed.
    """
    seeds = sorted(set(a) & set(b))
    if not seeds:
        raise ValueError("paired: the two sides must share a seed, got none")
    differences = [a[seed] - b[seed] for seed in seeds]
    rng = random.Random(0)
    means = sorted(
        statistics.fmean(rng.choices(differences, k=len(seeds))) for _ in range(_RESAMPLES)
    )
    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Comparison(
        statistics.fmean(differences),
        means[round(0.025 * (_RESAMPLES - 1))],
        means[round(0.975 * (_RESAMPLES - 1))],
        up,
        down,
        len(seeds),
        sign_test(up, down),
    )


def sign_test(up: int, down: int) -> float:
    """Two-sided p of so uneven a split, if both signs were equally likely; ties are left out."""
    total, most = up + down, max(up, down)
    tail = sum(comb(total, k) for k in range(most, total + 1)) / 2**total
    return min(1.0, 2 * tail)


def spread(values: Mapping[int, float], form: str = ".3f") -> str:
    """Median and range over the seeds."""
    every = list(values.values())
    if len(every) == 1:
        return format(every[0], form)
    low, middle, high = min(every), statistics.median(every), max(every)
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"
