"""The rational activation: its GELU fit, its bound, and an evaluation that never overflows."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_as_good_as_torch

from milora import rational


def both_signs(low: float, high: float, num_points: int) -> torch.Tensor:
    """A logarithmic grid, float64."""
    exponents = torch.tensor([low, high], dtype=torch.float64).log10()
    x = torch.logspace(*exponents.tolist(), num_points, dtype=torch.float64)
    return torch.cat([-x.flip(0), x])


def formula(coef: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Eq. 6 as it is written; overflows early."""
    p = sum(coef[..., j, None] * x**j for j in range(7))
    q = sum(coef[..., 6 + i, None] * x**i for i in range(1, 6))
    return p / (1 + q.abs())


COEF = torch.tensor(rational.fit(), dtype=torch.float64)
DENSE = torch.linspace(-40, 40, 80001, dtype=torch.float64)


def test_fit_follows_gelu():
    report = rational.fit_report()
    x = DENSE[DENSE.abs() <= 3]
    error = (formula(COEF, x) - torch.nn.functional.gelu(x)).abs().max().item()
    assert error <= 1e-3  # the design asks for 2e-3
    assert report.max_error == pytest.approx(error, rel=0.05)
    assert report.coefficients == rational.fit() and len(rational.fit()) == 12
    assert torch.equal(COEF.float().double(), COEF), "not exactly float32"
    rational.fit_report.cache_clear()
    assert rational.fit_report() == report


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("grid", [DENSE, both_signs(1e-6, 1e4, 50000), both_signs(1e4, 1e30, 5000)])
def test_fit_is_bounded(grid, dtype):
    assert rational.fit_report().bound_ok
    x = grid.to(dtype).requires_grad_()
    g = rational.evaluate(COEF.to(dtype), x)
    assert (g.detach().abs() <= x.detach().abs() + 1).all()
    (slope,) = torch.autograd.grad(g.sum(), x)
    assert slope.abs().max() <= 1.2


def test_the_bound_is_noticed_when_broken():
    """The unconstrained minimum's behaviour: right on [-3, 3] and far off at 30."""
    broken = COEF.clone()
    broken[6:] *= torch.tensor([1.0, 1, 1, 1, 1, 1e-3], dtype=torch.float64)
    assert not rational._measure(broken.numpy()).bound_ok


@pytest.mark.parametrize("coef", [COEF, torch.linspace(-1, 2, 12, dtype=torch.float64)])
def test_evaluate_matches_the_formula(coef):
    edges = torch.tensor([-1.0, 1.0, 0.0, 1 - 1e-7, 1 + 1e-7], dtype=torch.float64)
    x = torch.cat([DENSE, edges]).float()
    actual = rational.evaluate(coef.float(), x)
    assert actual.dtype == torch.float32
    assert_as_good_as_torch(actual, formula(coef, x.double()), formula(coef.float(), x))


def test_evaluate_far_out():
    """Against float64, where eq. 6 itself still holds at 1e30."""
    x = both_signs(1.0, 1e30, 3000).float()
    coef = COEF.float().requires_grad_()
    leaf = x.clone().requires_grad_()
    actual = rational.evaluate(coef, leaf)
    # g / |x| is of order 1; relative to g itself the zeros of g would have no digits at all
    error = (actual.detach().double() - formula(COEF, x.double())).abs() / x.abs()
    assert error.max() < 16 * torch.finfo(torch.float32).eps
    d_coef, d_x = torch.autograd.grad((actual / x.abs()).sum(), [coef, leaf])
    assert d_coef.isfinite().all() and d_x.isfinite().all()
    ends = torch.tensor([float("inf"), -float("inf"), float("nan")])
    at_ends = rational.evaluate(COEF.float(), ends)
    assert at_ends[:2].isinf().all() and at_ends[2].isnan()


def test_gradients():
    generator = torch.Generator().manual_seed(1)
    x = 4 * torch.randn(3, 20, dtype=torch.float64, generator=generator)
    coef = COEF + 0.05 * torch.randn(3, 12, dtype=torch.float64, generator=generator)
    inputs = (coef.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(rational.evaluate, inputs)


def test_rows_have_their_own_coefficients():
    x = torch.randn(2, 30, dtype=torch.float64)
    coef = torch.stack([COEF, COEF.flip(0)])
    rows = [rational.evaluate(c, row) for c, row in zip(coef, x, strict=True)]
    assert torch.equal(rational.evaluate(coef, x), torch.stack(rows))
    assert rational.evaluate(COEF, torch.tensor(0.5)).shape == ()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rational.fit("silu"), "fit: target must be 'gelu', got 'silu'"),
        (
            lambda: rational.evaluate(torch.ones(11), torch.ones(3)),
            "evaluate: coef must be [..., 12], got [11]",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
