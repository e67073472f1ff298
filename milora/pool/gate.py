"""A lock with two sides: forwards, which share it, and whoever moves bytes of adapters in use."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from milora.errors import PoolError


class ForwardGate:
    """Many forwards at a time, or one mover. A mover that waits holds back new forwards, so that a
    stream of forwards cannot starve it; a thread inside a forward may begin another one inside.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._running = 0  # threads inside a forward
        self._movers = 0  # waiting, or at work
        self._moving = False
        self._local = threading.local()

    @property
    def inside(self) -> bool:
        """Whether this thread is inside a forward."""
        return getattr(self._local, "depth", 0) > 0

    def begin(self) -> None:
        depth = getattr(self._local, "depth", 0)
        if depth == 0:
            with self._changed:
                while self._movers:
                    self._changed.wait()
                self._running += 1
        self._local.depth = depth + 1

    def end(self) -> None:
        depth = getattr(self._local, "depth", 0)
        if depth == 0:
            raise RuntimeError("AdapterPool.end_forward: this thread is not inside a forward")
        self._local.depth = depth - 1
        if depth == 1:
            with self._changed:
                self._running -= 1
                if self._movers:
                    self._changed.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Alone inside. Raises: PoolError if this thread is inside a forward, which would wait for
        itself."""
        if self.inside:
            raise PoolError(
                "AdapterPool: bytes of adapters cannot be moved from inside a forward, which reads "
                "them"
            )
        with self._changed:
            self._movers += 1
            try:
                while self._running or self._moving:
                    self._changed.wait()
                self._moving = True
            except BaseException:
                self._movers -= 1
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._moving = False
                self._movers -= 1
                self._changed.notify_all()
