"""Damaged adapters, errors on the way, models that changed, and the end of a pool."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from pool_tools import (
    BYTES,
    KINDS,
    PLAIN,
    new_pool,
    pool_of,
    resident,
    resident_bytes,
    save_adapter,
)
from safetensors.torch import load_file, save_file
from saved_adapters import assert_unchanged, snapshot
from tiny_models import build, prompts

import milora
from milora import AdapterError, PoolError
from milora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, sha256_of
from milora.attach import runtime_of

# ---- failures -----------------------------------------------------------------------------------


def damaged(folder, how: str, source) -> None:
    folder.mkdir()
    config = json.loads((source / CONFIG_FILE).read_text())
    tensors = load_file(source / WEIGHTS_FILE)
    key = sorted(tensors)[-1]
    if how == "nan":
        tensors[key].view(-1)[-1] = float("nan")
    elif how == "shape":
        tensors[key] = tensors[key][:1].clone()
    elif how == "missing":
        del tensors[key]
    save_file(tensors, folder / WEIGHTS_FILE)
    payload = (folder / WEIGHTS_FILE).read_bytes()
    if how == "truncated":
        (folder / WEIGHTS_FILE).write_bytes(payload[:-100])
    config["sha256"] = "0" * 64 if how == "sum" else sha256_of(folder / WEIGHTS_FILE)
    if how == "checksum":
        config["checksums"] = dict.fromkeys(config["checksums"], "0" * 16)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


DAMAGE = {
    "nan": "holds NaN or Inf",
    "shape": "shape must be",
    "missing": "missing tensor",
    "truncated": "not a readable safetensors file",
    "sum": "its sha256 is not the one",
    "checksum": "frozen factors came out with checksum",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_adapter_leaves_the_pool_as_it_was(tmp_path, folders, how):
    save_adapter(tmp_path / "whole", KINDS["lora_mini"] if how == "checksum" else PLAIN)
    damaged(tmp_path / "bad", how, tmp_path / "whole")
    model = build("llama")
    with pool_of(model, 3 * BYTES, host_bytes=9 * BYTES) as pool:
        for name in "abc":
            pool.register(name, folders[name])
            pool.load(name)
        pool.register("bad", tmp_path / "bad")
        before, epoch, stats = snapshot(model), pool.epoch, pool.statistics()
        memory = pool.tables[0].pool.clone()
        for call in (pool.load, pool.pin, lambda name: pool.acquire(["a", name])):
            with pytest.raises(AdapterError, match=DAMAGE[how]):
                call("bad")
        with pytest.raises(AdapterError):  # d is whole, and not loaded either
            pool.register("d", folders["d"])
            pool.acquire(["d", "bad"])
        assert torch.equal(pool.tables[0].pool, memory) and pool.epoch == epoch
        assert resident(pool) == "abc"
        after = pool.statistics()
        assert (after.failures, after.evictions, after.in_use) == (4, 0, 0)
        assert after.host_used == stats.host_used + BYTES  # d's blob
        assert_unchanged(model, before)
        pool.unregister("bad")


def test_a_folder_that_changes_after_it_was_registered(tmp_path):
    with new_pool(build("llama")) as pool:
        save_adapter(tmp_path, PLAIN)
        pool.register("a", tmp_path)
        pool.load("a")
        old = resident_bytes(pool, "a")
        save_adapter(tmp_path, PLAIN, seed=1)
        pool.unregister("a")
        save_adapter(tmp_path, {**PLAIN, "alpha": 3.0})
        pool.register("a", tmp_path)
        save_adapter(tmp_path, {**PLAIN, "alpha": 5.0})
        with pytest.raises(AdapterError, match=r"changed since it was registered: alpha 5.0 \(was"):
            pool.load("a")
        save_adapter(tmp_path, {**PLAIN, "alpha": 3.0}, seed=1)
        pool.load("a")
        assert resident_bytes(pool, "a") == old


def test_errors_while_copying_give_the_room_back(pool, monkeypatch):
    pool.load("a")

    def out_of_memory(*args):
        raise MemoryError

    monkeypatch.setattr(pool._residency.memory, "write", out_of_memory)
    with pytest.raises(MemoryError):
        pool.acquire(["b", "c"])
    monkeypatch.undo()
    stats = pool.statistics()
    assert (stats.device_used, stats.in_use, resident(pool)) == (BYTES, 0, "a")
    pool.acquire(["b", "c"]).release()


# ---- beginning and end --------------------------------------------------------------------------


def test_closing_restores_the_model(folders):
    model = build("llama")
    before = snapshot(model)
    pool = new_pool(model)
    pool.register("a", folders["a"])
    lease = pool.acquire(["a"])
    with pytest.raises(ValueError, match="has a pool already"):
        new_pool(model)
    pool.close()
    pool.close()
    lease.release()
    assert_unchanged(model, copy.copy(before))
    calls = [
        lambda: pool.register("b", folders["b"]), lambda: pool.load("a"), lambda: pool.pin("a"),
        lambda: pool.unpin("a"), lambda: pool.evict("a"), lambda: pool.unregister("a"),
        lambda: pool.acquire(["a"]), lambda: pool.prefetch("a"), lambda: pool.entry("a"),
        pool.compact, pool.statistics, pool.begin_forward,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(PoolError, match="this pool is closed"):
            call()
    assert "a" not in pool and len(pool) == 0
    with new_pool(model) as pool:
        pool.register("a", folders["a"])
    pool = new_pool(model)
    milora.detach(model)
    with pytest.raises(PoolError, match="closed"):
        pool.load("a")
    assert_unchanged(model, before)


def test_a_pool_beside_attached_adapters(folders):
    model = milora.load(build("llama"), folders["a"], "attached")
    with torch.no_grad():
        want = model(prompts(2, 5)).logits
        with new_pool(model) as pool:
            pool.register("a", folders["a"])
            got = model(prompts(2, 5), adapter_names=["a", "a"]).logits
            assert torch.equal(got, want)
            assert torch.equal(model(prompts(2, 5)).logits, want)
            with pytest.raises(ValueError, match="one batch reads one of them"):
                model(prompts(2, 5), adapter_names=["a", "attached"])
        assert torch.equal(model(prompts(2, 5)).logits, want)
    assert list(milora.adapters(model)) == ["attached"]


def test_a_model_that_was_cast_is_refused(pool):
    model = pool._runtime.model
    pool.load("a")
    model.to(torch.bfloat16)
    with pytest.raises(PoolError, match=r"computes in torch.bfloat16 .* made for torch.float32"):
        model.generate(prompts(1, 5), adapter_names=["a"])
    model.to(torch.float32)
    model.generate(prompts(1, 5), max_new_tokens=1, adapter_names=["a"])


def test_copies_are_refused(pool):
    with pytest.raises(TypeError, match="cannot be copied or pickled; close the pool first"):
        copy.deepcopy(pool._runtime.model)


def test_unusable_models():
    with pytest.raises(ValueError, match="must lie on one CPU or CUDA device, got meta"):
        new_pool(build("llama").to("meta"))
    with pytest.raises(ValueError, match=r"compute in float32, bfloat16 or float16, got torch\."):
        new_pool(build("llama").double())


def test_made_in_inference_mode(folders):
    model = build("llama")
    with torch.inference_mode():
        pool = new_pool(model)
        pool.register("a", folders["a"])
        pool.load("a")
    pool.evict("a")
    with torch.inference_mode():
        model.generate(prompts(1, 5), max_new_tokens=1, adapter_names=["a"])
    pool.close()


def test_without_the_pybind_module(monkeypatch):
    """The op library may be carried to another Python, where only a pool needs more."""
    monkeypatch.setitem(sys.modules, "milora._native", None)
    model = build("llama")
    with pytest.raises(ImportError, match=r"needs milora's pybind11 module.*pip install"):
        new_pool(model)
    assert runtime_of(model, required=False) is None
