"""Which adapters are where: loading, leases, eviction, compaction.

One lock guards every decision; reading, packing and copying happen outside of it. What keeps it
free of deadlocks and of false failures:

- A call first takes its place for the whole working set, or raises. The adapters in use (leased,
  pinned, or being loaded) then never need more bytes or slots than the pool has, so that eviction
  of the others and compaction always make enough room.
- It claims all adapters that it must load in one step, and waits for claims of others while it has
  none. It waits for host memory only while it holds no blob. Nothing that holds something waits
  for anything but copies and running forwards, which end by themselves.
- Weights are read and checked before anything is evicted for them.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable

from torch import Tensor

from milora.errors import PoolError
from milora.pool.entry import Entry, PoolStats, Source
from milora.pool.gate import ForwardGate
from milora.pool.host import HostBlobs
from milora.pool.layout import Layouts
from milora.pool.memory import PoolMemory
from milora.pool.space import Space


class Residency:
    """The state machine of a pool.

    Attributes:
        entries: the registered adapters by name.  changed: the lock, and news for who waits.
    """

    def __init__(self, memory: PoolMemory, host: HostBlobs, layouts: Layouts, max_resident: int):
        self.memory = memory
        self.host = host
        self.layouts = layouts
        self.gate = ForwardGate()
        self.changed = threading.Condition()
        self.entries: dict[str, Entry] = {}
        self.is_closed = False
        self.counts: Counter[str] = Counter()
        self.space = Space(memory, max_resident, self.counts)
        self._loading: dict[str, Entry] = {}
        self._lost: deque[list[Entry]] = deque()  # of leases that nobody released

    # ---- registering ----------------------------------------------------------------------------

    def add(self, entry: Entry, source: Source | None = None) -> None:
        """Register an adapter; one with a `source` is packed now and kept in host memory.

        Raises:
            ValueError: the name is taken.
            milora.PoolError: the adapter is larger than the pool or than the host budget leaves.
        """
        with self.changed:
            self.check_open()
            if entry.name in self.entries:
                raise ValueError(f"AdapterPool: there is an adapter {entry.name!r} already")
            capacity = self.memory.allocator.capacity
            if entry.num_bytes > capacity:
                raise PoolError(
                    f"AdapterPool: adapter {entry.name!r} needs {entry.num_bytes:,} bytes in the "
                    f"pool; device_bytes leaves {capacity:,}"
                )
            self.entries[entry.name] = entry
            if source is None:
                return
            entry.is_loading = True
            self._loading[entry.name] = entry
        try:
            with self.changed:
                while not self.host.reserve(entry.name, self.memory.blob_bytes(entry.num_bytes)):
                    self.changed.wait()
            self._fill(entry, source, keep=True)
        except BaseException:
            with self.changed:
                del self.entries[entry.name]
            raise
        finally:
            with self.changed:
                self.host.release(entry.name)
                entry.is_loading = False
                del self._loading[entry.name]
                self.changed.notify_all()

    def remove(self, name: str) -> None:
        with self.changed:
            entry = self.idle(name, "unregister")
            if entry.slot is not None:
                self.space.evict(entry)
            self.host.drop(name)
            del self.entries[name]

    # ---- using adapters -----------------------------------------------------------------------

    def use(self, names: Iterable[str], *, lease: bool) -> list[Entry]:
        """Make adapters resident and keep them so until `done`. All or nothing.

        Args:
            lease: whether they will be read; otherwise they are only being loaded, and a call that
                lacks room waits for that to end.
        Raises:
            ValueError: an unknown name.
            milora.PoolError: they cannot fit beside those in use; nothing was loaded or evicted.
            whatever a source raises.
        """
        entries, missing = self._take_places(list(names), lease)
        try:
            if missing:
                self._load(missing)
        except BaseException:
            self.done(entries, lease=lease)
            raise
        return entries

    def done(self, entries: list[Entry], *, lease: bool) -> None:
        with self.changed:
            for entry in entries:
                if lease:
                    entry.leases -= 1
                else:
                    entry.holds -= 1
                self.space.touch(entry)
            self.changed.notify_all()

    def lose(self, entries: list[Entry]) -> None:
        """As `done`, from a destructor, which may run anywhere: the next call will see to it."""
        self._lost.append(entries)

    def known(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            raise ValueError(
                f"AdapterPool: no adapter {name!r} is registered; there are {len(self.entries)}"
            )
        return entry

    def check_open(self) -> None:
        if self.is_closed:
            raise PoolError("AdapterPool: this pool is closed")

    def _take_places(self, names: list[str], lease: bool) -> tuple[list[Entry], list[Entry]]:
        with self.changed:
            while True:
                self.settle()
                self.check_open()
                entries = [self.known(name) for name in names]
                missing = [entry for entry in entries if entry.slot is None]
                if not missing and not self._loading:
                    break  # every adapter in use is resident: they fit
                self._raise_prefetch_error(missing)
                others = (*self.space.resident.values(), *self._loading.values())
                fits = self.space.fits(entries, others)
                fits = fits and not any(entry.is_loading for entry in missing)
                if fits and not missing:
                    break
                if self.gate.inside:
                    raise PoolError(
                        f"AdapterPool: {', '.join(map(repr, names))} must be acquired before the "
                        "forward begins: loading may have to wait for its end"
                    )
                if fits:
                    break
                self.changed.wait()
            for entry in entries:
                entry.leases += lease
                entry.holds += not lease
                self.space.touch(entry)
            for entry in missing:
                entry.is_loading = True
                self._loading[entry.name] = entry
            if lease:
                self.counts["misses"] += len(missing)
                self.counts["hits"] += len(entries) - len(missing)
            return entries, missing

    def _raise_prefetch_error(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.error is not None:
                error, entry.error = entry.error, None
                raise error

    # ---- loading ------------------------------------------------------------------------------

    def _load(self, missing: list[Entry]) -> None:
        """Load adapters that this thread has claimed.

        All are read and checked before the first is copied, as far as host memory holds them.
        """
        staged: deque[tuple[Entry, Tensor]] = deque()
        try:
            for entry in missing:
                while (blob := self._stage(entry, may_wait=not staged)) is None:
                    self._place(*staged.popleft())
                staged.append((entry, blob))
            while staged:
                self._place(*staged.popleft())
        except BaseException:
            with self.changed:
                self.counts["failures"] += 1
            raise
        finally:
            with self.changed:
                for entry, _ in staged:
                    self.host.release(entry.name)
                for entry in missing:
                    entry.is_loading = False
                    del self._loading[entry.name]
                self.changed.notify_all()

    def _stage(self, entry: Entry, *, may_wait: bool) -> Tensor | None:
        """Its packed blob in host memory, in use until `_place`; None: no room just now."""
        with self.changed:
            while True:
                if (blob := self.host.take(entry.name)) is not None:
                    return blob
                if self.host.reserve(entry.name, self.memory.blob_bytes(entry.num_bytes)):
                    break
                if not may_wait:
                    return None
                self.changed.wait()
        return self._fill(entry, entry.source, keep=False)

    def _fill(self, entry: Entry, source: Source, *, keep: bool) -> Tensor:
        """Read and pack an adapter into the blob that was reserved for it."""
        try:
            blob = self.memory.new_blob(entry.num_bytes)
            source.pack(blob)
        except BaseException:
            with self.changed:
                self.host.drop(entry.name)
                self.changed.notify_all()
            raise
        with self.changed:
            self.host.fill(entry.name, blob, keep=keep)
            self.counts["disk_reads"] += not keep
        return blob

    def _place(self, entry: Entry, blob: Tensor) -> None:
        """Copy an adapter into the pool and show it to kernels; evicts others for it."""
        try:
            layout = self.layouts.of(entry.config)
            slot, offsets = self._make_room(entry.num_bytes, layout.sizes)
            try:
                self.memory.write(layout, offsets, blob)
            except BaseException:
                with self.changed:
                    self.space.give_back(slot, offsets)
                raise
        finally:
            with self.changed:
                self.host.release(entry.name)
                self.changed.notify_all()
        with self.changed:
            self.space.occupy(entry, layout, slot, offsets)
            entry.error = None
            self.changed.notify_all()

    def _make_room(self, num_bytes: int, sizes: list[int]) -> tuple[int, list[int]]:
        """A slot and runs; there is room, as `Space.fits` said, if need be after compaction."""
        with self.changed:
            room = self.space.try_room(num_bytes, sizes)
        if room is None:
            with self.gate.exclusive(), self.changed:
                self.changed.wait_for(lambda: self.space.num_copying == 0)
                room = self.space.try_room(num_bytes, sizes)
                if room is None:
                    self.space.compact()
                    room = self.space.try_room(num_bytes, sizes)
        return room

    # ---- the whole pool -----------------------------------------------------------------------

    def compact(self) -> None:
        """Move the runs of all adapters together, while no forward runs."""
        with self.gate.exclusive(), self.changed:
            self.check_open()
            self.changed.wait_for(lambda: self.space.num_copying == 0)
            self.space.compact()

    def settle(self) -> None:
        """Count the leases that were dropped without `release`; under the lock."""
        while self._lost:
            self.done(self._lost.popleft(), lease=True)

    def idle(self, name: str, action: str) -> Entry:
        """An adapter that nobody uses, waiting for a load of it to end; under the lock.

        Raises:
            milora.PoolError: it is in use, or pinned.
        """
        self.settle()
        while True:
            self.check_open()
            entry = self.known(name)
            if entry.leases or entry.is_pinned:
                why = "in use" if entry.leases else "pinned"
                raise PoolError(f"AdapterPool.{action}: adapter {name!r} is {why}")
            if not entry.is_used:
                return entry
            self.changed.wait()

    def close(self, stop_prefetching: Callable[[], None]) -> bool:
        """Give the memory back once running loads and forwards have ended; False: it was closed."""
        if self.gate.inside:
            raise PoolError(
                "AdapterPool.close: this thread is inside a forward that reads the pool"
            )
        with self.changed:
            if self.is_closed:
                return False
            self.is_closed = True
            self.changed.notify_all()
        stop_prefetching()
        with self.changed:
            self.changed.wait_for(lambda: not self._loading)
        with self.gate.exclusive(), self.changed:
            self.entries.clear()
            self.space.resident.clear()
            self.host.clear()
            self.memory.free()
        return True

    def stats(self) -> PoolStats:
        with self.changed:
            self.settle()
            allocator = self.memory.allocator
            return PoolStats(
                registered=len(self.entries),
                resident=len(self.space.resident),
                pinned=sum(entry.is_pinned for entry in self.space.resident.values()),
                in_use=sum(entry.leases > 0 for entry in self.space.resident.values()),
                device_bytes=self.memory.num_bytes,
                device_used=allocator.used,
                device_free=allocator.free_bytes,
                largest_hole=allocator.largest_hole,
                host_bytes=self.host.budget,
                host_used=self.host.used,
                **{name: self.counts[name] for name in _COUNTED},
            )


_COUNTED = ("hits", "misses", "loads", "disk_reads", "evictions", "compactions", "failures")
