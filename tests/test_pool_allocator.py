"""The pool's allocator under random traffic, against a plain list of runs."""

from __future__ import annotations

import bisect
import random

import numpy as np
import pytest

from milora import _native

PoolAllocator = _native.PoolAllocator


class Model:
    """What is where: a sorted list of runs, and memory in which each run carries its own number."""

    def __init__(self, capacity: int, alignment: int):
        self.capacity = capacity // alignment * alignment
        self.alignment = alignment
        self.offsets: list[int] = []
        self.runs: dict[int, tuple[int, int]] = {}  # offset -> rounded size, number
        self.memory = np.zeros(self.capacity // alignment, dtype=np.int64)  # a cell per unit
        self.used = 0

    def rounded(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment

    def cells(self, offset: int, size: int) -> np.ndarray:
        return self.memory[offset // self.alignment : (offset + size) // self.alignment]

    def add(self, offset: int, size: int, number: int) -> None:
        size = self.rounded(size)
        assert offset % self.alignment == 0 and offset >= 0 and offset + size <= self.capacity
        place = bisect.bisect(self.offsets, offset)
        if place:
            before = self.offsets[place - 1]
            assert before + self.runs[before][0] <= offset, "overlaps the run before"
        if place < len(self.offsets):
            assert offset + size <= self.offsets[place], "overlaps the run after"
        self.offsets.insert(place, offset)
        self.runs[offset] = (size, number)
        self.cells(offset, size)[:] = number
        self.used += size

    def remove(self, offset: int) -> None:
        size, number = self.runs.pop(offset)
        assert (self.cells(offset, size) == number).all(), "a run's bytes were overwritten"
        self.offsets.pop(bisect.bisect_left(self.offsets, offset))
        self.used -= size

    def holes(self) -> list[int]:
        ends = [0, *(offset + self.runs[offset][0] for offset in self.offsets)]
        begins = [*self.offsets, self.capacity]
        return [begin - end for end, begin in zip(ends, begins, strict=True) if begin > end]

    def move(self, moves: list[tuple[int, int, int]]) -> dict[int, int]:
        assert moves == sorted(moves)
        for old, new, size in moves:
            assert new < old and self.runs[old][0] == size
            self.cells(new, size)[:] = self.cells(old, size).copy()
        new_of = {old: new for old, new, _ in moves}
        self.runs = {new_of.get(offset, offset): run for offset, run in self.runs.items()}
        self.offsets = sorted(self.runs)
        return new_of


@pytest.mark.parametrize("alignment, capacity", [(64, 1 << 16), (1, 3000), (16, 100_000)])
def test_random_traffic(alignment, capacity):
    """10^5 operations: no leak, no overlap, no failure but for want of bytes."""
    rng = random.Random(alignment)
    allocator, model = PoolAllocator(capacity, alignment), Model(capacity, alignment)
    adapters: list[list[int]] = []  # the runs of each
    compactions = refused = 0
    for number in range(1, 35_000):
        if adapters and rng.random() < 0.5:
            offsets = adapters.pop(rng.randrange(len(adapters)))
            allocator.free(rng.sample(offsets, len(offsets)))
            for offset in offsets:
                model.remove(offset)
        else:
            scale = rng.choice([8, 64, capacity // 8])
            sizes = [rng.randint(1, scale) for _ in range(rng.randint(1, 6))]
            total = sum(map(model.rounded, sizes))
            offsets = allocator.allocate(sizes)
            if offsets is None and total <= model.capacity - model.used:
                assert total > max(model.holes()), "there is a hole for all of them"
                new_of = model.move(allocator.compact())
                adapters = [[new_of.get(offset, offset) for offset in runs] for runs in adapters]
                compactions += 1
                assert len(model.holes()) == 1
                offsets = allocator.allocate(sizes)
                assert offsets is not None, "a false failure"
            elif offsets is None:
                refused += 1
            if offsets is not None:
                assert len(offsets) == len(sizes)
                for offset, size in zip(offsets, sizes, strict=True):
                    model.add(offset, size, number)
                adapters.append(offsets)
        assert allocator.used == model.used
        assert allocator.num_runs == len(model.runs)
        if number % 16 == 0:
            assert allocator.largest_hole == max(model.holes(), default=0)
    assert compactions > 50 and refused > 50
    for runs in adapters:
        allocator.free(runs)
    assert (allocator.used, allocator.num_runs) == (0, 0)
    assert allocator.largest_hole == allocator.free_bytes == allocator.capacity


def test_best_fit():
    allocator = PoolAllocator(1000, 1)
    offsets = allocator.allocate([100, 300, 100, 200, 300])
    assert offsets == [0, 100, 400, 500, 700]
    allocator.free([100, 500])  # holes of 300 and 200
    assert allocator.allocate([150]) == [500]
    assert allocator.allocate([120, 180]) == [100, 220]  # side by side where one hole takes both


def test_runs_lie_apart_where_no_hole_takes_all():
    allocator = PoolAllocator(1000, 1)
    allocator.allocate([100, 300, 100, 200, 300])
    allocator.free([100, 500])
    assert allocator.allocate([200, 250]) == [500, 100]
    assert allocator.free_bytes == 50
    assert allocator.allocate([40, 60]) is None and allocator.free_bytes == 50


def test_a_failed_allocation_changes_nothing():
    allocator = PoolAllocator(1000, 1)
    allocator.allocate([100] * 10)
    allocator.free([100, 300, 400])
    assert allocator.allocate([150, 120]) is None
    assert (allocator.used, allocator.num_runs, allocator.largest_hole) == (700, 7, 200)
    assert allocator.allocate([200, 100]) == [300, 100]


ERRORS = {
    "capacity": (lambda: PoolAllocator(-1, 64), "capacity must be at least 0, got -1"),
    "alignment": (lambda: PoolAllocator(64, 48), "alignment must be a power of two, got 48"),
    "size": (lambda: PoolAllocator(64, 1).allocate([3, 0]), "size must be at least 1, got 0"),
    "unknown": (lambda: PoolAllocator(64, 1).free([5]), "no run starts at offset 5"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_free_is_all_or_nothing():
    allocator = PoolAllocator(640, 64)
    first, second = allocator.allocate([64, 64])
    for wrong in ([first, second, 128], [first, first], [first + 1]):
        with pytest.raises(ValueError, match="offset"):
            allocator.free(wrong)
        assert allocator.used == 128
    allocator.free([first])
    with pytest.raises(ValueError, match="no run starts"):
        allocator.free([first])


def test_edges():
    assert PoolAllocator(0, 64).allocate([1]) is None
    allocator = PoolAllocator(130, 64)
    assert allocator.capacity == 128 and allocator.allocate([]) == []
    assert allocator.allocate([2**62, 2**62]) is None
    assert allocator.allocate([128]) == [0] and allocator.allocate([1]) is None
    assert allocator.compact() == []
