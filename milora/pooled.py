"""The adapters of a pool, as one `generate` or one forward uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from milora.tables import BlockTables

if TYPE_CHECKING:
    from milora.pool import AdapterPool


class PoolLease:
    """Adapters that are in the pool, and stay there until `release`.

    Raises:
        milora.PoolError: the pool cannot hold them together; it is as it was.
    """

    def __init__(self, pool: AdapterPool, names: tuple[str, ...]):
        self._lease = pool.acquire(names)
        self._slots = dict(zip(names, self._lease.slots, strict=True))

    def covers(self, names: tuple[str, ...]) -> bool:
        return all(name in self._slots for name in names)

    def slots(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self._slots[name] for name in names)

    def release(self) -> None:
        self._lease.release()


class PooledWeights:
    """What `Packs` is for attached adapters; for one forward, which must `release` it.

    Args:
        lease: covers the forward's adapters.
        owned: whether the lease ends with the forward; that of a `generate` lives on.
    """

    def __init__(self, pool: AdapterPool, lease: PoolLease, owned: bool):
        self._pool = pool
        self._lease = lease
        self._owned = owned
        try:
            pool.begin_forward()  # nothing moves in the pool until the forward has ended
        except BaseException:
            if owned:
                lease.release()
            raise

    def slots(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return self._lease.slots(names)

    def dtype(self, block: int, column: int, wanted: torch.dtype) -> torch.dtype:
        return self._pool.dtypes[block][column]

    def block(self, index: int, dtype: torch.dtype) -> BlockTables:
        return self._pool.tables[index]

    def release(self) -> None:
        self._pool.end_forward()
        if self._owned:
            self._lease.release()
