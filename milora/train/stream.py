"""An endless, shuffled stream of micro-batches whose place is one number.

A step on an activation batch follows each step on a training batch, so the stream may not depend
on epochs of the training data, and after a resume it must go on where it stopped without reading
what came before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class BatchStream:
    """Micro-batches of a dataset, shuffled anew in each pass, split over data-parallel ranks.

    Args:
        dataset: anything with `len` and integer indexing.
        collate: makes one batch of a list of items.
        batch_size: items of one micro-batch on one rank.
        seed: of the shuffles; the same on all ranks.
        rank, world_size: this process among the data-parallel ones.

    Attributes:
        position: micro-batches taken so far by each rank; set it to move in the stream.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        collate: Callable[[list[Any]], dict[str, Any]],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        if len(dataset) == 0:
            raise ValueError("BatchStream: dataset must not be empty")
        self.dataset = dataset
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self._epoch: int | None = None
        self._order: list[int] = []

    def take(self, num_batches: int) -> list[dict[str, Any]]:
        """The next `num_batches` micro-batches of this rank."""
        return [self._next() for _ in range(num_batches)]

    def _next(self) -> dict[str, Any]:
        first = (self.position * self.world_size + self.rank) * self.batch_size
        items = [self.dataset[self._index(first + i)] for i in range(self.batch_size)]
        self.position += 1
        return self.collate(items)

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.dataset))
        if epoch != self._epoch:
            # A generator of its own: the global one belongs to the training data and to dropout.
            generator = torch.Generator().manual_seed((self.seed + epoch) % (1 << 63))
            self._order = torch.randperm(len(self.dataset), generator=generator).tolist()
            self._epoch = epoch
        return self._order[offset]
