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

Factors that adapters share are known by the digest of their bytes. The first use of an adapter
reads it for that, before any place is taken: what a working set needs is then exact. The adapter
that finds its factors absent claims and brings them, which means reading it again, and all that
need them wait for it. Each reading is compared with the digest, so a wrong or changed file never
gets, nor becomes, the factors of others.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable

from torch import Tensor

from milora.errors import AdapterError, PoolError
from milora.pool.entry import Entry, Factors, PoolStats, Source
from milora.pool.gate import ForwardGate
from milora.pool.host import HostBlobs, Key
from milora.pool.layout import Layouts
from milora.pool.memory import PoolMemory
from milora.pool.space import Space

# What a thread loads: an adapter, and the factors that it brings because they were absent.
Claim = tuple[Entry, Factors | None]
Blobs = dict[Key, Tensor]


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
        # By digest, as long as a registered adapter has them or they are resident.
        self._factors: weakref.WeakValueDictionary[str, Factors] = weakref.WeakValueDictionary()
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
            if (needed := entry.num_bytes + entry.factors_bytes) > capacity:
                raise PoolError(
                    f"AdapterPool: adapter {entry.name!r} needs {needed:,} bytes in the pool; "
                    f"device_bytes leaves {capacity:,}"
                )
            self.entries[entry.name] = entry
            if source is None:
                return
            entry.is_loading = True
            self._loading[entry.name] = entry
        claim: Claim = (entry, None)
        try:
            self._identify(entry, source)
            if (factors := entry.factors) is not None:
                with self.changed:
                    self.changed.wait_for(lambda: not factors.is_loading)
                    factors.is_loading = True
                claim = (entry, factors)
            self._stage(claim, source, may_wait=True)
            with self.changed:
                self.host.keep(entry.name, True)
                if factors is not None:
                    self.host.keep(factors.key, True)
                    factors.keepers += 1
                self._unstage(claim)
        except BaseException:
            with self.changed:
                del self.entries[entry.name]
                self.host.drop(entry.name)
            raise
        finally:
            with self.changed:
                self._end_claim(claim)
                self.changed.notify_all()

    def remove(self, name: str) -> None:
        with self.changed:
            entry = self.idle(name, "unregister")
            if entry.slot is not None:
                self.space.evict(entry)
            self.host.drop(name)
            del self.entries[name]
            factors = entry.factors
            if entry.source is None and factors is not None:
                factors.keepers -= 1
                self.host.keep(factors.key, factors.keepers > 0)

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
        names = list(names)
        while (taken := self._take_places(names, lease)) is None:
            self._identify_all(names)
        entries, missing = taken
        try:
            if missing:
                self._load(missing)
        except BaseException:
            self.done(entries, lease=lease)
            raise
        return entries

    def _identify_all(self, names: list[str]) -> None:
        """Learn which factors adapters need; one at a time, each claimed as for loading."""
        for name in names:
            with self.changed:
                while is_unknown(entry := self.known(name)) and entry.is_loading:
                    self.changed.wait()
                    self.check_open()
                if not is_unknown(entry):
                    continue
                entry.is_loading = True
                self._loading[name] = entry
            try:
                self._identify(entry, entry.source)
            except BaseException:
                with self.changed:
                    self.counts["failures"] += 1
                raise
            finally:
                with self.changed:
                    self._end_claim((entry, None))
                    self.changed.notify_all()

    def _identify(self, entry: Entry, source: Source) -> None:
        """Learn which factors a claimed adapter needs, if its kind has any, by reading it. What it
        has beside them stays in host memory where there is room: with luck nothing is read again.
        """
        if not entry.factors_bytes:
            return
        key = entry.name
        with self.changed:
            try:
                room = self.host.claim(key, {key: self.memory.blob_bytes(entry.num_bytes)})
            except PoolError:  # said when it is loaded
                room = None
        is_absent = room is not None and room[key] is None
        try:
            blob = self.memory.new_blob(entry.num_bytes) if is_absent else None
            digest = source.pack(blob, None)
        except BaseException:
            with self.changed:
                if room is not None:
                    self.host.release(key)
                if is_absent:
                    self.host.drop(key)
            raise
        with self.changed:
            if blob is not None:
                self.host.fill(key, blob)
            if room is not None:
                self.host.release(key)
            self.counts["disk_reads"] += source is entry.source
            factors = self._factors.get(digest)
            if factors is None:
                runs = self.layouts.of(entry.config).factors
                factors = self._factors[digest] = Factors(digest, runs)
            entry.factors = factors

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

    def _take_places(self, names: list[str], lease: bool) -> tuple[list[Entry], list[Claim]] | None:
        """The adapters, and what of them this thread must load; None: identify them first."""
        with self.changed:
            while True:
                self.settle()
                self.check_open()
                entries = [self.known(name) for name in names]
                missing = [entry for entry in entries if entry.slot is None]
                if not missing and not self._loading:
                    break  # every adapter in use is resident: they fit
                self._raise_prefetch_error(missing)
                if any(map(is_unknown, missing)) and not self.gate.inside:
                    return None
                others = (*self.space.resident.values(), *self._loading.values())
                fits = self.space.fits(entries, others)
                fits = fits and not any(
                    entry.is_loading or (entry.factors is not None and entry.factors.is_loading)
                    for entry in missing
                )
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
            claimed: list[Claim] = []
            for entry in missing:
                entry.is_loading = True
                self._loading[entry.name] = entry
                brings = None
                if (factors := entry.factors) is not None:
                    factors.users += 1
                    if factors.offsets is None and not factors.is_loading:
                        factors.is_loading = True
                        brings = factors
                claimed.append((entry, brings))
            if lease:
                self.counts["misses"] += len(missing)
                self.counts["hits"] += len(entries) - len(missing)
            return entries, claimed

    def _raise_prefetch_error(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.error is not None:
                error, entry.error = entry.error, None
                raise error

    # ---- loading ------------------------------------------------------------------------------

    def _load(self, missing: list[Claim]) -> None:
        """Load what this thread has claimed.

        All is read and checked before the first is copied, as far as host memory holds it.
        """
        staged: deque[tuple[Claim, Blobs]] = deque()
        try:
            for claim in missing:
                source = claim[0].source
                while (blobs := self._stage(claim, source, may_wait=not staged)) is None:
                    self._place(*staged.popleft())
                staged.append((claim, blobs))
            while staged:
                self._place(*staged.popleft())
        except BaseException:
            with self.changed:
                self.counts["failures"] += 1
            raise
        finally:
            with self.changed:
                for claim, _ in staged:
                    self._unstage(claim)
                for claim in missing:
                    entry = claim[0]
                    if entry.slot is None and entry.factors is not None:
                        entry.factors.users -= 1
                    if entry.is_stale:
                        entry.factors, entry.is_stale = None, False
                    self._end_claim(claim)
                self.changed.notify_all()

    def _end_claim(self, claim: Claim) -> None:
        entry, brought = claim
        entry.is_loading = False
        del self._loading[entry.name]
        if brought is not None:
            brought.is_loading = False

    def _stage(self, claim: Claim, source: Source | None, *, may_wait: bool) -> Blobs | None:
        """Packed blobs in host memory, in use until `_unstage`; None: no room just now."""
        entry, brought = claim
        sizes: dict[Key, int] = {entry.name: entry.num_bytes}
        if brought is not None:
            sizes[brought.key] = brought.num_bytes
        taking = {key: self.memory.blob_bytes(size) for key, size in sizes.items()}
        with self.changed:
            while (found := self.host.claim(entry.name, taking)) is None:
                if not may_wait:
                    return None
                self.changed.wait()
        if absent := [key for key, blob in found.items() if blob is None]:
            found |= self._fill(claim, source, {key: sizes[key] for key in absent})
        return found

    def _unstage(self, claim: Claim) -> None:
        entry, brought = claim
        self.host.release(entry.name)
        if brought is not None:
            self.host.release(brought.key)

    def _fill(self, claim: Claim, source: Source, sizes: dict[Key, int]) -> Blobs:
        """Read and pack an adapter into the blobs that were reserved for it."""
        entry, brought = claim
        try:
            blobs: Blobs = {key: self.memory.new_blob(size) for key, size in sizes.items()}
            digest = source.pack(
                blobs.get(entry.name), None if brought is None else blobs.get(brought.key)
            )
            if entry.factors is not None and digest != entry.factors.digest:
                entry.is_stale = True
                raise AdapterError(
                    f"AdapterPool: adapter {entry.name!r}: its fixed factors are not those that it "
                    "had when it was last read; load it again"
                )
        except BaseException:
            with self.changed:
                self._unstage(claim)
                for key in sizes:
                    self.host.drop(key)
                if entry.is_stale:  # what lay there goes with the factors that it had
                    self.host.drop(entry.name)
                self.changed.notify_all()
            raise
        with self.changed:
            for key, blob in blobs.items():
                self.host.fill(key, blob)
            self.counts["disk_reads"] += source is entry.source
        return blobs

    def _place(self, claim: Claim, blobs: Blobs) -> None:
        """Copy an adapter into the pool and show it to kernels; evicts others for it."""
        entry, brought = claim
        try:
            layout = self.layouts.of(entry.config)
            parts = [(layout.own, blobs[entry.name])]
            if brought is not None:
                parts.append((layout.factors, blobs[brought.key]))
            sizes = [size for runs, _ in parts for size in runs.sizes]
            slot, offsets = self._make_room(sum(sizes), sizes)
            try:
                places = iter(offsets)
                for runs, blob in parts:
                    self.memory.write(runs, [next(places) for _ in runs.sizes], blob)
            except BaseException:
                with self.changed:
                    self.space.give_back(slot, offsets)
                raise
        finally:
            with self.changed:
                self._unstage(claim)
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
            self.space.factors.clear()
            self.host.clear()
            self.memory.free()
        return True

    def stats(self) -> PoolStats:
        with self.changed:
            self.settle()
            allocator = self.memory.allocator
            shared = self.space.factors.values()
            users = [e.factors for e in self.space.resident.values() if e.factors is not None]
            return PoolStats(
                registered=len(self.entries),
                resident=len(self.space.resident),
                pinned=sum(entry.is_pinned for entry in self.space.resident.values()),
                in_use=sum(entry.leases > 0 for entry in self.space.resident.values()),
                device_bytes=self.memory.num_bytes,
                device_used=allocator.used,
                device_free=allocator.free_bytes,
                largest_hole=allocator.largest_hole,
                shared_sets=len(shared),
                shared_bytes=sum(factors.num_bytes for factors in shared),
                shared_saved=sum(f.num_bytes for f in users) - sum(f.num_bytes for f in set(users)),
                host_bytes=self.host.budget,
                host_used=self.host.used,
                **{name: self.counts[name] for name in _COUNTED},
            )


def is_unknown(entry: Entry) -> bool:
    """Whether an adapter must be read before it is known which factors it needs."""
    return entry.factors_bytes > 0 and entry.factors is None and entry.source is not None


_COUNTED = ("hits", "misses", "loads", "disk_reads", "evictions", "compactions", "failures")
