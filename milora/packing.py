"""The packed form of an expert, which inference kernels read: byte runs with rows on 16 bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from milora.experts import ExpertWeights

ROW_BYTES = 16  # rows in a pool start at multiples of this: one vector load


def row_bytes(length: int, dtype: torch.dtype) -> int:
    """Bytes of a row of `length` elements, with its padding."""
    return -(-length * dtype.itemsize // ROW_BYTES) * ROW_BYTES


def padded_rows(rows: Tensor) -> Tensor:
    """[num_rows * row_bytes] uint8: the rows of a [num_rows, length] or [length] tensor, padded."""
    data = rows.detach().contiguous().view(torch.uint8)
    if missing := -data.shape[-1] % ROW_BYTES:
        data = nn.functional.pad(data, (0, missing))
    return data.flatten()


def expert_runs(
    expert: ExpertWeights, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """The byte runs of an expert as `ExpertKind.served` gives it, by `milora.tables.EXPERT_PARTS`.

    A [rank, d_in], Bᵀ [rank, d_out] and the core [rank, rank] are in `dtype`, u and v [d_out] in
    float32. None for what the expert has not: u = c - 1 and v = -u ⊙ bias are there only with an
    output vector (DoRA).
    """
    u = v = core = None
    if expert.output is not None:
        output = expert.output.float()
        u = padded_rows(output)
        v = padded_rows(-output * (0.0 if bias is None else bias.float()))
    if expert.core is not None:
        core = padded_rows(expert.core.to(dtype))
    return padded_rows(expert.a.to(dtype)), padded_rows(expert.b.T.to(dtype)), u, v, core
