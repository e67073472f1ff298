"""torch's grouped matrix product: rows sorted by adapter, two products, an indexed add."""

from __future__ import annotations

import torch
from torch import Tensor

from peers import Peer, PeerAbsent


def grouped_mm():
    """torch 2.11 has it under a private name.

    Raises: PeerAbsent, if this torch has neither.
    """
    found = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise PeerAbsent(f"torch {torch.__version__} has no grouped_mm")
    return found


class GroupedMm(Peer):
    def __init__(self, adapter_of: Tensor, ranks: list[int], *, decode: bool):
        super().__init__(adapter_of, ranks, decode=decode)
        self.product = grouped_mm()

    def pack(self, a: list[Tensor], b: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        if a[0].dtype != torch.bfloat16:
            raise PeerAbsent(f"grouped_mm is for bfloat16, not {a[0].dtype}")
        return [(a_s.mT, b_s.mT) for a_s, b_s in zip(a, b, strict=True)]

    def prepare(self) -> None:
        """Rows without an adapter sort first and are left out."""
        sizes = torch.bincount(self.adapter_of + 1, minlength=self.num_adapters + 1)
        idle = int(sizes[0])
        self.rows = torch.argsort(self.adapter_of, stable=True)[idle:]
        self.ends = sizes[1:].cumsum(0).to(torch.int32)

    def update(self, y: Tensor, x: Tensor, weights: list[tuple[Tensor, Tensor]]) -> None:
        first, sorted_x = 0, x[self.rows]
        for a, b in weights:
            hidden = self.product(sorted_x, a, offs=self.ends)
            delta = self.product(hidden, b, offs=self.ends)
            y[:, first : first + b.shape[-1]].index_add_(0, self.rows, delta)
            first += b.shape[-1]
