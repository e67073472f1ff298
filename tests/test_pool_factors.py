"""Adapters that never train A and B share them in the pool: LoRA-XS and its like.

What is shared is found by its bytes; it is there once, as long as an adapter needs it, and no
adapter computes with the factors of another that has different ones.
"""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pool_tools import (
    BYTES,
    KINDS,
    PLAIN,
    lora_bytes,
    new_pool,
    pool_of,
    random_traffic,
    resident,
    resident_bytes,
    save_adapter,
)
from safetensors.torch import load_file, save_file
from tiny_models import build, prompts

import milora
from milora import AdapterError, MiLoRAConfig, PoolError
from milora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_config, sha256_of, write_config
from milora.adapters import read_folder

RANK = 4
OWN = 14 * 64  # a core of rank 4 for each of a tiny Llama's modules


def fill_cores(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for linears in model._milora_runtime.linears:
        for linear in linears:
            for key, tensor in linear.tensors("default").items():
                if key.endswith("_core"):
                    tensor.data.normal_(0.0, 0.3, generator=generator)


def save_tenants(
    root: Path, names: str | list[str], *, base: int = 0, first: int = 0, model: dict | None = None,
    **options,
) -> dict[str, Path]:  # fmt: skip
    """Adapters whose A and B come from one base, with cores of their own."""
    made = build("llama", seed=base, **(model or {}))
    milora.attach(made, MiLoRAConfig(**{"expert": "lora_xs", "rank": RANK, **PLAIN, **options}))
    folders = {}
    for seed, name in enumerate(names, first):
        fill_cores(made, seed)
        folders[name] = root / name
        milora.save(made, folders[name])
    return folders


@pytest.fixture(scope="module")
def xs(tmp_path_factory) -> dict[str, Path]:
    """Tenants a to f of one base and x to z of another."""
    root = tmp_path_factory.mktemp("xs")
    return save_tenants(root, "abcdef") | save_tenants(root, "xyz", base=7, first=50)


def registered(pool, folders: dict[str, Path]):
    for name, folder in folders.items():
        pool.register(name, folder)
    return pool


@torch.no_grad()
def generated(model, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits of a prefill and of decode steps."""
    out = model.generate(
        prompts(len(names), 9, seed=3), adapter_names=names, max_new_tokens=4, min_new_tokens=4,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


# ---- what it is for ---------------------------------------------------------------------------


def test_200_tenants_where_10_copies_would_fit(tmp_path):
    wide = {"hidden_size": 64, "intermediate_size": 96}
    names = [str(i) for i in range(200)]
    folders = save_tenants(tmp_path, names, model=wide)
    model, copy = build("llama", **wide), 2 * lora_bytes(RANK)  # every width is twice the tiny one
    with pool_of(model, 10 * copy, max_resident=200, host_bytes=10 * copy) as pool:
        registered(pool, folders)
        assert pool.statistics().disk_reads == 0
        with pool.acquire(names) as lease:
            assert sorted(lease.slots) == list(range(200))
            stats = pool.statistics()
            assert (stats.resident, stats.shared_sets, stats.shared_bytes) == (200, 1, copy)
            assert stats.shared_saved == 199 * copy
            assert stats.device_used == copy + 200 * OWN < 10 * copy
        some = ["3", "57", "199", "__base__"]
        pooled = generated(model, some)
    attached = build("llama", **wide)
    for name in some[:-1]:
        milora.load(attached, folders[name], name)
    for got, want in zip(pooled, generated(attached, some), strict=True):
        assert torch.equal(got, want)
    rows = pooled[1]
    assert not torch.equal(rows[0], rows[1])


MIXED = {
    "loldu": {"expert": "loldu", "rank": 6},
    "inttune": {"expert": "inttune", "rank": 8},
    "residual": {"expert": "inttune", "expert_options": {"residual": True}},
    "sb": {"expert": "lora_sb", "rank": 17},
    "random": {"expert": "lora_xs", "expert_options": {"factors": "random"}},
    "routed": {"expert": "lora_xs", "router": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_batch_of_all_kinds(tmp_path, xs, dtype):
    """The bits of attached adapters, in prefill and in decode."""
    folders = {name: xs[name] for name in "abxy"}
    for seed, (name, options) in enumerate(MIXED.items(), 90):
        folders |= save_tenants(tmp_path, [name], first=seed, **options)
    for name in ("lora", "dora", "lora_mini"):
        folders[name] = tmp_path / name
        save_adapter(folders[name], KINDS[name], rank=5)
    names = [*folders, "__base__"]
    attached, model = build("llama").to(dtype), build("llama").to(dtype)
    for name, folder in folders.items():
        milora.load(attached, folder, name)
    want = generated(attached, names)
    with registered(new_pool(model, max_resident=32), folders) as pool:
        got = generated(model, names)
        # a, b and the routed one share: its router is its own. residual is materialised.
        stats = pool.statistics()
        assert stats.shared_sets == 6 and stats.shared_saved > 0
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_attached_adapters_are_what_they_were_trained_as(xs):
    """Inference with the core apart, against training, which takes (A, B C)."""
    model = milora.load(build("llama"), xs["a"], "a")
    linear = model._milora_runtime.linears[0][0]
    whole, apart = linear.weights("a"), linear.served("a")
    assert whole.core is None and apart.core.shape == (RANK, RANK)
    assert torch.equal(apart.a, whole.a)
    torch.testing.assert_close(apart.b @ apart.core, whole.b)
    ids = prompts(1, 9, seed=3)
    with torch.no_grad(), milora.prompt_lengths(model, 9):
        inference = model(ids).logits
        training = model.train()(ids).logits
    torch.testing.assert_close(inference, training, rtol=1e-4, atol=1e-5)


# ---- who shares with whom -----------------------------------------------------------------------


def test_what_is_shared_is_decided_by_its_bytes(tmp_path, xs):
    folders = {name: xs[name] for name in "abx"}
    folders |= save_tenants(tmp_path, ["wider"], rank=5)
    folders |= save_tenants(tmp_path, ["few"], target_modules=["q_proj", "v_proj"])
    folders |= save_tenants(tmp_path, ["seeded"], seed=77)  # the seed does not matter
    with registered(new_pool(build("llama"), max_resident=8), folders) as pool:
        for name in folders:
            pool.load(name)
        sets = {name: pool.entry(name).factors.digest for name in folders}
        assert sets["a"] == sets["b"] == sets["seeded"]
        assert len(set(sets.values())) == 4 == pool.statistics().shared_sets
    with registered(new_pool(build("llama").bfloat16()), {"a": xs["a"]}) as pool:
        pool.load("a")
        assert pool.entry("a").factors.digest != sets["a"]


def test_saved_again_it_is_the_same(tmp_path, xs):
    model = milora.load(build("llama"), xs["a"], "a")
    milora.save(model, tmp_path / "again", "a")
    folders = {"a": xs["a"], "again": tmp_path / "again"}
    with registered(new_pool(model), {name + "_": f for name, f in folders.items()}) as pool:
        pool.register("live", attached="a")
        with pool.acquire(["a_", "again_", "live"]):
            assert pool.statistics().shared_sets == 1
            bits = {resident_bytes(pool, name) for name in pool}
            assert len(bits) == 1


# ---- bytes --------------------------------------------------------------------------------------


def test_a_working_set_counts_them_once(xs):
    folders = {name: xs[name] for name in "abcd"}
    with registered(pool_of(build("llama"), BYTES + 3 * OWN, max_resident=8), folders) as pool:
        want = rf"4 adapters together need {BYTES + 4 * OWN:,} bytes .*; allowed are "
        want += rf"{BYTES + 3 * OWN:,}$"
        for _ in range(2):  # also where nothing is known of them yet
            with pytest.raises(PoolError, match=want):
                pool.acquire(list("abcd"))
            assert resident(pool) == "" and pool.statistics().loads == 0
        with pool.acquire(["a", "b"]):
            with pool.acquire(["a", "c"]):  # what both leases need is counted once, too
                assert pool.statistics().device_used == BYTES + 3 * OWN
                with pytest.raises(PoolError, match=rf"1 adapter needs {BYTES + OWN:,} bytes .*"
                                                    rf"allowed are {BYTES:,} "):  # fmt: skip
                    pool.load("d")
            pool.load("d")
            assert resident(pool) == "abd"


def test_an_adapter_that_never_fits_is_refused_at_once(xs):
    message = rf"'a' needs {BYTES + OWN:,} bytes in the pool"
    with pool_of(build("llama"), BYTES) as pool, pytest.raises(PoolError, match=message):
        pool.register("a", xs["a"])


def test_they_stay_for_their_users_and_then_go_by_age(tmp_path, xs, folders):
    room = 2 * BYTES + 6 * OWN
    with registered(pool_of(build("llama"), room, max_resident=8), xs) as pool:
        pool.register("lora", folders["a"])
        pool.register("more", folders["b"])
        for name in "abx":
            pool.load(name)
        assert pool.statistics().shared_sets == 2
        for name in "ab":
            pool.evict(name)
        stats = pool.statistics()  # nobody needs the first set; it stays while there is room
        assert (stats.shared_sets, stats.device_used) == (2, 2 * BYTES + OWN)
        pool.load("a")
        assert pool.statistics().loads == 4
        pool.pin("a")
        pool.load("lora")  # x and its set make room, in their turn
        assert resident(pool) == "a" + "lora" and pool.statistics().shared_sets == 1
        pool.load("more")  # never those of a
        assert resident(pool) == "amore" and pool.statistics().shared_sets == 1
        with pytest.raises(PoolError, match="2 adapters together need"):
            pool.acquire(["lora", "more"])
        pool.unpin("a")
        with pool.acquire(["lora", "more"]):
            stats = pool.statistics()
            assert (stats.shared_sets, stats.device_used) == (0, 2 * BYTES)


def test_host_memory(xs):
    """A set and its first user are there together. All are read for their digests, one again for
    the set, and those again whose own bytes had to make room for it."""
    for room, reads in ((4, 4 + 1), (2, 4 + 4), (1, 4 + 4)):
        limit = BYTES + room * OWN
        with pool_of(build("llama"), 2 * BYTES, host_bytes=limit, max_resident=8) as pool:
            registered(pool, {name: xs[name] for name in "abcd"})
            with pool.acquire(list("abcd")):
                assert pool.statistics().host_used <= limit
                assert pool.statistics().disk_reads == reads
            for name in "abcd":
                pool.evict(name)
            pool.load("d")
            assert pool.statistics().disk_reads == reads  # it was the last one to be packed
    with registered(new_pool(build("llama"), host_bytes=BYTES), {"a": xs["a"]}) as pool:
        with pytest.raises(PoolError, match=rf"'a' needs {BYTES + OWN:,} bytes of host memory"):
            pool.load("a")
        stats = pool.statistics()
        assert (stats.device_used, stats.host_used, stats.in_use) == (0, OWN, 0)


def test_adapters_from_memory_keep_one_copy(xs):
    model = build("llama")
    with new_pool(model, host_bytes=BYTES + 3 * OWN) as pool:
        for name in "abc":
            config, tensors = read_folder(model, xs[name])
            pool.register(name, config=config, tensors=tensors)
        assert pool.statistics().host_used == BYTES + 3 * OWN
        config, tensors = read_folder(model, xs["d"])
        with pytest.raises(PoolError, match=r"of which .* hold adapters registered from memory"):
            pool.register("d", config=config, tensors=tensors)
        assert pool.statistics().host_used == BYTES + 3 * OWN
        with pool.acquire(list("abc")):
            assert pool.statistics().device_used == BYTES + 3 * OWN
        for name in "abc":
            pool.unregister(name)
        assert pool.statistics().host_used == BYTES  # nobody's now: it makes room for others
        config, tensors = read_folder(model, xs["x"])
        pool.register("x", config=config, tensors=tensors)
        assert pool.statistics().host_used == BYTES + OWN
        pool.load("x")


def test_under_random_traffic(tmp_path, xs, folders):
    """After every operation: bytes add up, and what is shown is the adapter's own, bit for bit."""
    known = {**xs, "lora": folders["a"], "large": folders["L"]}
    known |= save_tenants(tmp_path, ["wide"], rank=7)
    own = dict.fromkeys(xs, OWN) | {"lora": BYTES, "large": lora_bytes(8)}
    own["wide"] = 14 * -(-7 * 32 // 64) * 64
    with registered(new_pool(build("llama"), max_resident=16), known) as probe:
        want = {}
        for name in known:
            probe.load(name)
            want[name] = resident_bytes(probe, name)
        assert all(probe.entry(name).num_bytes == own[name] for name in known)
    room = lora_bytes(8) + lora_bytes(7) + 5 * OWN
    with pool_of(build("llama"), room, max_resident=6, host_bytes=3 * BYTES) as pool:
        registered(pool, known)
        for step in random_traffic(pool, list(known), seed=1, steps=1500):
            inside = [name for name in known if pool.is_resident(name)]
            needed = {pool.entry(name).factors for name in inside} - {None}
            stats = pool.statistics()
            assert all(factors.offsets is not None for factors in needed)
            assert stats.shared_sets >= len(needed)
            assert stats.device_used == sum(own[n] for n in inside) + stats.shared_bytes <= room
            assert stats.host_used <= 3 * BYTES
            if step % 10 == 0:
                assert all(resident_bytes(pool, n) == want[n] for n in inside)
        for name in known:
            pool.unregister(name)
        stats = pool.statistics()
        assert stats.device_used == stats.shared_bytes and stats.shared_saved == 0


def test_many_threads(xs):
    """Eight threads on a pool of one set's room: each finds its own adapter, bit for bit."""
    with registered(new_pool(build("llama"), max_resident=16), xs) as probe:
        want = {}
        for name in xs:
            probe.load(name)
            want[name] = resident_bytes(probe, name)
    room = BYTES + 3 * OWN
    with pool_of(build("llama"), room, max_resident=3, host_bytes=2 * BYTES) as pool:
        registered(pool, xs)

        def work(seed: int) -> int:
            rng, done = random.Random(seed), 0
            for _ in range(40):
                name = rng.choice(list(xs))
                try:
                    with pool.acquire([name]):
                        pool.begin_forward()
                        try:
                            assert resident_bytes(pool, name) == want[name]
                        finally:
                            pool.end_forward()
                        done += 1
                except PoolError:
                    pass  # the others' leases hold the other set
            return done

        with ThreadPoolExecutor(8) as threads:
            assert all(count > 0 for count in threads.map(work, range(8)))
        assert pool.statistics().in_use == 0


# ---- files that are not what they were ----------------------------------------------------------


def rewrite(folder: Path, change) -> None:
    """The folder with its tensors changed, and the sum that makes it whole again."""
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_config(folder, {**read_config(folder), "sha256": sha256_of(folder / WEIGHTS_FILE)})


def spoil(tensors: dict) -> None:
    next(t for key, t in tensors.items() if "_A" in key).view(-1)[-1] = float("nan")


def scale_factors(tensors: dict) -> None:
    for key, tensor in tensors.items():
        if "_B" in key:
            tensor.mul_(2)


def test_a_damaged_adapter_brings_nothing(tmp_path, xs):
    shutil.copytree(xs["a"], tmp_path / "bad")
    rewrite(tmp_path / "bad", spoil)
    model = build("llama")
    with registered(new_pool(model), {"bad": tmp_path / "bad", "b": xs["b"], "x": xs["x"]}) as pool:
        pool.load("x")
        before, memory = pool.statistics(), pool.tables[0].pool.clone()
        for names in (["bad"], ["bad", "b"], ["b", "bad"]):
            with pytest.raises(AdapterError, match="holds NaN or Inf"):
                pool.acquire(names)
            assert torch.equal(pool.tables[0].pool, memory) and resident(pool) == "x"
        after = pool.statistics()
        assert (after.in_use, after.shared_sets, after.failures) == (0, 1, before.failures + 3)
        pool.load("b")
        assert resident(pool) == "bx"


def test_other_factors_in_the_same_folder(tmp_path, xs):
    """Found out at the next reading; neither the others' factors nor the digest's are touched."""
    shutil.copytree(xs["a"], tmp_path / "a")
    shutil.copytree(xs["a"], tmp_path / "changed")
    rewrite(tmp_path / "changed", scale_factors)
    folders = {"a": tmp_path / "a", "b": xs["b"], "changed": tmp_path / "changed"}
    with registered(new_pool(build("llama"), host_bytes=BYTES + OWN), folders) as pool:
        pool.load("changed")
        want = resident_bytes(pool, "changed")
        pool.load("a")
        pool.load("b")  # host memory holds no bytes of a any more
        b = resident_bytes(pool, "b")
        pool.evict("a")
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copy(tmp_path / "changed" / file, tmp_path / "a" / file)
        with pytest.raises(AdapterError, match="'a': its fixed factors are not those that it had"):
            pool.load("a")
        assert not pool.is_resident("a") and pool.statistics().in_use == 0
        pool.load("a")  # now it is known as what it has become
        assert resident_bytes(pool, "a") == want and resident_bytes(pool, "b") == b
        assert pool.entry("a").factors is pool.entry("changed").factors


def test_a_failed_copy_gives_the_room_back(xs, monkeypatch):
    with registered(pool_of(build("llama"), 2 * BYTES), {"a": xs["a"], "b": xs["b"]}) as pool:
        write, calls = pool._residency.memory.write, []

        def out_of_memory(*args):
            calls.append(args)
            if len(calls) == 2:  # the adapter's own runs are there, and now its factors come
                raise MemoryError
            write(*args)

        monkeypatch.setattr(pool._residency.memory, "write", out_of_memory)
        with pytest.raises(MemoryError):
            pool.acquire(["a", "b"])
        monkeypatch.undo()
        stats = pool.statistics()
        assert (stats.device_used, stats.shared_sets, stats.in_use) == (0, 0, 0)
        pool.acquire(["a", "b"]).release()
        assert resident(pool) == "ab" and pool.statistics().shared_sets == 1


def test_first_use_by_many_threads_reads_it_once(xs):
    """Once for the digest, and once more to bring the factors."""
    with registered(new_pool(build("llama"), max_resident=8), {n: xs[n] for n in "ab"}) as pool:
        with ThreadPoolExecutor(8) as threads:
            leases = list(threads.map(lambda _: pool.acquire(["a", "b"]), range(8)))
        assert pool.statistics().disk_reads == 2 + 1 and pool.statistics().loads == 2
        for lease in leases:
            lease.release()
        pool.unregister("b")
        assert pool.statistics().shared_saved == 0
