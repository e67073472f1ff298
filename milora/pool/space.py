"""Slots and bytes of the pool: who has them, who may have them, and making room.

Factors that adapters share are resident beside them: their bytes count once, and they may go when
no adapter that is resident or being loaded needs them.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable

from milora.errors import PoolError
from milora.pool.entry import Entry, Factors
from milora.pool.layout import Layout
from milora.pool.memory import PoolMemory


class Space:
    """The resident adapters. Not thread-safe: its owner locks.

    Attributes:
        resident: by name.  factors: those that are resident, by digest.
        num_copying: copies under way into runs that no table names yet.
        epoch: grows whenever an adapter's slot changes.
    """

    def __init__(self, memory: PoolMemory, num_slots: int, counts: Counter[str]):
        self.memory = memory
        self.num_slots = num_slots
        self.resident: dict[str, Entry] = {}
        self.factors: dict[str, Factors] = {}
        self.num_copying = 0
        self.epoch = 0
        self._counts = counts
        self._free_slots = list(range(num_slots))
        self._clock = itertools.count(1)

    def touch(self, entry: Entry) -> None:
        """Note that an adapter is used: of those that nobody uses, the one before makes room."""
        entry.last_used = next(self._clock)
        if entry.factors is not None:
            entry.factors.last_used = entry.last_used

    def fits(self, entries: list[Entry], others: Iterable[Entry]) -> bool:
        """Whether adapters can be resident beside the used ones of `others`; False: not just now.

        Raises:
            milora.PoolError: not as long as what is leased or pinned now remains so.
        """
        mine = {entry.name for entry in entries}
        used = {e.name: e for e in others if e.is_used and e.name not in mine}.values()
        lasting = [entry for entry in used if entry.leases or entry.is_pinned]
        for unit, budget, size in (
            ("bytes", self.memory.allocator.capacity, bytes_together),
            ("slots", self.num_slots, len),
        ):
            needed = size(entries)
            held = size([*entries, *lasting]) - needed  # factors that both need are in `needed`
            if needed > budget - held:
                who = "1 adapter needs"
                if len(entries) > 1:
                    who = f"{len(entries)} adapters together need"
                less = f" ({budget:,} less {held:,} of {len(lasting)} others in use or pinned)"
                raise PoolError(
                    f"AdapterPool: {who} {needed:,} {unit} in the pool; allowed are "
                    f"{budget - held:,}{less if lasting else ''}"
                )
            if size([*entries, *used]) > budget:
                return False
        return True

    def try_room(self, num_bytes: int, sizes: list[int]) -> tuple[int, list[int]] | None:
        """A slot and runs for an adapter that fits, and `num_copying` one higher.

        Evicts until there are bytes enough; None: compaction must bring them together.
        """
        allocator = self.memory.allocator
        while not self._free_slots or allocator.free_bytes < num_bytes:
            idle: list[Entry | Factors] = [e for e in self.resident.values() if not e.is_used]
            if self._free_slots:
                idle += [factors for factors in self.factors.values() if factors.users == 0]
            self.evict(min(idle, key=lambda it: it.last_used))
        offsets = allocator.allocate(sizes)
        if offsets is None:
            return None
        self.num_copying += 1
        return heapq.heappop(self._free_slots), offsets

    def occupy(self, entry: Entry, layout: Layout, slot: int, offsets: list[int]) -> None:
        """Show kernels an adapter whose bytes were copied, and its factors' if they were not there.

        Args:
            offsets: of its own runs, then of the factors' runs where it brings them.
        """
        own = len(layout.own.sizes)
        if entry.factors is not None and entry.factors.offsets is None:
            entry.factors.offsets = offsets[own:]
            self.factors[entry.factors.digest] = entry.factors
        entry.slot, entry.offsets, entry.layout = slot, offsets[:own], layout
        self._show(entry)
        self.resident[entry.name] = entry
        self.num_copying -= 1
        self.epoch += 1
        self._counts["loads"] += 1

    def give_back(self, slot: int, offsets: list[int]) -> None:
        """Undo `try_room`."""
        self._free(slot, offsets)
        self.num_copying -= 1

    def evict(self, entry: Entry | Factors) -> None:
        """Take out a resident adapter, or factors, that nobody uses."""
        if isinstance(entry, Factors):
            self.memory.allocator.free(entry.offsets)
            entry.offsets = None
            del self.factors[entry.digest]
            return
        if entry.factors is not None:
            entry.factors.users -= 1
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
        moved: set[Factors] = set()
        for factors in self.factors.values():
            if not places.keys().isdisjoint(factors.offsets):
                factors.offsets = [places.get(offset, offset) for offset in factors.offsets]
                moved.add(factors)
        for entry in self.resident.values():
            if entry.factors in moved or not places.keys().isdisjoint(entry.offsets):
                entry.offsets = [places.get(offset, offset) for offset in entry.offsets]
                self._show(entry)
        self.memory.copies.synchronize()
        self._counts["compactions"] += 1

    def _show(self, entry: Entry) -> None:
        factors = [] if entry.factors is None else entry.factors.offsets
        offsets = [*factors, *entry.offsets]
        entry.event = self.memory.show(entry.slot, entry.layout, offsets)

    def _free(self, slot: int, offsets: list[int]) -> None:
        self.memory.allocator.free(offsets)
        heapq.heappush(self._free_slots, slot)


def bytes_together(entries: Iterable[Entry]) -> int:
    """What adapters take in the pool, with the factors that they share counted once."""
    entries = list(entries)
    factors = {entry.factors for entry in entries if entry.factors is not None}
    return sum(entry.num_bytes for entry in entries) + sum(f.num_bytes for f in factors)
