"""Sizes, places in memory and numbers at the edge of what ops take, on each instruction set.

`test_sanitizers.py` runs this file once more with guards around every tensor. So tensors here are
as large as their contents and no larger, unless a test is about what stands beside them.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from test_grouped_lora import (
    Case,
    check_pool_case,
    pool_inputs,
    reference_at_dtype,
    run_pool,
    run_train,
    train_inputs,
)
from test_prompt_router import check as check_router
from test_prompt_router import in_pool, router_inputs
from test_prompt_router import run as run_router
from tolerance import assert_as_good_as_torch

from milora import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = (1, 2, 3, 7, 9, 16, 17, 31, 33, 65)
INT32 = 2**31 - 1


def exact(t: torch.Tensor, shift: int) -> torch.Tensor:
    """A copy [rows, d] whose first element stands `shift` elements into its memory, and whose last
    one ends it: aligned to nothing but the element."""
    memory = torch.empty(shift + t.numel(), dtype=t.dtype)
    memory[shift:] = t.flatten()
    return memory[shift:].view(t.shape)


def skip_exact(t: torch.Tensor, gap: int) -> torch.Tensor:
    """A copy with rows `gap` elements apart; nothing stands after the last row."""
    rows, d = t.shape
    memory = torch.full((rows * (d + gap),), torch.nan, dtype=t.dtype)
    view = memory.as_strided((rows, d), (d + gap, 1), gap)
    view.copy_(t)
    return view


# ---- grouped_lora_ ------------------------------------------------------------------------------

POOL = [
    Case("no_tokens", 0, (8, 3), 17, (9, 31), (0,), (0, 1)),
    Case("no_routes", 5, (4,), 17, (9,), (-1,), ()),
    Case("rank_1", 3, (1,), 1, (1,), (0,), (0,)),
    Case("rank_256", 5, (256, 1, 255), 33, (7, 129), (0, 1, 2), (0, 1, 2)),
    Case("all_slices", 4, (5,), 19, tuple(range(1, 17)), (0,), (0,)),
    Case("all_zero_ranks", 4, (0, 0), 19, (8,), (0, 1), (0, 1)),
    Case("dora_odd", 6, (1, 3), 5, (1, 17), (0, 1), (0, 1), dora=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", POOL, ids=str)
def test_pool_edges(case, dtype, isa):
    check_pool_case(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_without_adapters(dtype, isa):
    inputs = pool_inputs(Case("bare", 5, (4,), 17, (9,), (0, 1, -1), (-1, -1)), dtype)
    for name in ("offsets", "ranks", "scales"):
        inputs[name] = inputs[name][:0]
    inputs["pool"] = inputs["pool"][:0]
    assert torch.equal(run_pool(inputs)[0], inputs["y"][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_widths(dtype, isa):
    """Every remainder of a vector register, in and out, for one row and for several."""
    for (i, d_in), rows in itertools.product(enumerate(WIDTHS), (1, 5)):
        d_out = WIDTHS[(i * 3 + 4) % len(WIDTHS)]
        check_pool_case(Case(f"{d_in}", rows, (3, 17), d_in, (d_out,), (0, 1), (0, 1)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["shift_1", "shift_3", "gap_1", "gap_5"])
def test_pool_unaligned_rows(place, dtype, isa):
    """Rows that start anywhere: the same bits as aligned ones, and what lies between is kept."""
    how, number = place.split("_")
    move = {"shift": exact, "gap": skip_exact}[how]
    inputs = pool_inputs(Case("rows", 9, (5, 32), 37, (41, 66), (0, 1, 1), (0, 1)), dtype)
    want = run_pool(inputs)
    y = [move(t, int(number)) for t in inputs["y"]]
    before = [memory_of(t) for t in y]
    ops.grouped_lora_(**{**inputs, "y": y, "x": move(inputs["x"], int(number))})
    for s, got in enumerate(y):
        assert torch.equal(got, want[s])
        got.copy_(inputs["y"][s])  # with the rows put back, all of the memory is as it was
        assert torch.equal(memory_of(got), before[s])


def memory_of(t: torch.Tensor) -> torch.Tensor:
    return torch.tensor(t.untyped_storage().tolist(), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_that_starts_on_16_bytes_only(dtype, isa):
    inputs = pool_inputs(Case("pool", 7, (3, 9), 21, (13,), (0, 1), (0, 1)), dtype)
    want = run_pool(inputs)
    for shift in (16, 32, 48):
        memory = torch.empty(shift + inputs["pool"].numel(), dtype=torch.uint8)
        memory[shift:] = inputs["pool"]
        assert torch.equal(run_pool({**inputs, "pool": memory[shift:]})[0], want[0])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_pool_huge_batch(threads, isa):
    """20,000 tokens of 600 adapters: a row gets what it gets alone."""
    torch.set_num_threads(threads)
    ranks = tuple(1 + i % 9 for i in range(600))
    adapters = tuple((i * 37) % 601 - 1 for i in range(3000))
    routes = tuple((i * 7) % 3001 - 1 for i in range(3001))
    inputs = pool_inputs(Case("huge", 20_000, ranks, 9, (11,), routes, adapters), torch.bfloat16)
    together = run_pool(inputs)[0]
    for token in range(0, 20_000, 1777):
        at = slice(token, token + 1)
        alone = {**inputs, "y": [inputs["y"][0][at]], "x": inputs["x"][at]}
        got = run_pool({**alone, "route_of": inputs["route_of"][at]})[0]
        assert torch.equal(got[0], together[token])


def test_pool_long_prompts(isa):
    """Thousands of tokens of one adapter, and one token of another."""
    routes = (0,) * 4097 + (1,) + (2,) * 999
    inputs = pool_inputs(Case("long", 5097, (33, 16), 65, (70,), routes, (0, 1, 0)), torch.float32)
    together = run_pool(inputs)[0]
    for token in (0, 1, 31, 32, 4095, 4096, 4097, 4098, 5096):
        at = slice(token, token + 1)
        alone = {**inputs, "y": [inputs["y"][0][at]], "x": inputs["x"][at]}
        got = run_pool({**alone, "route_of": inputs["route_of"][at]})[0]
        assert torch.equal(got[0], together[token])


def test_pool_values_that_are_no_numbers(isa):
    """NaN and infinities in a row, a gate or an adapter stay with the rows that use them."""
    inputs = pool_inputs(
        Case("nan", 8, (5, 6), 19, (23,), (0, 1, 2, 3), (0, 1, 0, 1)), torch.float32
    )
    clean = run_pool(inputs)[0]
    x = inputs["x"].clone()
    x[0, 3] = torch.nan
    x[5, 18] = torch.inf
    gates = inputs["gates"].clone()
    gates[2] = torch.nan
    dirty = run_pool({**inputs, "x": x, "gates": gates})[0]
    for row in range(8):
        is_clean = row not in (0, 5, 2, 6)
        assert torch.equal(dirty[row], clean[row]) == is_clean
    assert dirty[[0, 2, 6]].isnan().all()


HOSTILE = (-(2**31), -2, -1, 0, 1, 255, 256, 257, INT32)
HOSTILE_OFFSETS = (-(2**63), -16, -1, 0, 8, 16, 2**31, 2**40, 2**62, 2**63 - 16, 2**63 - 1)


@pytest.mark.parametrize("seed", range(4))
def test_pool_refuses_hostile_tables(seed, isa):
    """Random numbers in the tables: an error in words, or a result; never a wild read."""
    rng = random.Random(seed)
    refused = 0
    for _ in range(60):
        inputs = pool_inputs(
            Case("hostile", 6, (3, 8), 12, (10, 7), (0, 1, -1), (0, 1)), torch.float32
        )
        for name, values in (
            ("ranks", HOSTILE),
            ("route_of", HOSTILE),
            ("adapter_of", HOSTILE),
            ("offsets", HOSTILE_OFFSETS),
        ):
            if rng.random() < 0.5:
                table = inputs[name].flatten()
                table[rng.randrange(len(table))] = rng.choice(values)
        try:
            ops.grouped_lora_(**inputs)
        except RuntimeError as error:
            assert str(error).startswith("grouped_lora_: "), error
            refused += 1
    assert 20 < refused < 60


# ---- grouped_lora and its backward --------------------------------------------------------------

TRAIN = [
    Case("no_tokens", 0, (8,), 17, (9,), (0,), (0,)),
    Case("rank_1", 3, (1,), 1, (1,), (0,), (0,)),
    Case("rank_256", 5, (256, 1, 255), 33, (129,), (0, 1, 2), (0, 1, 2)),
    Case("odd", 37, (7, 31), 63, (65,), (0, 1, 2), (0, 1, 0)),
    Case("strided_odd", 33, (7, 31), 61, (35,), (0, 1), (0, 1), strided=True),
]


def check_train(case: Case, dtype: torch.dtype) -> None:
    """Against the reference, with numbers above zero: the tolerance policy measures roundings of
    the largest number of a result, and where a result is a single sum that cancels there is none.
    """
    leaves, rest = train_inputs(case, dtype)
    leaves = [t.abs_() for t in leaves]
    dout = torch.rand(case.num_tokens, case.d_out[0]).to(dtype)
    actual = run_train(ops.grouped_lora, leaves, rest, dout)
    expected = run_train(reference.grouped_lora, leaves, rest, dout, torch.float64)
    same_dtype = run_train(reference_at_dtype, leaves, rest, dout)
    for i, (got, want, torch_result) in enumerate(zip(actual, expected, same_dtype, strict=True)):
        assert_as_good_as_torch(got, want, torch_result, f"{case}: result {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TRAIN, ids=str)
def test_train_edges(case, dtype, isa):
    check_train(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_train_widths(dtype, isa):
    for i, d_in in enumerate(WIDTHS):
        d_out, rows = WIDTHS[(i * 3 + 4) % len(WIDTHS)], (6, 1)[i % 2]
        check_train(Case(f"{d_in}", rows, (3, 17), d_in, (d_out,), (0, 1), (0, 1)), dtype)


@pytest.mark.parametrize("num_routes", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_train_without_adapters(num_routes, dtype, isa):
    y, x = torch.randn(5, 9).to(dtype), torch.randn(5, 17).to(dtype)
    route_of = torch.tensor([-1, 0, 1, 0, -1] if num_routes else [-1] * 5, dtype=torch.int32)
    adapter_of = torch.full((num_routes,), -1, dtype=torch.int32)
    out = ops.grouped_lora(y, x, [], [], [], torch.rand(num_routes), route_of, adapter_of)
    assert torch.equal(out, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 3])
def test_train_unaligned_rows(shift, dtype, isa):
    leaves, rest = train_inputs(Case("rows", 9, (5, 32), 37, (41,), (0, 1, 1), (0, 1)), dtype)
    dout = torch.randn(9, 41).to(dtype)
    want = run_train(ops.grouped_lora, leaves, rest, dout)
    moved = [exact(t, shift) if t.dim() == 2 else t for t in leaves]
    got = run_train(ops.grouped_lora, moved, rest, skip_exact(dout, shift))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("threads", [1, 5])
def test_train_huge_batch(threads, isa):
    """8,000 tokens of 300 adapters in one call against one call for each of some adapters."""
    torch.set_num_threads(threads)
    ranks = tuple(1 + i % 5 for i in range(300))
    routes = tuple((i * 7) % 900 for i in range(900))
    case = Case("huge", 8_000, ranks, 9, (11,), routes, tuple(i % 300 for i in range(900)))
    leaves, rest = train_inputs(case, torch.float32)
    dout = torch.randn(8_000, 11)
    together = run_train(ops.grouped_lora, leaves, rest, dout)
    for adapter in (0, 137, 299):
        rows = (rest[2][rest[1].long()] == adapter).nonzero()[:, 0]
        alone = run_train(
            ops.grouped_lora,
            [leaves[0][rows], leaves[1][rows], *leaves[2:]],
            [rest[0], rest[1][rows], rest[2]],
            dout[rows],
        )
        for index in (0, 2):  # out, dx
            assert torch.equal(alone[index], together[index][rows])
        for index in (4 + adapter, 304 + adapter):  # dA, dB
            assert torch.equal(alone[index], together[index])


def test_train_gradients_that_are_not_contiguous(isa):
    """The gradient of a sum is one number, seen as a matrix."""
    leaves, rest = train_inputs(Case("sum", 6, (3, 4), 10, (9,), (0, 1), (0, 1)), torch.float32)
    one = torch.ones(())
    want = run_train(ops.grouped_lora, leaves, rest, torch.ones(6, 9))
    got = run_train(ops.grouped_lora, leaves, rest, one.expand(6, 9))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    transposed = torch.randn(9, 6)
    want = run_train(ops.grouped_lora, leaves, rest, transposed.T.contiguous())
    got = run_train(ops.grouped_lora, leaves, rest, transposed.T)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("seed", range(2))
def test_train_refuses_hostile_tables(seed, isa):
    rng = random.Random(seed)
    refused = 0
    for _ in range(50):
        leaves, (scales, route_of, adapter_of) = train_inputs(
            Case("hostile", 6, (3, 8), 12, (10,), (0, 1, -1), (0, 1)), torch.float32
        )
        for table in (route_of, adapter_of):
            if rng.random() < 0.5:
                table[rng.randrange(len(table))] = rng.choice(HOSTILE)
        try:
            ops.grouped_lora(
                *leaves[:2], leaves[3:5], leaves[5:], scales, leaves[2], route_of, adapter_of
            )
        except RuntimeError as error:
            assert str(error).startswith("grouped_lora: "), error
            refused += 1
    assert 10 < refused < 50


# ---- prompt_router ------------------------------------------------------------------------------

ROUTER = {
    "no_tokens": {"spans": [(0, 0)] * 3, "num_tokens": 0},
    "one_wide": {"d": 1, "spans": [(0, 1), (1, 3)], "num_tokens": 3},
    "odd": {"d": 17, "spans": [(0, 31), (31, 64), (65, 66)], "num_tokens": 67},
    "wide": {"d": 261, "spans": [(0, 33), (34, 35)], "num_tokens": 35},
    "long": {"d": 5, "spans": [(0, 4097), (4097, 4098)], "num_tokens": 4098},
    "many": {"d": 3, "spans": [(i, i + 1) for i in range(40)], "num_tokens": 40},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUTER)
def test_router_edges(name, dtype, isa):
    check_router(router_inputs(dtype, **ROUTER[name]))


@pytest.mark.parametrize("num_tokens", [0, 9])
def test_router_without_prompts(num_tokens, isa):
    outputs = run_router(ops.prompt_router, router_inputs(spans=[], num_tokens=num_tokens))
    assert [t.shape[0] for t in outputs[:4]] == [0, 0, 0, num_tokens]
    assert not any(t.any() for t in outputs)


def test_router_widths(isa):
    spans = [(0, 33), (34, 35), (36, 40)]
    for d in WIDTHS[3:]:  # narrower ones are single sums, which may cancel
        check_router(router_inputs(torch.bfloat16, d=d, spans=spans, num_tokens=40))


@pytest.mark.parametrize("num_experts", [1, 2, 63, 64])
def test_router_numbers_of_experts(num_experts, isa):
    codes = [
        (pooler, pooler % 3, pooler % 2, gate, min(1 + 31 * gate, num_experts), num_experts)
        for pooler in range(4)
        for gate in range(3)
    ]
    inputs = router_inputs(codes=codes)
    inputs["w_r"] = torch.randn(len(codes), num_experts, 37) / 6
    check_router(inputs)


@pytest.mark.parametrize("shift", [1, 3])
def test_router_unaligned_rows(shift, isa):
    inputs = router_inputs(torch.bfloat16, d=33)
    h = inputs["h"].contiguous()
    want = ops.prompt_router(**{**inputs, "h": h})
    for moved in (exact(h, shift), skip_exact(h, shift)):
        got = ops.prompt_router(**{**inputs, "h": moved})
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("function", ["prompt_router", "prompt_router_pool"])
@pytest.mark.parametrize("seed", range(3))
def test_router_refuses_hostile_tables(seed, function, isa):
    rng = random.Random(seed)
    codes = [(0, 0, 0, 0, 3, 7), (1, 1, 1, 1, 2, 5), (2, 2, 0, 2, 1, 1), (3, 0, 1, 0, 7, 7)]
    refused = 0
    for _ in range(60):
        inputs = router_inputs(d=5, spans=[(0, 3), (3, 4), (6, 9)], codes=codes, num_tokens=9)
        if function == "prompt_router_pool":
            inputs = in_pool(inputs)
        for name in ("spans", "router_of", "codes", "offsets"):
            if name in inputs and rng.random() < 0.5:
                table = inputs[name].flatten()
                values = HOSTILE_OFFSETS if name == "offsets" else HOSTILE
                table[rng.randrange(len(table))] = rng.choice(values)
        try:
            getattr(ops, function)(**inputs)
        except RuntimeError as error:
            assert str(error).startswith(f"{function}: "), error
            refused += 1
    assert 10 < refused < 60


def test_router_hidden_states_that_are_no_numbers(isa):
    """A prompt of NaN or infinities leaves the other prompts' numbers alone."""
    spans = [(0, 4), (4, 8), (8, 12)]
    inputs = router_inputs(d=9, spans=spans, codes=[(0, 0, 0, 0, 3, 7)] * 3, num_tokens=12)
    inputs["router_of"] = torch.arange(3, dtype=torch.int32)
    clean = ops.prompt_router(**inputs)
    for value in (torch.nan, torch.inf, -torch.inf):
        h = inputs["h"].clone()
        h[5, 3] = value
        dirty = ops.prompt_router(**{**inputs, "h": h})
        for got, want in zip(dirty, clean, strict=True):
            assert torch.equal(got[[0, 2]], want[[0, 2]])
        assert dirty[2][1].isnan().any()
    assert reference.prompt_router(**{**inputs, "h": h})[2][1].isnan().any()
