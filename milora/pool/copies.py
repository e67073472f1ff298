"""Copying into the pool, and inside it, in step with the kernels that read it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Pieces = Iterable[tuple[int, int, int]]  # (from, to, size)


class CpuCopies:
    """On the CPU a copy is done when the call returns, and so is a forward's reading."""

    reserved = 0  # bytes of the device budget that copying needs for itself

    def __init__(self, pool: Tensor):
        self.pool = pool

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around every change of the pool and the tables."""
        yield

    def load(self, blob: Tensor, pieces: Pieces) -> None:
        """Copy pieces of a blob into the pool."""
        for start, offset, size in joined(pieces):
            self.pool[offset : offset + size].copy_(blob[start : start + size])

    def put(self, target: Tensor, value: Tensor) -> None:
        """Copy a small host tensor into a table."""
        target.copy_(value)

    def move(self, moves: Pieces) -> None:
        """Copy pieces of the pool to lower places, in ascending order; the two may overlap."""
        base = self.pool.data_ptr()
        for old, new, size in joined(moves):
            ctypes.memmove(base + new, base + old, size)

    def event(self) -> None:
        """What `wait` needs to know of the changes made so far."""

    def wait(self, event: None) -> None:
        """Let kernels that this thread launches from now on see the changes."""

    def fence(self) -> None:
        """Kernels that this thread has launched may still read; changes wait for them."""

    def synchronize(self) -> None:
        """Return when all changes are made."""


class CudaCopies:
    """On CUDA changes run on a stream of their own, beside the forwards.

    The stream waits for the fence that each forward leaves on its stream, before it overwrites
    anything; forwards wait for the event of the adapter that they read. No host synchronisation but
    after moves, which nothing else waits for: all that is copied lies in pinned memory, whose reuse
    torch's allocator delays until the copy is done.
    """

    reserved = 1 << 20

    def __init__(self, pool: Tensor):
        self.pool = pool
        self.bounce = torch.empty(self.reserved, dtype=torch.uint8, device=pool.device)
        self.stream = torch.cuda.Stream(pool.device)
        self.stream.wait_stream(torch.cuda.current_stream(pool.device))  # tables being filled
        self.fences: dict[int, torch.cuda.Event] = {}  # by the stream that reads

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        for fence in list(self.fences.values()):
            self.stream.wait_event(fence)
        with torch.cuda.stream(self.stream):
            yield

    def load(self, blob: Tensor, pieces: Pieces) -> None:
        for start, offset, size in joined(pieces):
            piece = blob[start : start + size]
            self.pool[offset : offset + size].copy_(piece, non_blocking=True)

    def put(self, target: Tensor, value: Tensor) -> None:
        # From pageable memory the copy would wait for all that is queued before it.
        target.copy_(value.pin_memory(), non_blocking=True)

    def move(self, moves: Pieces) -> None:
        for old, new, size in joined(moves):
            distance = old - new
            step = max(distance, self.reserved)
            for begin in range(0, size, step):
                length = min(step, size - begin)
                source = self.pool[old + begin : old + begin + length]
                if length > distance:  # they overlap
                    source = self.bounce[:length].copy_(source)
                self.pool[new + begin : new + begin + length].copy_(source)

    def event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        # A capture must not depend on work outside of it. torch synchronises the device before one
        # begins, so what was loaded before that is there.
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.pool.device).wait_event(event)

    def fence(self) -> None:
        stream = torch.cuda.current_stream(self.pool.device)
        if not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event()
            event.record(stream)
            self.fences[stream.cuda_stream] = event

    def synchronize(self) -> None:
        for fence in list(self.fences.values()):
            fence.synchronize()  # the memory may go next: let its readers end
        self.stream.synchronize()


def joined(pieces: Pieces) -> Iterator[tuple[int, int, int]]:
    """Pieces that are neighbours in both places, as one."""
    pending: tuple[int, int, int] | None = None
    for source, target, size in pieces:
        if pending is not None:
            begin, end = pending[0] + pending[2], pending[1] + pending[2]
            if (source, target) == (begin, end):
                pending = (pending[0], pending[1], pending[2] + size)
                continue
            yield pending
        pending = (source, target, size)
    if pending is not None:
        yield pending
