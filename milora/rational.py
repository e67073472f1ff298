"""The router's rational activation and its GELU fit.   [MiLoRA, eq. 6; Molina et al., 1907.06732]

    g(x) = (a_0 + a_1 x + ... + a_6 x⁶) / (1 + |b_1 x + ... + b_5 x⁵|)

An unconstrained fit follows GELU on [-3, 3] but is free outside, and takes g(30) to -5188. A large
language model's residual stream has dimensions of 1e3 and more, where one such value drowns the
router and its gradient. So the fit here also keeps |g(x)| <= |x| + 1 for every x, and stays near
GELU for a while past 3. It is exact to 8e-4 on [-3, 3] and its slope never exceeds 1.2.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_COEFFICIENTS = 12  # a_0 to a_6, b_1 to b_5
_DEGREE = 6  # of the numerator; the denominator has one less

_FIT_RANGE = 3.0
_BOUND_RANGE = 1e4  # past it g is a straight line through 0, of slope ± a_6 / |b_5|
_MARGIN = 0.98  # the fit aims at |g| <= 0.98 (|x| + 1): room for rounding and between grid points
_BOUND_WEIGHT = 20.0
_TAIL_RANGE, _TAIL_WEIGHT = 8.0, 0.024
_MAX_STEPS = 200
# Values of b to start from; a follows by linear least squares. Of 200 random starts one in five
# reached the best minimum and two in five broke the bound. The first start is that minimum's b,
# rounded; the second ends in another one (1.8e-3), should the first ever fail.
_STARTS = (
    (-0.047, -0.138, -0.0207, 0.0105, -0.000928),
    (0.1, 0.1, 0.1, 0.01, 0.001),
)


@dataclass(frozen=True)
class FitReport:
    """What `fit` reached, measured on its float32 coefficients over finer grids than it used."""

    max_error: float  # max |g - target| on [-3, 3]
    bound_ok: bool  # |g(x)| <= |x| + 1 for 1e-4 <= |x| <= 1e4, and for the line beyond
    coefficients: tuple[float, ...]


def evaluate(coef: Tensor, x: Tensor) -> Tensor:
    """g(x), elementwise; differentiable in both arguments.

    Past |x| = 1 it runs in powers of u = 1 / x, so nothing overflows up to |x| = 1e30 in float32:

        g = |x| (a_6 + a_5 u + ... + a_0 u⁶) / (|u|⁵ + |b_5 + b_4 u + ... + b_1 u⁴|)

    Args:
        coef: [12] for all of x, or [num_rows, 12] for x [num_rows, d]; a_0..a_6, b_1..b_5.
        x: any shape, float.
    Returns: the shape of x, in the promoted dtype.
    Raises:
        ValueError: coef's last dimension is not 12.
    """
    if coef.shape[-1] != NUM_COEFFICIENTS:
        raise ValueError(f"evaluate: coef must be [..., 12], got {list(coef.shape)}")
    c = (coef if coef.dim() == 1 else coef.unsqueeze(-2)).unbind(-1)
    a, b = c[: _DEGREE + 1], c[_DEGREE + 1 :]
    large = x.abs() > 1
    # Each branch sees a harmless value where the other one is taken: no inf · 0 in the backward.
    small_x = torch.where(large, 0.0, x)
    u = 1.0 / torch.where(large, x, 1.0)
    inside = _horner(a, small_x) / (1.0 + (small_x * _horner(b, small_x)).abs())
    outside = x.abs() * _horner(a[::-1], u) / (u.abs().pow(5) + _horner(b[::-1], u).abs())
    return torch.where(large, outside, inside)


def fit(target: str = "gelu") -> tuple[float, ...]:
    """The 12 initial coefficients: a_0..a_6, b_1..b_5, each exactly a float32.

    Least squares on [-3, 3] by Levenberg-Marquardt from fixed starts, in float64; takes a few
    hundredths of a second, once per process. Coefficients are saved with an adapter, so a last-bit
    difference between machines does not matter.

    Raises:
        ValueError: target is not "gelu".
    """
    return fit_report(target).coefficients


@functools.lru_cache
def fit_report(target: str = "gelu") -> FitReport:
    """`fit`, with the error and the bound that it reached. Raises: as `fit`."""
    if target != "gelu":
        raise ValueError(f"fit: target must be 'gelu', got {target!r}")
    problem = _Problem()
    reports = [_measure(problem.solve(start)) for start in _STARTS]
    return min(reports, key=lambda report: (not report.bound_ok, report.max_error))


def _measure(solution: np.ndarray) -> FitReport:
    coef = torch.from_numpy(solution).float().double()
    x = np.linspace(-_FIT_RANGE, _FIT_RANGE, 6001)
    max_error = np.abs(evaluate(coef, torch.from_numpy(x)).numpy() - _gelu(x)).max()
    grid = np.concatenate([_both_signs(np.geomspace(1e-4, _BOUND_RANGE, 10000)), 10 * x])
    g = evaluate(coef, torch.from_numpy(grid)).numpy()
    # g - slope · x tends to a constant, so the bound carries on where the slope is below 1.
    slope = abs(coef[_DEGREE].item() / coef[-1].item())
    bound_ok = bool((np.abs(g) <= np.abs(grid) + 1).all()) and slope < 1
    return FitReport(float(max_error), bound_ok, tuple(coef.tolist()))


class _Problem:
    """The least-squares problem: three groups of grid points, each with its own residual.

    fit: g - gelu.  tail, 3 < |x| <= 8: (g - gelu) / (|x| + 1), lightly.  bound, 3 < |x| <= 1e4:
    the excess of |g| / (|x| + 1) over the margin.

    In numpy: its 12-column products stay on one thread, while torch's wake a thread pool for each,
    which costs seconds instead of milliseconds on a busy machine.
    """

    def __init__(self) -> None:
        near = np.linspace(-_FIT_RANGE, _FIT_RANGE, 301)
        tail = _both_signs(np.linspace(_FIT_RANGE, _TAIL_RANGE, 21))
        bound = _both_signs(np.geomspace(_FIT_RANGE, _BOUND_RANGE, 120))
        x = np.concatenate([near, tail, bound])
        limit = np.abs(x) + 1
        self.is_bound = np.arange(len(x)) >= len(near) + len(tail)
        self.target = _gelu(x)
        self.margin = _MARGIN * limit
        self.weight = np.where(self.is_bound, _BOUND_WEIGHT, _TAIL_WEIGHT) / limit
        self.weight[: len(near)] = 1.0
        # g = p·a / (one + |q·b|), numerator and denominator divided by |x|⁵ where |x| > 1, which
        # keeps all columns finite.
        divisor = np.maximum(np.abs(x), 1.0) ** 5
        powers = x[:, None] ** np.arange(_DEGREE + 1) / divisor[:, None]
        self.p, self.q, self.one = powers, powers[:, 1:_DEGREE], 1.0 / divisor

    def solve(self, b_start: tuple[float, ...]) -> np.ndarray:
        """Levenberg-Marquardt: [12]."""
        b = np.array(b_start)
        scale = ~self.is_bound * self.weight
        columns = self.p * (scale / (self.one + np.abs(self.q @ b)))[:, None]
        a = np.linalg.lstsq(columns, scale * self.target, rcond=None)[0]
        coef, damping = np.concatenate([a, b]), 1e-3
        residual, jacobian = self._linearise(coef)
        for _ in range(_MAX_STEPS):
            hessian = jacobian.T @ jacobian
            hessian += np.diag(damping * np.diag(hessian) + 1e-12)
            candidate = coef - np.linalg.solve(hessian, jacobian.T @ residual)
            new_residual, new_jacobian = self._linearise(candidate)
            ratio = (new_residual @ new_residual) / (residual @ residual)
            if ratio < 1.0:
                coef, residual, jacobian = candidate, new_residual, new_jacobian
                damping = max(damping / 3.0, 1e-12)
            else:
                damping *= 4.0
            if 1.0 - 1e-7 < ratio < 1.0 or damping > 1e9:
                break
        return coef

    def _linearise(self, coef: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The residuals [num_points] and their Jacobian [num_points, 12] at coef."""
        q = self.q @ coef[_DEGREE + 1 :]
        denominator = self.one + np.abs(q)
        g = (self.p @ coef[: _DEGREE + 1]) / denominator
        excess = np.maximum(np.abs(g) - self.margin, 0.0)
        residual = np.where(self.is_bound, excess, g - self.target) * self.weight
        outer = np.where(self.is_bound, np.sign(g) * (excess > 0), 1.0) * self.weight / denominator
        d_b = (-g * np.sign(q) * outer)[:, None] * self.q
        return residual, np.concatenate([outer[:, None] * self.p, d_b], axis=1)


def _horner(coefficients: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """coefficients[0] + coefficients[1] x + ..."""
    result = coefficients[-1] * x + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        result = result * x + coefficient
    return result


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.array([math.erf(value / math.sqrt(2.0)) for value in x]))


def _both_signs(x: np.ndarray) -> np.ndarray:
    return np.concatenate([-x[::-1], x])
