"""Loading in the background."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque

from milora.errors import PoolError
from milora.pool.residency import Residency

_all: weakref.WeakSet[Prefetcher] = weakref.WeakSet()
_EXIT_SECONDS = 10.0


@atexit.register
def _stop_all() -> None:
    """Python ends daemon threads by unwinding them, which aborts the process inside torch's C++."""
    for prefetcher in list(_all):
        prefetcher.stop(_EXIT_SECONDS)


class Prefetcher:
    """Loads adapters one after another in a thread, which exists while there is something to do."""

    def __init__(self, residency: Residency):
        self._residency = residency
        self._names: deque[str] = deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        _all.add(self)

    def add(self, name: str) -> None:
        with self._lock:
            if name not in self._names:
                self._names.append(name)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="milora-prefetch", daemon=True
                )
                self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Forget what is waiting, and return when the load that is running has ended."""
        with self._lock:
            self._names.clear()
            thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._names:
                    self._thread = None
                    return
                name = self._names.popleft()
            try:
                self._residency.done(self._residency.use([name], lease=False), lease=False)
            except PoolError:
                pass  # no room now: whoever needs the adapter asks again, and is told then
            except Exception as error:
                with self._residency.changed:
                    entry = self._residency.entries.get(name)  # None: unregistered meanwhile
                    if entry is not None:
                        entry.error = error
