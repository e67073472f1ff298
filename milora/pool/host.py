"""Packed adapters in host memory, under a budget."""

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
    kept: bool = False  # the only copy of an adapter from memory: never dropped


class HostBlobs:
    """Blobs by adapter; the least recently used one makes room. Not thread-safe: its owner locks.

    Args:
        budget: bytes that all blobs together never exceed, those being filled included.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.used = 0
        self._blobs: OrderedDict[str, _Blob] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._blobs and self._blobs[name].data is not None

    def __len__(self) -> int:
        return len(self._blobs)

    def take(self, name: str) -> Tensor | None:
        """The blob, which stays until `release`; None if there is none."""
        if name not in self:
            return None
        self._blobs.move_to_end(name)
        blob = self._blobs[name]
        blob.users += 1
        return blob.data

    def release(self, name: str) -> None:
        """End one use of a blob; one that is gone, since filling it failed, is no error."""
        if name in self._blobs:
            self._blobs[name].users -= 1

    def reserve(self, name: str, num_bytes: int) -> bool:
        """Make room for a blob that is about to be filled, with one user. False: not just now.

        Raises:
            milora.PoolError: never, as it is larger than the budget leaves.
        """
        kept = sum(blob.num_bytes for blob in self._blobs.values() if blob.kept)
        if num_bytes > self.budget - kept:
            held = f", of which {kept:,} hold adapters registered from memory" if kept else ""
            raise PoolError(
                f"AdapterPool: adapter {name!r} needs {num_bytes:,} bytes of host memory; "
                f"host_bytes allows {self.budget:,}{held}"
            )
        droppable = [key for key, blob in self._blobs.items() if not blob.users and not blob.kept]
        free = self.budget - self.used
        if free + sum(self._blobs[key].num_bytes for key in droppable) < num_bytes:
            return False
        for key in droppable:
            if self.budget - self.used >= num_bytes:
                break
            self.drop(key)
        self._blobs[name] = _Blob(num_bytes)
        self.used += num_bytes
        return True

    def fill(self, name: str, data: Tensor, *, keep: bool = False) -> None:
        """Hand over the data of a reserved blob."""
        self._blobs[name].data = data
        self._blobs[name].kept = keep

    def clear(self) -> None:
        self._blobs.clear()
        self.used = 0

    def drop(self, name: str) -> None:
        """Forget a blob, or give up one that was reserved; none of that name is no error."""
        blob = self._blobs.pop(name, None)
        if blob is not None:
            self.used -= blob.num_bytes
