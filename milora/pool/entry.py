"""What a pool knows of one registered adapter, and what it counts over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from milora.config import MiLoRAConfig
from milora.pool.layout import Layout, Runs


class Source(Protocol):
    """Where an adapter's weights come from."""

    config: MiLoRAConfig

    def pack(self, own: Tensor | None, factors: Tensor | None) -> str | None: ...


class Factors:
    """A and Bᵀ that adapters never train, and that all adapters with the same bytes share.

    Its state belongs to the pool's `Residency`, under its lock. It has no slot: the tables' rows of
    its users name its runs, so it stays in the pool while one of them is there.

    Attributes:
        digest: of its bytes, by which it is known.
        offsets: of its runs in the pool; None = not resident.
        users: adapters that are resident or being loaded, for which it must not be evicted.
        keepers: registered adapters from memory, for which the host keeps its blob.
        is_loading: whether an adapter that is being loaded brings it.
    """

    def __init__(self, digest: str, runs: Runs) -> None:
        self.digest = digest
        self.key = ("factors", digest)  # on the host; no adapter has such a name
        self.num_bytes = runs.num_bytes
        self.offsets: list[int] | None = None
        self.users = 0
        self.keepers = 0
        self.is_loading = False
        self.last_used = 0


class Entry:
    """A registered adapter. Its state belongs to the pool's `Residency`, under its lock.

    Attributes:
        columns: per block, the columns of its experts, in the order of its router's outputs.
        num_bytes: what it alone takes in the pool, and packed in host memory.
        factors_bytes: of the factors that it needs beside that; 0 = its kind has none.
        factors: None until they are known, which takes reading the adapter.
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
        self.num_bytes = layout.own.num_bytes
        self.factors_bytes = layout.factors.num_bytes
        self.factors: Factors | None = None
        self.is_stale = False  # its file has other factors by now
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
        shared_sets: sets of factors on the device that adapters share, or that the last one left
            behind.  shared_bytes: what they take of `device_used`.  shared_saved: what copies of
            them for each resident adapter would take beside that.
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
    shared_sets: int
    shared_bytes: int
    shared_saved: int
    host_bytes: int
    host_used: int
    hits: int
    misses: int
    loads: int
    disk_reads: int
    evictions: int
    compactions: int
    failures: int
