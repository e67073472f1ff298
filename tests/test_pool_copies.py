"""Moving bytes: neighbours as one copy, places that overlap, and the pool on a GPU."""

from __future__ import annotations

import pytest
import torch
from pool_tools import BYTES, KINDS, new_pool, pool_of, resident_bytes, save_adapter
from tiny_models import build, prompts

from milora.pool.copies import CpuCopies, CudaCopies, joined


@pytest.fixture(scope="module")
def native():
    """Where the library was carried to another Python, the pybind11 module may be missing."""
    reason = "milora's pybind11 module was not built for this Python"
    return pytest.importorskip("milora._native", reason=reason)


def test_neighbours_are_joined():
    pieces = [(0, 100, 4), (4, 104, 4), (8, 200, 4), (20, 204, 4), (24, 208, 1), (25, 209, 1)]
    assert list(joined(pieces)) == [(0, 100, 8), (8, 200, 4), (20, 204, 6)]
    assert list(joined([])) == []


class OnTheCpu(CudaCopies):
    """Its moves are plain tensor copies, so that they can be tested without a GPU."""

    reserved = 96

    def __init__(self, pool: torch.Tensor):
        self.pool = pool
        self.bounce = torch.empty(self.reserved, dtype=torch.uint8)


@pytest.mark.parametrize("copies", [CpuCopies, OnTheCpu])
def test_moves_keep_every_byte(copies, native):
    """Runs slide over each other, by less and by more than their sizes."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        pool = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=generator)
        allocator = native.PoolAllocator(4096, 1)
        sizes = torch.randint(1, 400, (24,), generator=generator).tolist()
        placed = [(allocator.allocate([size]), size) for size in sizes]
        placed = [(offsets[0], size) for offsets, size in placed if offsets is not None]
        keep = placed[1::2]
        allocator.free([offset for offset, _ in placed[::2]])
        want = {offset: pool[offset : offset + size].clone() for offset, size in keep}
        moves = allocator.compact()
        copies(pool).move(moves)
        new_of = {old: new for old, new, _ in moves}
        for offset, size in keep:
            new = new_of.get(offset, offset)
            assert torch.equal(pool[new : new + size], want[offset])


def test_traffic_between_forwards(device, native, tmp_path):
    """Loads, evictions and compactions: each answer stays what it was, and that of the CPU."""
    names = list(KINDS)
    for seed, kind in enumerate(names):
        save_adapter(tmp_path / kind, KINDS[kind], seed=seed + 1)
    want, answers = {}, {}
    ids = prompts(2, 6)
    for where in ("cpu", device):
        model = build("llama").to(where)
        with torch.no_grad(), pool_of(model, 8 * BYTES, host_bytes=1 << 22) as pool:
            for kind in names:
                pool.register(kind, tmp_path / kind)
            for i in range(3 * len(names)):
                pair = [names[i % len(names)], names[(i * 5 + 1) % len(names)]]
                if len(set(pair)) == 2:
                    logits = model(ids.to(where), use_cache=True, adapter_names=pair).logits
                    key = tuple(pair)
                    torch.testing.assert_close(
                        logits.cpu(), answers.setdefault(key, logits.cpu()), rtol=0, atol=1e-4
                    )
                if i % 4 == 3:
                    pool.compact()
            for kind in names:
                pool.load(kind)
                if kind not in ("dora", "lora_mini"):  # whose products round as the device does
                    assert resident_bytes(pool, kind) == want.setdefault(
                        kind, resident_bytes(pool, kind)
                    )
            stats = pool.statistics()
            assert stats.evictions > 0 and stats.host_used <= stats.host_bytes


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_the_budget_of_a_gpu(device, native):
    before = torch.cuda.memory_allocated()
    with new_pool(build("llama").to(device), device_bytes=8 << 20) as pool:
        pool.statistics()
        model_bytes = sum(p.nbytes for p in pool._runtime.model.parameters())
        assert torch.cuda.memory_allocated() - before <= (8 << 20) + 2 * model_bytes
