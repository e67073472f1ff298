"""What a pool knows of one registered adapter, and what it counts over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from milora.config import MiLoRAConfig
from milora.pool.layout import Layout


class Source(Protocol):
    """Where an adapter's weights come from."""

    config: MiLoRAConfig

    def pack(self, blob: Tensor) -> None: ...


class Entry:
    """A registered adapter. Its state belongs to the pool's `Residency`, under its lock.

    Attributes:
        columns: per block, the columns of its experts, in the order of its router's outputs.
        num_bytes: what it takes in the pool, and packed in host memory.
        source: None for an adapter from memory, whose blob is kept.
        slot: its row in the tables; None = not resident.
        leases: users that may read it.  holds: loads in progress that nobody waits to read.
    """

    def __init__(
        self, name: str, config: MiLoRAConfig, layout: Layout, source: Source | None
    ) -> None:
        self.name = name
        self.config = config
        self.columns = layout.columns
        self.num_bytes = layout.num_bytes
        self.source = source
        self.layout: Layout | None = None  # while resident
        self.slot: int | None = None
        self.offsets: list[int] = []
        self.event: Any = None  # of the copies that made it resident
        self.leases = 0
        self.holds = 0
        self.is_loading = False
        self.is_pinned = False
        self.last_used = 0
        self.error: BaseException | None = None  # of a prefetch that failed

    @property
    def is_used(self) -> bool:
        """Whether its place is spoken for: it must not be evicted."""
        return self.leases > 0 or self.holds > 0 or self.is_pinned or self.is_loading


@dataclass(frozen=True)
class PoolStats:
    """A pool's state and counters at one moment.

    Attributes:
        registered, resident, pinned, in_use: numbers of adapters.
        device_bytes: allocated on the device, tables included.  device_used: of resident adapters.
        device_free: bytes left for adapters.  largest_hole: of them in one piece.
        host_bytes: the budget.  host_used: of packed adapters in host memory, those being read
            included.
        hits, misses: adapters that an `acquire` found resident, or not.
        loads: copies into the pool.  disk_reads: adapters read from a folder.
        evictions, compactions, failures: failures are loads that raised.
    """

    registered: int
    resident: int
    pinned: int
    in_use: int
    device_bytes: int
    device_used: int
    device_free: int
    largest_hole: int
    host_bytes: int
    host_used: int
    hits: int
    misses: int
    loads: int
    disk_reads: int
    evictions: int
    compactions: int
    failures: int
