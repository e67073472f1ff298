"""Adapter folders for the pool's tests, and reading resident adapters back through the tables."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_models import build, randomize
from torch import Tensor

import milora
from milora import AdapterPool, MiLoRAConfig, PoolError
from milora.packing import row_bytes
from milora.reference import read_pool

MINI = {"expert": "lora_mini", "expert_options": {"inner_in": 6, "inner_out": 5}}
KINDS = {
    "lora": {},
    "dora": {"expert": "dora"},
    "lora_mini": MINI,
    "no_router": {"router": False, "alpha": 12.0},
    "bare_router": {"pooler": "mean", "activation": ["relu", "gelu"], "gate": "hard", "top_k": 2},
    "partial": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, "mlp.up_proj": 5},
        "rslora": True,
        "router_norm": "rms",
    },
}


def save_adapter(folder: Path, options: dict, *, rank: int = 4, seed: int = 1, family="llama"):
    """A random adapter in `folder`, made on a model of its own. Returns: that model."""
    model = build(family)
    milora.attach(model, MiLoRAConfig(**{"rank": rank, "seed": seed, **options}))
    milora.save(randomize(model, seed=seed), folder)
    return model


def new_pool(model, **options) -> AdapterPool:
    """A small pool: 1 MiB, 4 slots."""
    return AdapterPool(
        model, **{"device_bytes": 1 << 20, "host_bytes": 1 << 20, "max_resident": 4, **options}
    )


def pool_of(model, num_bytes: int, *, max_resident: int = 4, **options) -> AdapterPool:
    """A pool with `num_bytes` for adapters, beside its tables."""
    with new_pool(model, max_resident=max_resident) as probe:
        overhead = probe.statistics().device_bytes - probe.statistics().device_free
    return new_pool(model, device_bytes=num_bytes + overhead, max_resident=max_resident, **options)


def expert_runs(pool: AdapterPool, name: str) -> dict[tuple[int, int], tuple]:
    """By block and column: A, B, scale and u, v (None where absent), as the tables show them."""
    runtime = pool._runtime
    slot = pool.entry(name).slot
    found = {}
    for index, tables in enumerate(pool.tables):
        linears = {linear.column: linear for linear in runtime.linears[index]}
        for column, linear in linears.items():
            rank = int(tables.ranks[slot, column])
            at_a, at_b, at_u, at_v, at_core = tables.offsets[slot, column].tolist()
            if rank == 0:
                assert (at_a, at_b, at_u, at_v, at_core) == (-1,) * 5
                continue
            dtype = pool.dtypes[index][column]
            a = read_pool(tables.pool, at_a, rank, linear.d_in, dtype)
            bt = read_pool(tables.pool, at_b, rank, linear.d_out, dtype)
            assert at_a % 64 == at_b % 64 == 0
            u, v = (
                None if at < 0 else read_pool(tables.pool, at, 1, linear.d_out, torch.float32)[0]
                for at in (at_u, at_v)
            )
            found[index, column] = (a, bt.T, float(tables.scales[slot, column]), u, v)
    return found


def router_runs(pool: AdapterPool, name: str) -> list[dict[str, Tensor] | None]:
    """Per block: the router's parameters and codes, None where the adapter has none."""
    slot = pool.entry(name).slot
    found: list[dict[str, Tensor] | None] = []
    for tables in pool.tables:
        offsets = tables.router_offsets[slot].tolist()
        if offsets == [-1, -1, -1]:
            found.append(None)
            continue
        codes = tables.router_codes[slot]
        shapes = {"w_sa": (1, 32), "w_r": (int(codes[5]), 32), "theta": (1, 12)}
        parameters = {
            part: read_pool(tables.pool, at, *shapes[part], torch.float32)
            for (part, at) in zip(shapes, offsets, strict=True)
            if at >= 0
        }
        found.append({**parameters, "codes": codes})
    return found


def resident_bytes(pool: AdapterPool, name: str) -> bytes:
    """All bytes of a resident adapter's runs, in the layout's order."""
    entry = pool.entry(name)
    memory = pool.tables[0].pool
    layout = entry.layout
    offsets = [*(entry.factors.offsets if entry.factors else []), *entry.offsets]
    return b"".join(
        memory[offset : offset + size].cpu().numpy().tobytes()
        for offset, size in zip(offsets, [*layout.factors.sizes, *layout.own.sizes], strict=True)
    )


def lora_bytes(rank: int, *, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a tiny Llama's router-less LoRA adapter, computed apart from the product."""
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    total = 0
    for d_in, d_out in shapes:
        for d in (d_in, d_out):
            total += -(-rank * row_bytes(d, dtype) // 64) * 64
    return 2 * total


PLAIN = {"router": False}
BYTES = lora_bytes(4)


def same_size_folders(tmp_path_factory) -> dict[str, Path]:
    """Adapters a to f of `BYTES` each, and L of `lora_bytes(8)`."""
    made = {}
    for seed, name in enumerate("abcdefL"):
        made[name] = tmp_path_factory.mktemp(name)
        save_adapter(made[name], PLAIN, seed=seed + 1, rank=8 if name == "L" else 4)
    return made


def three_of_seven(folders: dict[str, Path]) -> AdapterPool:
    """Room for three of the adapters of `same_size_folders`, all registered."""
    pool = pool_of(build("llama"), 3 * BYTES, host_bytes=20 * BYTES)
    for name, folder in folders.items():
        pool.register(name, folder)
    return pool


def resident(pool: AdapterPool) -> str:
    return "".join(name for name in pool if pool.is_resident(name))


def random_traffic(pool: AdapterPool, names: list[str], seed: int, steps: int) -> Iterator[int]:
    """Acquire, release, load, evict, pin and compact at random; up to three leases at a time.

    Yields: the step's number, after each. Leaves no lease and no pin, and has met refusals and
        compactions in number.
    """
    rng = random.Random(seed)
    leases, refused = [], 0
    for step in range(steps):
        name = rng.choice(names)
        try:
            match rng.randrange(9):
                case 0 | 1 | 2:
                    leases.append(pool.acquire(rng.sample(names, rng.randint(1, 3))))
                case 3 | 4 if leases:
                    leases.pop(rng.randrange(len(leases))).release()
                case 5:
                    pool.load(name)
                case 6:
                    pool.evict(name)
                case 7:
                    pool.pin(name) if rng.random() < 0.2 else pool.unpin(name)
                case 8 if rng.random() < 0.2:
                    pool.compact()
        except PoolError:
            refused += 1
        if len(leases) > 3:
            leases.pop(0).release()
        yield step
    assert refused > steps // 30 and pool.statistics().compactions > 5, pool.statistics()
    for lease in leases:
        lease.release()
    for name in names:
        pool.unpin(name)
