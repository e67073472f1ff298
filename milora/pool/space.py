"""Slots and bytes of the pool: who has them, who may have them, and making room."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable

from milora.errors import PoolError
from milora.pool.entry import Entry
from milora.pool.layout import Layout
from milora.pool.memory import PoolMemory


class Space:
    """The resident adapters. Not thread-safe: its owner locks.

    Attributes:
        resident: by name.
        num_copying: copies under way into runs that no table names yet.
        epoch: grows whenever an adapter's slot changes.
    """

    def __init__(self, memory: PoolMemory, num_slots: int, counts: Counter[str]):
        self.memory = memory
        self.num_slots = num_slots
        self.resident: dict[str, Entry] = {}
        self.num_copying = 0
        self.epoch = 0
        self._counts = counts
        self._free_slots = list(range(num_slots))
        self._clock = itertools.count(1)

    def touch(self, entry: Entry) -> None:
        """Note that an adapter is used: of those that nobody uses, the one before makes room."""
        entry.last_used = next(self._clock)

    def fits(self, entries: list[Entry], others: Iterable[Entry]) -> bool:
        """Whether adapters can be resident beside the used ones of `others`; False: not just now.

        Raises:
            milora.PoolError: not as long as what is leased or pinned now remains so.
        """
        mine = {entry.name for entry in entries}
        used = {e.name: e for e in others if e.is_used and e.name not in mine}.values()
        lasting = [entry for entry in used if entry.leases or entry.is_pinned]
        for unit, budget, size in (
            ("bytes", self.memory.allocator.capacity, lambda entry: entry.num_bytes),
            ("slots", self.num_slots, lambda entry: 1),
        ):
            needed, held = sum(map(size, entries)), sum(map(size, lasting))
            if needed > budget - held:
                who = "1 adapter needs"
                if len(entries) > 1:
                    who = f"{len(entries)} adapters together need"
                less = f" ({budget:,} less {held:,} of {len(lasting)} others in use or pinned)"
                raise PoolError(
                    f"AdapterPool: {who} {needed:,} {unit} in the pool; allowed are "
                    f"{budget - held:,}{less if lasting else ''}"
                )
            if needed > budget - sum(map(size, used)):
                return False
        return True

    def try_room(self, num_bytes: int, sizes: list[int]) -> tuple[int, list[int]] | None:
        """A slot and runs for an adapter that fits, and `num_copying` one higher.

        Evicts until there are bytes enough; None: compaction must bring them together.
        """
        allocator = self.memory.allocator
        while not self._free_slots or allocator.free_bytes < num_bytes:
            idle = (entry for entry in self.resident.values() if not entry.is_used)
            self.evict(min(idle, key=lambda entry: entry.last_used))
        offsets = allocator.allocate(sizes)
        if offsets is None:
            return None
        self.num_copying += 1
        return heapq.heappop(self._free_slots), offsets

    def occupy(self, entry: Entry, layout: Layout, slot: int, offsets: list[int]) -> None:
        """Show kernels an adapter whose bytes were copied."""
        entry.event = self.memory.show(slot, layout, offsets)
        entry.slot, entry.offsets, entry.layout = slot, offsets, layout
        self.resident[entry.name] = entry
        self.num_copying -= 1
        self.epoch += 1
        self._counts["loads"] += 1

    def give_back(self, slot: int, offsets: list[int]) -> None:
        """Undo `try_room`."""
        self._free(slot, offsets)
        self.num_copying -= 1

    def evict(self, entry: Entry) -> None:
        """Take out a resident adapter that nobody uses."""
        self.memory.hide(entry.slot)
        del self.resident[entry.name]
        self._free(entry.slot, entry.offsets)
        entry.slot, entry.offsets, entry.layout, entry.event = None, [], None, None
        self.epoch += 1
        self._counts["evictions"] += 1

    def compact(self) -> None:
        """Move all runs together, while nobody reads them and nothing is being copied."""
        places = self.memory.compact()
        if not places:
            return
        for entry in self.resident.values():
            offsets = [places.get(offset, offset) for offset in entry.offsets]
            if offsets != entry.offsets:
                entry.offsets = offsets
                entry.event = self.memory.show(entry.slot, entry.layout, offsets)
        self.memory.copies.synchronize()
        self._counts["compactions"] += 1

    def _free(self, slot: int, offsets: list[int]) -> None:
        self.memory.allocator.free(offsets)
        heapq.heappush(self._free_slots, slot)
