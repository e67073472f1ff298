"""What a row gets does not depend on what fills the other rows.

At a fixed batch shape (rows and padded length) that holds bit for bit for logits and routes. At
other shapes the base model's own matrix products round differently, so there it holds bit for bit
for what our ops compute, and for the logits as far as the bare base keeps it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from pool_tools import KINDS, pool_of, save_adapter
from test_grouped_lora import Case, pool_inputs, run_pool
from test_prompt_router import in_pool, router_inputs
from tiny_models import VOCAB, build
from torch import Tensor

import milora
from milora import ops

DTYPES = [torch.float32, torch.bfloat16]
ROWS, WIDTH, STEPS = 6, 11, 2
GROUPS, MIXES = 15, 20  # for each dtype and each home of the adapters: 1,200 mixes in all
RANKS = {"lora": 4, "dora": 7, "lora_mini": 8, "no_router": 16, "bare_router": 1, "partial": 3}
TENANTS = (*KINDS, None)


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)  # many times as fast on a model this small


@dataclass
class Batch:
    """One prefill and the tokens of the steps after it."""

    ids: Tensor  # [ROWS, WIDTH]
    mask: Tensor
    names: list[str | None]
    answers: Tensor  # [ROWS, STEPS]


def random_batch(rng: random.Random, target: int | None = None) -> Batch:
    """One row is always padded: transformers drops a mask of ones and takes other kernels."""
    lengths = [rng.randint(1, WIDTH) for _ in range(ROWS)]
    padded = rng.choice([row for row in range(ROWS) if row != target])
    lengths[padded] = min(lengths[padded], WIDTH - 1)
    column = torch.arange(WIDTH)
    mask = torch.stack([column >= WIDTH - n for n in lengths])
    ids = torch.tensor([[rng.randrange(3, VOCAB) for _ in column] for _ in lengths])
    names = [rng.choice(TENANTS) for _ in lengths]
    if rng.random() < 0.2:  # one tenant's prompt many times, and nobody else
        names = [names[0]] * ROWS
    answers = torch.tensor([[rng.randrange(3, VOCAB) for _ in range(STEPS)] for _ in lengths])
    return Batch(ids.masked_fill(~mask, 0), mask.long(), names, answers)


def with_row(batch: Batch, row: int, other: Batch) -> Batch:
    """`batch` with everything of `other`'s row `row`."""
    for mine, theirs in zip(
        (batch.ids, batch.mask, batch.answers), (other.ids, other.mask, other.answers), strict=True
    ):
        mine[row] = theirs[row]
    batch.names[row] = other.names[row]
    return batch


@torch.no_grad()
def run(model, batch: Batch, *, adapters: bool = True):
    """Logits [ROWS, WIDTH + STEPS, VOCAB] of a prefill and of steps, and the route."""
    options = {"adapter_names": batch.names} if adapters else {}
    out = model(batch.ids, attention_mask=batch.mask, use_cache=True, **options)
    logits, cache, mask = [out.logits], out.past_key_values, batch.mask
    state = milora.routing_state(cache)
    for step in range(STEPS):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        tokens = batch.answers[:, step : step + 1]
        out = model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        logits.append(out.logits)
    return torch.cat(logits, 1), state


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for seed, (kind, options) in enumerate(KINDS.items(), 3):
        made[kind] = tmp_path_factory.mktemp(kind)
        save_adapter(made[kind], options, rank=RANKS[kind], seed=seed)
    return made


@pytest.fixture(params=["attached", "pooled"])
def tenants(request, folders):
    """Makes a model with every tenant; in the pool there is room for few, so they change places."""
    opened = []

    def make(dtype: torch.dtype):
        model = build("llama").to(dtype)
        if request.param == "attached":
            for kind, folder in folders.items():
                milora.load(model, folder, kind)
            return model
        with pool_of(build("llama").to(dtype), 1 << 20, max_resident=16) as probe:
            sizes = []
            for kind, folder in folders.items():
                probe.register(kind, folder)
                sizes.append(probe.entry(kind).num_bytes)
        pool = pool_of(model, sum(sizes), max_resident=7, host_bytes=4 << 20)
        opened.append(pool)
        for kind, folder in folders.items():
            pool.register(kind, folder)
        return model

    yield make
    for pool in opened:
        pool.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_at_a_fixed_shape(tenants, dtype):
    model, bare = tenants(dtype), build("llama").to(dtype)
    rng = random.Random(f"{dtype}")
    for group in range(GROUPS):
        row = rng.randrange(ROWS)
        fixed = random_batch(rng)
        fixed.names[row] = TENANTS[group % len(TENANTS)]
        attended = slice(int((fixed.mask[row] == 0).sum()), None)
        want = None
        for mix in range(MIXES):
            batch = with_row(random_batch(rng, row), row, fixed)
            if (pool := model._milora_runtime.pool) is not None and mix % 3 == 0:
                shuffle(rng, pool)
            logits, state = run(model, batch)
            got = [logits[row, attended]]
            if state is not None and fixed.names[row] is not None:
                got += [state.gates[:, row], state.probabilities[:, row], state.margins[:, row]]
            if want is None:
                want, others = got, logits
            assert len(got) == len(want)
            for mine, first in zip(got, want, strict=True):
                assert torch.equal(mine, first), f"{fixed.names[row]}, group {group}, mix {mix}"
            if mix == 1:
                assert not torch.equal(logits, others), "the other rows should differ"
            if mix % 4 == 0:  # bare rows are the bare model's, bit for bit
                plain, _ = run(bare, batch, adapters=False)
                for index in (i for i, name in enumerate(batch.names) if name is None):
                    at = slice(int((batch.mask[index] == 0).sum()), None)
                    assert torch.equal(logits[index, at], plain[index, at])


def shuffle(rng: random.Random, pool) -> None:
    """Let adapters lie elsewhere than before."""
    for name in rng.sample(list(KINDS), 3):
        pool.evict(name)
    for name in rng.sample(list(KINDS), 2):
        pool.load(name)
    if rng.random() < 0.5:
        pool.compact()


# ---- at any shape: the ops ----------------------------------------------------------------------

LORA = Case(
    "many",
    64,
    (1, 2, 3, 8, 17, 32, 64, 256),
    70,
    (48, 33, 65),
    tuple(i * 5 % 13 - 1 for i in range(64)),
    (0, 1, 2, 3, 4, 5, 6, 7, -1, 3, 6, 0),
)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_updates_at_any_shape(dora, dtype, isa):
    """Tokens in another company, order, number and shape, adapters elsewhere: the same bits."""
    inputs = pool_inputs(Case(**{**vars(LORA), "dora": dora}), dtype)
    want = run_pool(inputs)
    rng = random.Random(1)
    for _ in range(30):
        torch.set_num_threads(rng.choice((1, 2, 3)))
        tokens = rng.choices(range(64), k=rng.choice((1, 2, 7, 12, 32, 64, 130)))
        got = run_pool(rearranged(rng, inputs, tokens))
        for s in range(len(want)):
            assert torch.equal(got[s].flatten(0, -2), want[s][tokens])


def rearranged(rng: random.Random, inputs: dict, tokens: list[int]) -> dict:
    routes = list(range(len(inputs["adapter_of"])))
    slots = list(range(len(inputs["ranks"])))
    rng.shuffle(routes)  # new place -> old place
    rng.shuffle(slots)
    route_at = torch.tensor([routes.index(r) for r in range(len(routes))] + [-1])
    slot_at = torch.tensor([slots.index(s) for s in range(len(slots))] + [-1])
    gap = 16 * rng.randrange(5)
    pool = torch.cat([torch.full((gap,), 255, dtype=torch.uint8), inputs["pool"]])
    offsets = inputs["offsets"][slots]
    shape = (len(tokens),)
    if len(tokens) % 2 == 0 and rng.random() < 0.5:
        shape = (2, len(tokens) // 2)
    return {
        **inputs,
        "x": inputs["x"][tokens].view(*shape, -1),
        "y": [y[tokens].view(*shape, -1) for y in inputs["y"]],
        "pool": pool,
        "offsets": torch.where(offsets >= 0, offsets + gap, offsets),
        "ranks": inputs["ranks"][slots],
        "scales": inputs["scales"][slots],
        "gates": inputs["gates"][routes],
        "adapter_of": slot_at[inputs["adapter_of"][routes].long()].int(),
        "route_of": route_at[inputs["route_of"][tokens].long()].int(),
    }


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_routes_at_any_shape(dtype, isa):
    """Prompts in another company and order, routers elsewhere: the same bits."""
    inputs = in_pool(router_inputs(dtype, d=70))
    want = ops.prompt_router_pool(**inputs)
    rng = random.Random(1)
    prompts = len(inputs["spans"])
    for _ in range(25):
        torch.set_num_threads(rng.choice((1, 2, 3)))
        chosen = rng.choices(range(prompts), k=rng.choice((1, 2, 5, 20)))
        slots = list(range(len(inputs["codes"])))
        rng.shuffle(slots)
        slot_at = torch.tensor([slots.index(s) for s in range(len(slots))] + [-1])
        gap, pieces, spans, end = 16 * rng.randrange(5), [], [], 0
        for prompt in chosen:
            begin, stop = inputs["spans"][prompt].tolist()
            space = rng.randrange(3)
            pieces += [torch.full((space, 70), torch.nan, dtype=dtype), inputs["h"][begin:stop]]
            spans.append((end + space, end + space + stop - begin))
            end = spans[-1][1]
        offsets = inputs["offsets"][slots]
        got = ops.prompt_router_pool(
            torch.cat(pieces),
            torch.tensor(spans, dtype=torch.int32),
            slot_at[inputs["router_of"][chosen].long()].int(),
            torch.cat([torch.full((gap,), 255, dtype=torch.uint8), inputs["pool"]]),
            torch.where(offsets >= 0, offsets + gap, offsets),
            inputs["codes"][slots],
            inputs["num_experts"],
        )
        for mine, first in zip(got, want, strict=True):
            assert torch.equal(mine, first[chosen])


# ---- at other shapes: the logits ----------------------------------------------------------------


def spread(model, ids: Tensor, name: str | None, rng: random.Random) -> float:
    """How far the logits of a prompt's last token differ between batch shapes, by their size."""
    found = []
    for rows, padding in ((1, 0), (2, 0), (3, 2), (5, 5), (8, 1), (16, 9)):
        width = len(ids) + padding
        batch = torch.tensor([[rng.randrange(3, VOCAB) for _ in range(width)] for _ in range(rows)])
        mask = torch.ones_like(batch)
        row = rng.randrange(rows)
        batch[row, padding:], mask[row, :padding] = ids, 0
        names = [rng.choice(TENANTS) for _ in range(rows)]
        names[row] = name
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(
                batch,
                attention_mask=mask,
                position_ids=positions,
                adapter_names=names,
                use_cache=True,
            )
        found.append(out.logits[row, -1].double())
    found = torch.stack(found)
    return ((found - found[0]).abs().max() / found.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_at_other_shapes_differ_as_the_bases_do(tenants, dtype):
    model = tenants(dtype)
    rng = random.Random(3)
    prompts = [torch.tensor([rng.randrange(3, VOCAB) for _ in range(n)]) for n in (1, 4, 9, 16, 30)]
    worst = {name: max(spread(model, ids, name, rng) for ids in prompts) for name in TENANTS}
    assert worst[None] > 0, "the base should not be the same at every shape"
    # Twice, as in tests/tolerance.py: one model's roundings are never quite another's.
    assert max(worst.values()) <= 2 * worst[None], worst
