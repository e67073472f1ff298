"""Registering, loading, pinning, leasing, evicting: what is resident, and when."""

from __future__ import annotations

import gc

import pytest
import torch
from pool_tools import (
    BYTES,
    KINDS,
    expert_runs,
    lora_bytes,
    new_pool,
    pool_of,
    resident,
    resident_bytes,
    save_adapter,
)
from tiny_models import build

import milora
from milora import AdapterError, MiLoRAConfig, PoolError
from milora.adapter_files import WEIGHTS_FILE
from milora.adapters import read_folder

# ---- registering --------------------------------------------------------------------------------


def test_register_reads_no_weights(tmp_path):
    save_adapter(tmp_path, {})
    (tmp_path / WEIGHTS_FILE).unlink()
    with new_pool(build("llama")) as pool:
        pool.register("adapter", tmp_path)
        assert "adapter" in pool and len(pool) == 1 and list(pool) == ["adapter"]
        assert pool.statistics().host_used == pool.statistics().device_used == 0
        with pytest.raises(AdapterError, match="is missing"):
            pool.load("adapter")


def test_columns_and_config(tmp_path):
    model = save_adapter(tmp_path, KINDS["partial"])
    with new_pool(build("llama")) as pool:
        pool.register("adapter", tmp_path)
        entry = pool.entry("adapter")
        assert entry.config == milora.adapters(model)["default"]
        names = [
            [pool._runtime.blocks[index].experts[column] for column in columns]
            for index, columns in enumerate(entry.columns)
        ]
        assert names == [["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"]] * 2


NAMES = {
    "empty": ("", "non-empty string"),
    "base": ("__base__", "other than '__base__'"),
    "none": (None, "non-empty string"),
    "taken": ("a", "there is an adapter 'a' already"),
    "attached": ("default", "there is an adapter 'default' already"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names(folders, case):
    name, message = NAMES[case]
    model = milora.attach(build("llama"), MiLoRAConfig(rank=2))
    with new_pool(model) as pool:
        pool.register("a", folders["a"])
        pool.register("with.dots and spaces/", folders["b"])
        with pytest.raises(ValueError, match=message):
            pool.register(name, folders["c"])
        with pytest.raises(ValueError, match="already"):
            milora.attach(model, MiLoRAConfig(rank=2), "a")


def test_exactly_one_source(folders):
    config = MiLoRAConfig()
    with new_pool(build("llama")) as pool:
        for wrong in ({}, {"config": config}, {"tensors": {}}, {"attached": "x", "tensors": {}}):
            with pytest.raises(ValueError, match="give a folder, or config and tensors, or"):
                pool.register("a", **wrong)
        with pytest.raises(ValueError, match="no adapter 'x' is attached"):
            pool.register("a", attached="x")
        with pytest.raises(FileNotFoundError, match="no adapter in"):
            pool.register("a", folders["a"] / "nothing")
        assert len(pool) == 0


def test_adapters_that_do_not_fit_are_refused_at_once(tmp_path, folders):
    save_adapter(tmp_path / "phi", {}, family="phi")
    with new_pool(build("llama"), target_modules=["q_proj", "v_proj"]) as pool:
        with pytest.raises(AdapterError, match="which this pool does not serve"):
            pool.register("a", folders["a"])
        with pytest.raises(AdapterError, match="its experts are"):
            pool.register("phi", tmp_path / "phi")
        save_adapter(tmp_path / "small", {"target_modules": ["v_proj"]})
        pool.register("small", tmp_path / "small")
        pool.load("small")
        assert set(expert_runs(pool, "small")) == {(0, 1), (1, 1)}
    message = rf"'L' needs {lora_bytes(8):,} bytes in the pool; .* leaves {BYTES:,}"
    with pool_of(build("llama"), BYTES) as pool, pytest.raises(PoolError, match=message):
        pool.register("L", folders["L"])


TENSORS = {
    "missing": (lambda t: t.popitem(), "missing tensor"),
    "unknown": (lambda t: t.update(x=torch.ones(2)), "unknown tensor x"),
    "shape": (lambda t: t.update({k: v[:1] for k, v in t.items()}), "shape must be"),
    "dtype": (lambda t: t.update({k: v.double() for k, v in t.items()}), "dtype must be one of"),
    "nan": (lambda t: next(iter(t.values())).view(-1)[:1].fill_(float("nan")), "holds NaN or Inf"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors(folders, case):
    change, message = TENSORS[case]
    model = build("llama")
    config, tensors = read_folder(model, folders["a"])
    change(tensors)
    with new_pool(model) as pool:
        with pytest.raises(AdapterError, match=message):
            pool.register("a", config=config, tensors=tensors)
        assert "a" not in pool and pool.statistics().host_used == 0


def test_unregister(pool, folders):
    pool.load("a")
    pool.unregister("a")
    assert "a" not in pool and pool.statistics().device_used == 0
    with pytest.raises(ValueError, match="no adapter 'a' is registered; there are 6"):
        pool.load("a")
    pool.register("a", folders["b"])  # the name is free again, and the old weights are gone
    pool.load("a")
    pool.load("b")
    assert resident_bytes(pool, "a") == resident_bytes(pool, "b")
    with pool.acquire(["a"]), pytest.raises(PoolError, match="unregister: adapter 'a' is in use"):
        pool.unregister("a")
    pool.pin("a")
    with pytest.raises(PoolError, match="unregister: adapter 'a' is pinned"):
        pool.unregister("a")


# ---- what is resident ---------------------------------------------------------------------------


def test_the_least_recently_used_makes_room(pool):
    for name in "abc":
        pool.load(name)
    assert resident(pool) == "abc"
    pool.load("a")
    pool.load("d")
    assert resident(pool) == "acd"
    pool.acquire(["c"]).release()
    pool.load("e")
    assert resident(pool) == "cde"
    stats = pool.statistics()
    assert (stats.loads, stats.evictions, stats.disk_reads) == (5, 2, 5)
    pool.load("a")  # its packed blob is still in host memory
    assert pool.statistics().disk_reads == 5


def test_a_lease_counts_as_use_until_it_ends(pool):
    lease = pool.acquire(["a"])
    for name in "bcdef":
        pool.load(name)
    assert resident(pool) == "aef"
    lease.release()  # now a is the most recently used
    pool.load("b")
    pool.load("c")
    assert resident(pool) == "abc"


def test_slots_bound_what_is_resident(folders):
    with pool_of(build("llama"), 6 * BYTES, max_resident=2) as pool:
        for name in "abc":
            pool.register(name, folders[name])
            pool.load(name)
        assert resident(pool) == "bc"
        pool.register("d", folders["d"])
        with pytest.raises(PoolError, match=r"3 adapters together need 3 slots .* allowed are 2"):
            pool.acquire(["a", "b", "d"])
        assert resident(pool) == "bc"


def test_pinned_adapters_stay(pool):
    pool.pin("a")
    pool.pin("a")
    for name in "bcdef":
        pool.load(name)
    assert resident(pool) == "aef" and pool.statistics().pinned == 1
    with pytest.raises(PoolError, match="evict: adapter 'a' is pinned"):
        pool.evict("a")
    pool.unpin("a")
    pool.unpin("a")
    pool.load("b")
    assert resident(pool) == "bef"


def test_used_adapters_stay(pool):
    lease = pool.acquire(["b", "a"])
    assert lease.slots == (pool.entry("b").slot, pool.entry("a").slot)
    with pytest.raises(PoolError, match="evict: adapter 'a' is in use"):
        pool.evict("a")
    again = pool.acquire(["a"])
    lease.release()
    lease.release()  # does nothing
    with pytest.raises(PoolError, match="in use"):
        pool.evict("a")
    again.release()
    pool.evict("a")
    pool.evict("a")  # does nothing
    assert resident(pool) == "b"


def test_a_lease_that_is_forgotten_ends(pool):
    pool.acquire(["a", "b", "c"])
    gc.collect()
    assert pool.statistics().in_use == 0
    pool.acquire(["d", "e", "f"]).release()


def test_a_working_set_that_does_not_fit(pool):
    """Nothing is loaded or evicted, and the error says how many bytes."""
    for name in "abc":
        pool.load(name)
    before, epoch = pool.statistics(), pool.epoch
    with pytest.raises(PoolError, match=rf"4 adapters together need {4 * BYTES:,} bytes in the "
                                        rf"pool; allowed are {3 * BYTES:,}$"):  # fmt: skip
        pool.acquire(["a", "b", "c", "d"])
    with pool.acquire(["a"]):
        pool.pin("b")
        message = rf"1 adapter needs {lora_bytes(8):,} bytes in the pool; allowed are {BYTES:,} "
        message += rf"\({3 * BYTES:,} less {2 * BYTES:,} of 2 others in use or pinned\)"
        for call in (lambda: pool.acquire(["L"]), lambda: pool.load("L"), lambda: pool.pin("L")):
            with pytest.raises(PoolError, match=message):
                call()
        pool.unpin("b")
    assert resident(pool) == "abc" and pool.epoch == epoch
    after = pool.statistics()
    assert (after.loads, after.evictions, after.in_use) == (before.loads, 0, 0)


def test_acquire_wants_distinct_known_names(pool):
    with pytest.raises(ValueError, match="names must be distinct"):
        pool.acquire(["a", "a"])
    with pytest.raises(ValueError, match="no adapter 'x' is registered"):
        pool.acquire(["a", "x"])
    assert resident(pool) == "" and pool.acquire([]).slots == ()


def test_the_epoch_grows_with_every_change_of_a_slot(pool):
    seen = [pool.epoch]
    for action in (lambda: pool.load("a"), lambda: pool.acquire(["b"]), lambda: pool.evict("a")):
        action()
        seen.append(pool.epoch)
    assert seen == sorted(set(seen))
    pool.load("b")
    pool.acquire(["b"])
    assert pool.epoch == seen[-1]
