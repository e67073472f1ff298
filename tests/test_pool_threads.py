"""A pool under many threads: loads, evictions, failures, forwards, prefetches, compactions."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pool_tools import (
    BYTES,
    KINDS,
    PLAIN,
    lora_bytes,
    new_pool,
    pool_of,
    resident,
    resident_bytes,
    save_adapter,
    three_of_seven,
)
from tiny_models import build, prompts

from milora import AdapterError, PoolError
from milora.adapter_files import WEIGHTS_FILE

PATIENCE = 30.0


class Slowly:
    """Makes reading an adapter wait until `go`, and counts how often it begins."""

    def __init__(self, pool, name: str, monkeypatch):
        self.started, self.go, self.count = threading.Event(), threading.Event(), 0
        source = pool.entry(name).source
        read = source.pack

        def pack(*blobs):
            self.count += 1
            self.started.set()
            assert self.go.wait(PATIENCE)
            return read(*blobs)

        monkeypatch.setattr(source, "pack", pack)


class Waiters:
    """Counts the threads that have come to wait for `condition`, each once."""

    def __init__(self, condition: threading.Condition, monkeypatch):
        self.seen, self.begun = set(), threading.Semaphore(0)
        wait = condition.wait

        def counted(timeout=None):  # under the lock, which `wait` gives back
            if threading.get_ident() not in self.seen:
                self.seen.add(threading.get_ident())
                self.begun.release()
            return wait(timeout)

        monkeypatch.setattr(condition, "wait", counted)

    def expect_one_more(self) -> None:
        assert self.begun.acquire(timeout=PATIENCE)


def finish_prefetching() -> None:
    for thread in threading.enumerate():
        if thread.name == "milora-prefetch":
            thread.join(PATIENCE)
            assert not thread.is_alive()


# ---- loading ------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_once_for_all_who_ask(pool, monkeypatch):
    slowly = Slowly(pool, "a", monkeypatch)
    with ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(pool.acquire, ["a"]) for _ in range(4)]
        calls += [threads.submit(pool.acquire, ["b", "a"]), threads.submit(pool.acquire, ["c"])]
        assert slowly.started.wait(PATIENCE)
        assert calls[5].result(PATIENCE).slots  # others go on meanwhile
        slowly.go.set()
        leases = [call.result(PATIENCE) for call in calls]
    assert slowly.count == 1 and pool.statistics().loads == 3
    assert len({lease.slots[-1] for lease in leases[:5]}) == 1
    assert pool.statistics().in_use == 3


def test_an_adapter_that_is_being_loaded_has_its_place(pool, monkeypatch):
    """A working set counts from the moment it was granted, so what is granted later must fit."""
    slowly = Slowly(pool, "L", monkeypatch)
    pool.load("a")
    with ThreadPoolExecutor(2) as threads:
        large = threads.submit(pool.acquire, ["L"])
        assert slowly.started.wait(PATIENCE)
        assert resident(pool) == "a"  # nothing is evicted before the weights were checked
        with pytest.raises(PoolError, match="of 1 others in use"):
            pool.acquire(["a", "b"])  # a is resident, but its room is L's with b
        with pool.acquire(["a"]):
            slowly.go.set()
            large.result(PATIENCE).release()
    assert resident(pool) == "aL"


def test_who_needs_the_room_of_a_load_waits_for_it(pool, monkeypatch):
    """`load` takes no place beyond its end: a call that needs the room waits and does not fail."""
    slowly = Slowly(pool, "L", monkeypatch)
    waiters = Waiters(pool._residency.changed, monkeypatch)
    with ThreadPoolExecutor(2) as threads:
        load = threads.submit(pool.load, "L")
        assert slowly.started.wait(PATIENCE)
        acquire = threads.submit(pool.acquire, ["a", "b", "c"])
        evict = threads.submit(pool.evict, "L")
        waiters.expect_one_more()
        assert not acquire.done()
        slowly.go.set()
        load.result(PATIENCE)
        assert len(acquire.result(PATIENCE).slots) == 3
        evict.result(PATIENCE)
    assert resident(pool) == "abc"


def test_waiting_for_host_memory(folders, monkeypatch):
    """Two working sets whose packed adapters do not fit into host memory together."""
    with new_pool(build("llama"), host_bytes=3 * BYTES, max_resident=8) as pool:
        for name, folder in folders.items():
            pool.register(name, folder)
        for _ in range(10):
            with ThreadPoolExecutor(3) as threads:
                sets = ["ab", "ca", "de"]
                calls = [threads.submit(pool.acquire, list(names)) for names in sets]
                for call in calls:
                    call.result(PATIENCE).release()
            assert pool.statistics().host_used <= 3 * BYTES
            for name in folders:
                pool.evict(name)


# ---- prefetching --------------------------------------------------------------------------------


def test_prefetch(pool):
    for name in "abc":
        pool.prefetch(name)
    finish_prefetching()
    assert resident(pool) == "abc"
    pool.prefetch("a")
    finish_prefetching()
    pool.prefetch("d")  # b is the oldest
    finish_prefetching()
    assert resident(pool) == "acd"
    assert pool.statistics().loads == 4
    with pytest.raises(ValueError, match="no adapter 'x'"):
        pool.prefetch("x")


def test_acquire_waits_for_a_prefetch(pool, monkeypatch):
    slowly = Slowly(pool, "a", monkeypatch)
    waiters = Waiters(pool._residency.changed, monkeypatch)
    pool.prefetch("a")
    assert slowly.started.wait(PATIENCE)
    with ThreadPoolExecutor(1) as threads:
        acquire = threads.submit(pool.acquire, ["a", "b"])
        waiters.expect_one_more()
        slowly.go.set()
        acquire.result(PATIENCE).release()
    assert slowly.count == 1


def test_errors_of_a_prefetch_come_out_once(tmp_path, pool):
    save_adapter(tmp_path, PLAIN)
    good = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(good[:-1])
    pool.register("bad", tmp_path)
    for call in (pool.load, lambda name: pool.acquire(["a", name]), pool.pin):
        pool.prefetch("bad")
        finish_prefetching()
        (tmp_path / WEIGHTS_FILE).write_bytes(good)
        with pytest.raises(AdapterError, match="sha256"):
            call("bad")
        call("bad")  # tries again
        pool.unpin("bad")
        pool.evict("bad")
        pool._residency.host.drop("bad")
        (tmp_path / WEIGHTS_FILE).write_bytes(good[:-1])
    pool.prefetch("bad")
    pool.unregister("bad")


def test_a_prefetch_without_room_is_no_error_later(pool):
    with pool.acquire(["a", "b", "c"]):
        pool.prefetch("d")
        finish_prefetching()
    pool.load("d")


def test_closing_waits_for_a_prefetch(folders, monkeypatch):
    pool = three_of_seven(folders)
    slowly = Slowly(pool, "a", monkeypatch)
    pool.prefetch("a")
    pool.prefetch("b")
    assert slowly.started.wait(PATIENCE)
    with ThreadPoolExecutor(2) as threads:
        closing = threads.submit(pool.close)
        waiting = threads.submit(pool.acquire, ["a"])
        with pytest.raises(PoolError, match="closed"):
            waiting.result(PATIENCE)
        assert not closing.done()
        slowly.go.set()
        closing.result(PATIENCE)
    assert not any(t.name == "milora-prefetch" for t in threading.enumerate())


def test_a_process_may_end_during_a_prefetch(folders):
    """Without an abort: Python would unwind the thread inside of torch."""
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
import milora, threading
from pool_tools import new_pool
from tiny_models import build
pool = new_pool(build("llama"))
pool.register("a", {str(folders["a"])!r})
started = threading.Event()
read = pool.entry("a").source.pack
def pack(*blobs):
    started.set()
    for _ in range(100):
        read(*blobs)
pool.entry("a").source.pack = pack
pool.prefetch("a")
started.wait()
print("end")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=2 * PATIENCE
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


# ---- forwards and compaction --------------------------------------------------------------------


def test_compaction_waits_for_forwards_and_holds_back_new_ones(pool, monkeypatch):
    waiters = Waiters(pool._residency.gate._changed, monkeypatch)
    pool.begin_forward()
    with ThreadPoolExecutor(2) as threads:
        compact = threads.submit(pool.compact)
        waiters.expect_one_more()
        late = threads.submit(lambda: (pool.begin_forward(), pool.end_forward()))
        waiters.expect_one_more()
        pool.begin_forward()  # inside the first one: goes through
        pool.end_forward()
        pool.acquire([]).release()  # and so does what needs no waiting
        assert not compact.done() and not late.done()
        pool.end_forward()
        compact.result(PATIENCE)
        late.result(PATIENCE)
    with pytest.raises(RuntimeError, match="end_forward: this thread is not inside a forward"):
        pool.end_forward()


def test_a_forward_cannot_wait_for_itself(pool):
    pool.load("a")
    pool.begin_forward()
    try:
        for call in (pool.compact, pool.close):
            with pytest.raises(PoolError, match="inside a forward"):
                call()
        pool.acquire(["a"]).release()
        for call in (pool.load, lambda name: pool.acquire(["a", name]), pool.pin):
            with pytest.raises(PoolError, match="'b' must be acquired before the forward begins"):
                call("b")
    finally:
        pool.end_forward()
    pool.load("b")


def test_forwards_do_not_starve_compaction(pool):
    stop = threading.Event()

    def forwards():
        while not stop.is_set():
            pool.begin_forward()
            stop.wait(0.001)  # what a forward takes: the others' overlap with it
            pool.end_forward()

    with ThreadPoolExecutor(5) as threads:
        running = [threads.submit(forwards) for _ in range(4)]
        try:
            for name in "abc":
                pool.load(name)
            pool.evict("a")
            threads.submit(pool.compact).result(PATIENCE)
            assert pool.statistics().compactions == 1
        finally:
            stop.set()
        for thread in running:
            thread.result(PATIENCE)


def test_compaction_keeps_every_bit(tmp_path):
    """Adapters of many kinds and sizes; the model's answers stay the same too."""
    model = build("llama")
    for seed, kind in enumerate(KINDS):
        save_adapter(tmp_path / kind, KINDS[kind], rank=seed + 1, seed=seed + 1)
    with torch.no_grad(), new_pool(model, max_resident=12) as pool:
        for kind in KINDS:
            pool.register(f"{kind} again", tmp_path / kind)
            pool.register(kind, tmp_path / kind)
            pool.load(f"{kind} again")
            pool.load(kind)
        for kind in KINDS:
            pool.evict(f"{kind} again")
        before = {kind: resident_bytes(pool, kind) for kind in KINDS}
        ids = prompts(len(KINDS), 6)
        logits = model(ids, use_cache=True, adapter_names=list(KINDS)).logits
        assert pool.statistics().largest_hole < pool.statistics().device_free
        pool.compact()
        assert pool.statistics().largest_hole == pool.statistics().device_free
        assert {kind: resident_bytes(pool, kind) for kind in KINDS} == before
        assert torch.equal(model(ids, use_cache=True, adapter_names=list(KINDS)).logits, logits)


# ---- everything at once -------------------------------------------------------------------------


def test_stress(tmp_path, folders):
    """Threads that lease, read, load, pin, evict, prefetch, fail and compact, in 2 s.

    Whoever holds a lease inside a forward must find its adapters' bytes whole, whatever the others
    do; and in the end nothing has leaked.
    """
    ranks = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8, "f": 12}
    for name, rank in ranks.items():
        save_adapter(tmp_path / name, PLAIN, rank=rank, seed=rank)
    save_adapter(tmp_path / "bad", PLAIN)
    (tmp_path / "bad" / WEIGHTS_FILE).write_bytes(b"\0" * 100)
    budget = lora_bytes(12) + lora_bytes(8)
    with pool_of(build("llama"), budget, max_resident=4, host_bytes=budget) as pool:
        want = {}
        for name in ranks:
            pool.register(name, tmp_path / name)
            pool.load(name)
            want[name] = resident_bytes(pool, name)
        pool.register("bad", tmp_path / "bad")
        end = time.monotonic() + 2.0
        done = dict.fromkeys(("read", "refused", "failed"), 0)

        def work(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < end:
                names = rng.sample(list(ranks), rng.randint(1, 2))
                action = rng.randrange(12)
                try:
                    if action < 7:
                        with pool.acquire(names) as lease:
                            pool.begin_forward()
                            try:
                                for name, slot in zip(names, lease.slots, strict=True):
                                    assert pool.entry(name).slot == slot
                                    assert resident_bytes(pool, name) == want[name], name
                                done["read"] += 1
                            finally:
                                pool.end_forward()
                    elif action == 7:
                        pool.prefetch(rng.choice([*ranks, "bad"]))
                    elif action == 8:
                        pool.evict(names[0])
                    elif action == 9:
                        pool.acquire([*names, "bad"])
                    elif action == 10:
                        pool.pin(names[0])
                        pool.unpin(names[0])
                    else:
                        pool.compact()
                except PoolError:
                    done["refused"] += 1
                except AdapterError:
                    done["failed"] += 1

        with ThreadPoolExecutor(6) as threads:
            for call in [threads.submit(work, seed) for seed in range(6)]:
                call.result(PATIENCE)
        assert min(done.values()) > 10, done
        finish_prefetching()
        for name in ranks:
            pool.evict(name)
        stats = pool.statistics()
        assert (stats.device_used, stats.in_use, stats.pinned, stats.resident) == (0, 0, 0, 0)
        assert stats.host_used <= stats.host_bytes and stats.compactions > 0, stats


def test_generating_in_threads(folders):
    """Each thread's tenants come and go beside the others'; the answers are those of one thread."""
    model = build("llama")
    rng = random.Random(0)
    batches = [rng.sample("abcdef", 2) for _ in range(24)]
    ids = [prompts(2, 5, seed=i) for i in range(24)]

    def generate(index: int) -> torch.Tensor:
        return model.generate(
            ids[index], max_new_tokens=3, do_sample=False, adapter_names=batches[index]
        )

    with pool_of(model, 5 * BYTES, max_resident=5) as pool:
        for name, folder in folders.items():
            pool.register(name, folder)
        alone = [generate(index) for index in range(24)]
        with ThreadPoolExecutor(2) as threads:
            together = list(threads.map(generate, range(24)))
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        assert pool.statistics().in_use == 0 and pool.statistics().evictions > 5
