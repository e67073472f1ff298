"""Packed adapters, and factors that they share, in host memory under a budget."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from milora.errors import PoolError


@dataclass
class _Blob:
    num_bytes: int
    data: Tensor | None = None  # None while it is being filled
    users: int = 1
    kept: bool = False  # the only copy, of an adapter from memory: never dropped


Key = str | tuple[str, str]  # an adapter's name, or the key of `Factors`


class HostBlobs:
    """Blobs by key; the least recently used one makes room. Not thread-safe: its owner locks.

    Args:
        budget: bytes that all blobs together never exceed, those being filled included.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.used = 0
        self._blobs: OrderedDict[Key, _Blob] = OrderedDict()

    def __contains__(self, name: Key) -> bool:
        return name in self._blobs and self._blobs[name].data is not None

    def __len__(self) -> int:
        return len(self._blobs)

    def claim(self, name: str, sizes: dict[Key, int]) -> dict[Key, Tensor | None] | None:
        """Blobs that stay until `release`: each that is there, and None for each that the caller
        must `fill`, or `drop`. None for all: there is no room just now.

        Args:
            name: of the adapter that they belong to.
            sizes: of the blobs, whose claimants take turns: none is being filled by another.
        Raises:
            milora.PoolError: never, as they are larger than the budget leaves.
        """
        kept = {key: blob.num_bytes for key, blob in self._blobs.items() if blob.kept}
        needed = sum(size for key, size in sizes.items() if key not in kept)
        if needed > self.budget - sum(kept.values()):
            held = f", of which {sum(kept.values()):,} hold adapters registered from memory"
            raise PoolError(
                f"AdapterPool: adapter {name!r} needs {needed:,} bytes of host memory; "
                f"host_bytes allows {self.budget:,}{held if kept else ''}"
            )
        missing = sum(size for key, size in sizes.items() if key not in self)
        droppable = [
            key
            for key, blob in self._blobs.items()
            if not (blob.users or blob.kept or key in sizes)
        ]
        free = self.budget - self.used
        if free + sum(self._blobs[key].num_bytes for key in droppable) < missing:
            return None
        for key in droppable:
            if self.budget - self.used >= missing:
                break
            self.drop(key)
        for key, size in sizes.items():
            if key in self:
                self._blobs.move_to_end(key)
                self._blobs[key].users += 1
            else:
                self._blobs[key] = _Blob(size)
                self.used += size
        return {key: self._blobs[key].data for key in sizes}

    def release(self, name: Key) -> None:
        """End one use of a blob; one that is gone, since filling it failed, is no error."""
        if name in self._blobs:
            self._blobs[name].users -= 1

    def fill(self, name: Key, data: Tensor) -> None:
        """Hand over the data of a reserved blob."""
        self._blobs[name].data = data

    def keep(self, name: Key, kept: bool) -> None:
        """Whether a blob that is there must never be dropped for others."""
        self._blobs[name].kept = kept

    def clear(self) -> None:
        self._blobs.clear()
        self.used = 0

    def drop(self, name: Key) -> None:
        """Forget a blob, or give up one that was reserved; none of that name is no error."""
        blob = self._blobs.pop(name, None)
        if blob is not None:
            self.used -= blob.num_bytes
