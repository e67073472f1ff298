"""The pool's budgets, on the device and on the host, under any traffic."""

from __future__ import annotations

import json
import random

import pytest
from pool_tools import (
    BYTES,
    PLAIN,
    lora_bytes,
    new_pool,
    pool_of,
    random_traffic,
    resident,
    resident_bytes,
    save_adapter,
)
from tiny_models import build, prompts

from milora import PoolError
from milora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from milora.adapters import read_folder
from milora.attach import runtime_of


def test_device_bytes_are_kept(folders):
    model = build("llama")
    for num_bytes in (100_000, 123_457, 1 << 20):
        with new_pool(model, device_bytes=num_bytes) as pool:
            tables = pool.tables[0]
            memory = tables.pool.untyped_storage().nbytes()
            memory += sum(t.nbytes for tab in pool.tables for t in list(vars(tab).values())[1:])
            assert num_bytes - 128 <= memory <= num_bytes
            assert pool.statistics().device_bytes == memory
            assert tables.pool.data_ptr() % 64 == 0
            assert all(t.pool is tables.pool for t in pool.tables)


@pytest.mark.parametrize("name", ["device_bytes", "host_bytes", "max_resident"])
def test_wrong_budgets(name):
    model = build("llama")
    for value in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match=rf"{name} must be a positive integer, got {value}"):
            new_pool(model, **{name: value})
    with pytest.raises(ValueError, match=r"beside the [\d,]+ bytes of the tables for max_resident"):
        new_pool(model, device_bytes=10_000, max_resident=256)
    assert runtime_of(model, required=False) is None


def test_an_adapter_larger_than_the_host_budget(folders):
    with new_pool(build("llama"), host_bytes=BYTES) as pool:
        pool.register("a", folders["a"])
        pool.register("L", folders["L"])
        pool.load("a")
        with pytest.raises(PoolError, match=rf"'L' needs {lora_bytes(8):,} bytes of host memory; "
                                            rf"host_bytes allows {BYTES:,}"):  # fmt: skip
            pool.load("L")
        assert resident(pool) == "a" and pool.statistics().host_used == BYTES


def test_host_memory_for_one_adapter_loads_many(folders):
    """What was read makes room for the next; in the order of use."""
    with new_pool(build("llama"), host_bytes=BYTES) as pool:
        for name in "abc":
            pool.register(name, folders[name])
        with pool.acquire(["a", "b", "c"]):
            assert resident(pool) == "abc" and pool.statistics().host_used == BYTES
        pool.evict("c")
        pool.load("c")
        assert pool.statistics().disk_reads == 3
        pool.evict("a")
        pool.load("a")
        assert pool.statistics().disk_reads == 4


def test_adapters_from_memory_keep_their_place_on_the_host(folders):
    model = build("llama")
    config, tensors = read_folder(model, folders["a"])
    with new_pool(model, host_bytes=2 * BYTES) as pool:
        pool.register("memory", config=config, tensors=tensors)
        pool.register("a", folders["a"])
        pool.register("b", folders["b"])
        for name in ("a", "b", "memory"):
            pool.load(name)
        pool.evict("memory")
        pool.load("memory")
        assert pool.statistics().host_used == 2 * BYTES
        pool.register("more", config=config, tensors=tensors)
        with pytest.raises(PoolError, match=r"of which .* hold adapters registered from memory"):
            pool.register("too many", config=config, tensors=tensors)
        with pytest.raises(PoolError, match=r"needs .* bytes of host memory"):
            pool.evict("a")
            pool.unregister("b")
            pool.load("a")
        assert "too many" not in pool
        pool.unregister("memory")
        pool.load("a")


def test_budgets_hold_under_random_traffic(tmp_path):
    """After every operation; the weights that are shown are the adapter's own, bit for bit."""
    rng = random.Random(0)
    ranks = {str(i): rng.choice([1, 2, 3, 8, 16]) for i in range(20)}
    model = build("llama")
    for name, rank in ranks.items():
        save_adapter(tmp_path / name, PLAIN, rank=rank, seed=int(name) + 1)
    want: dict[str, bytes] = {}
    budget, host_bytes = 2 * lora_bytes(16) + 4096, 2 * lora_bytes(16)
    with pool_of(model, budget, max_resident=6, host_bytes=host_bytes) as pool:
        for name in ranks:
            pool.register(name, tmp_path / name)
            pool.load(name)
            want[name] = resident_bytes(pool, name)
        for step in random_traffic(pool, list(ranks), seed=0, steps=1500):
            stats = pool.statistics()
            inside = [n for n in ranks if pool.is_resident(n)]
            used = sum(lora_bytes(ranks[n]) for n in inside)
            assert stats.resident == len(inside) <= 6
            assert stats.device_used == used <= budget and stats.host_used <= host_bytes
            assert len({pool.entry(n).slot for n in inside}) == len(inside)
            if step % 10 == 0:
                assert all(resident_bytes(pool, n) == want[n] for n in inside)
        for name in ranks:
            pool.evict(name)
        assert pool.statistics().device_used == 0
        assert pool.statistics().largest_hole == pool.statistics().device_free


def test_thousands_registered(tmp_path):
    """5,000 adapters, 16 resident."""
    save_adapter(tmp_path, {})
    data = json.loads((tmp_path / CONFIG_FILE).read_text())
    folders = []
    for index in range(50):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / CONFIG_FILE).write_text(json.dumps({**data, "seed": index}))
        (folder / WEIGHTS_FILE).symlink_to(tmp_path / WEIGHTS_FILE)
        folders.append(folder)
    model = build("llama")
    with new_pool(model, max_resident=16, host_bytes=1 << 20) as pool:
        for index in range(5000):
            pool.register(f"tenant {index}", folders[index % 50])
        assert len(pool) == 5000
        for start in range(0, 5000, 625):
            names = [f"tenant {start + 7 * i}" for i in range(16)]
            with pool.acquire(names) as lease:
                assert sorted(lease.slots) == list(range(16))
        model.generate(prompts(2, 5), max_new_tokens=2, adapter_names=["tenant 17", "tenant 4999"])
        assert pool.statistics().resident == 16
