"""The one tolerance policy of the tests.

A kernel is right if its error against the float64 reference is at most twice the error of the same
expression in plain torch at the kernel's dtype, plus a few roundings of the result. NaN and
infinities must stand at the same positions. The rule follows flash-attention's tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Roundings of the largest value that are always allowed: the kernel sums in another order.
ROUNDINGS = 8


def rounding(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def assert_as_good_as_torch(actual: Tensor, expected: Tensor, same_dtype: Tensor, name: str = ""):
    """Compare a kernel's result with the reference.

    Args:
        actual: the kernel's result.
        expected: the reference's, float64.
        same_dtype: plain torch's, at the dtype the kernel's inputs have.
    Raises: AssertionError that names the worst position.
    """
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape} is not {expected.shape}"
    if actual.numel() == 0:
        return
    got, want = actual.detach().double(), expected.detach().double()
    for kind, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        differ = test(got) != test(want)
        if differ.any():
            where = tuple(differ.nonzero()[0].tolist())
            raise AssertionError(f"{name}: {kind} at {where}: got {got[where]}, want {want[where]}")
    finite = torch.isfinite(want)
    if not finite.any():
        return
    zero = torch.zeros(())
    error = torch.where(finite, (got - want).abs(), zero)
    torch_error = torch.where(finite, (same_dtype.detach().double() - want).abs(), zero)
    scale = torch.where(finite, want.abs(), zero).max().item()
    allowed = 2 * torch_error.max().item() + ROUNDINGS * rounding(actual.dtype) * scale
    worst = error.max().item()
    if worst > allowed:
        index = int(error.argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), error.shape))
        raise AssertionError(
            f"{name}: error {worst:.3e} at {where} (got {got[where]:.9g}, want {want[where]:.9g}); "
            f"allowed {allowed:.3e} = 2 x {torch_error.max().item():.3e} of plain torch + "
            f"{ROUNDINGS} roundings"
        )
