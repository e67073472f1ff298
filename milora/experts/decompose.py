"""Matrix factors that initial values are made of: the leading singular triples, LU's first columns.

Their bits depend on the machine, so what is made of them is saved with the adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this many columns the exact decomposition takes about as long as the iteration.
_EXACT = 256
_OVERSAMPLE, _ITERATIONS = 10, 10


@torch.no_grad()
def top_svd(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, rank], S [rank], Vᵀ [rank, n] of `matrix` [m, n], largest first, in its wider dtype.

    Large matrices go through ten rounds of subspace iteration on rank + 10 random vectors
    [Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4]. Signs are canonical: the entry of
    largest magnitude in each column of U is positive. What a rank above min(m, n) asks for beyond
    it is zero.
    """
    matrix = matrix.to(_wide(matrix))
    if min(matrix.shape) > max(_EXACT, 2 * (rank + _OVERSAMPLE)):
        generator = torch.Generator("cpu").manual_seed(seed)
        size = (matrix.shape[1], rank + _OVERSAMPLE)
        start = torch.empty(size, dtype=matrix.dtype, device="cpu").normal_(generator=generator)
        basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(matrix.T @ basis).Q
            basis = torch.linalg.qr(matrix @ basis).Q
        u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    else:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).squeeze(0).sign()
    u, vt = u * signs, vt * signs[:, None]
    missing = rank - len(s)
    if missing > 0:
        pad = torch.nn.functional.pad
        u, s, vt = pad(u, (0, missing)), pad(s, (0, missing)), pad(vt, (0, 0, 0, missing))
    return u, s, vt


@torch.no_grad()
def leading_lu(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """P L_r [m, r], diag(U)_r [r] and D⁻¹ U_r [r, n] of the LU decomposition of `matrix` [m, n].

    Partial pivoting looks at the columns in order, so the first r need the first r only: the panel
    costs O(m r²) and the rows of U one triangular solve. Of the diagonal, entries below 1e-6 of
    the largest of the matrix are put up to that, lest a row of D⁻¹ U blow up; the product
    L D (D⁻¹ U) is the same. r is at most min(m, n); beyond it there are zeros.
    """
    matrix = matrix.to(_wide(matrix))
    kept = min(rank, *matrix.shape)
    permutation, lower, upper = torch.linalg.lu(matrix[:, :kept])
    rows = permutation.T[:kept] @ matrix
    rows = torch.linalg.solve_triangular(lower[:kept], rows, upper=False, unitriangular=True)
    diagonal = upper.diagonal()
    least = 1e-6 * matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny)
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(diagonal.dtype)
    diagonal = torch.where(diagonal.abs() < least, sign * least, diagonal)
    pad, missing = torch.nn.functional.pad, rank - kept
    return (
        pad(permutation @ lower, (0, missing)),
        pad(diagonal, (0, missing)),
        pad(rows / diagonal[:, None], (0, 0, 0, missing)),
    )


def _wide(matrix: Tensor) -> torch.dtype:
    return torch.float64 if matrix.dtype == torch.float64 else torch.float32
