"""The memory that kernels read: one pool tensor, and the tables of each block.

All of it is allocated once and changed in place, so a captured CUDA graph stays valid while
adapters come and go.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from milora._build import REBUILD
from milora.pool.copies import CpuCopies, CudaCopies
from milora.pool.layout import ALIGNMENT, Layout, Runs
from milora.tables import EXPERT_PARTS, BlockTables


class PoolMemory:
    """The pool tensor, its allocator and the tables. Not thread-safe: its owner locks.

    Args:
        num_bytes: of everything here together, never exceeded.
        widths: number of expert columns of each block.
    Raises:
        ValueError: the tables alone need more.
        ImportError: the allocator was not built for this Python.
    """

    def __init__(self, num_bytes: int, num_slots: int, widths: list[int], device: torch.device):
        self.device = device
        copies = CudaCopies if device.type == "cuda" else CpuCopies
        # offsets, rank and scale of every column; the router's offsets and codes
        column_bytes = 8 * len(EXPERT_PARTS) + 4 + 4
        self.tables_bytes = sum(num_slots * (width * column_bytes + 24 + 24) for width in widths)
        overhead = self.tables_bytes + copies.reserved + ALIGNMENT
        capacity = (num_bytes - overhead) // ALIGNMENT * ALIGNMENT
        if capacity <= 0:
            raise ValueError(
                f"AdapterPool: device_bytes must leave room beside the {overhead:,} bytes of the "
                f"tables for max_resident={num_slots} adapters, got {num_bytes:,}"
            )
        self.allocator = new_allocator(capacity)
        raw = torch.empty(capacity + ALIGNMENT, dtype=torch.uint8, device=device)
        start = -raw.data_ptr() % ALIGNMENT
        self.pool = raw[start : start + capacity]
        self.tables = [_empty_tables(self.pool, num_slots, width) for width in widths]
        self.copies = copies(self.pool)

    @property
    def num_bytes(self) -> int:
        """All that is allocated on the device."""
        return self.pool.numel() + ALIGNMENT + self.tables_bytes + self.copies.reserved

    def new_blob(self, num_bytes: int) -> Tensor:
        """Zeros in host memory, from where `write` copies."""
        pinned = self.device.type == "cuda"
        return torch.zeros(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)

    def blob_bytes(self, num_bytes: int) -> int:
        """What a blob takes: torch rounds pinned memory up to powers of two."""
        return 1 << (num_bytes - 1).bit_length() if self.device.type == "cuda" else num_bytes

    def write(self, runs: Runs, offsets: list[int], blob: Tensor) -> None:
        """Copy a blob into runs that no table names yet."""
        with self.copies.writing():
            self.copies.load(blob, zip(runs.starts, offsets, runs.sizes, strict=True))

    def show(self, slot: int, layout: Layout, offsets: list[int]) -> Any:
        """Name an adapter's runs in the rows of `slot`. Returns: the event to wait for.

        Args:
            offsets: of the layout's factors, then of its own runs.
        """
        places = torch.tensor(
            [*offsets, -1], device="cpu"
        )  # index -1 is the last: an absent run is at -1
        with self.copies.writing():
            for tables, row in zip(self.tables, layout.rows, strict=True):
                put = self.copies.put
                put(tables.offsets[slot], places[row.runs])
                put(tables.ranks[slot], row.ranks)
                put(tables.scales[slot], row.scales)
                put(tables.router_offsets[slot], places[row.router_runs])
                put(tables.router_codes[slot], row.router_codes)
            return self.copies.event()

    def hide(self, slot: int) -> None:
        """Make the rows of `slot` those of an adapter without experts."""
        with self.copies.writing():
            for tables in self.tables:
                tables.ranks[slot] = 0
                tables.scales[slot] = 0
                tables.offsets[slot] = -1
                tables.router_offsets[slot] = -1

    def free(self) -> None:
        """Let the memory go; nothing may be asked of this object any more."""
        self.copies.synchronize()
        self.tables.clear()
        del self.pool, self.copies.pool

    def compact(self) -> dict[int, int]:
        """Close the gaps between runs while nobody reads or writes. Returns: new places by old."""
        moves = self.allocator.compact()
        with self.copies.writing():
            self.copies.move(moves)
        return {old: new for old, new, _ in moves}


def new_allocator(capacity: int) -> Any:
    """The C++ allocator. Raises: ImportError, with what to do, if it was not built."""
    try:
        from milora._native import PoolAllocator
    except ImportError as error:
        raise ImportError(
            "AdapterPool needs milora's pybind11 module, which was not built for this Python "
            f"{sys.version_info.major}.{sys.version_info.minor} ({error}); {REBUILD}"
        ) from None
    return PoolAllocator(capacity, ALIGNMENT)


def _empty_tables(pool: Tensor, num_slots: int, width: int) -> BlockTables:
    def table(*shape: int, dtype: torch.dtype, fill: int = 0) -> Tensor:
        return torch.full((num_slots, *shape), fill, dtype=dtype, device=pool.device)

    return BlockTables(
        pool,
        table(width, len(EXPERT_PARTS), dtype=torch.int64, fill=-1),
        table(width, dtype=torch.int32),
        table(width, dtype=torch.float32),
        table(3, dtype=torch.int64, fill=-1),
        table(6, dtype=torch.int32),
    )
