"""The per-rank gates of grouped_lora_: against the reference, at its edges, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_grouped_lora import (
    CASES,
    DTYPES,
    PATHS,
    Case,
    check_pool_inputs,
    pool_inputs,
    run_pool,
    to_device,
)
from test_op_edges import POOL, exact, skip_exact

from milora import ops

EDGES = [case for case in CASES + POOL if max(case.ranks) > 0]
MIXED = Case("mixed", 60, (32, 7, 64), 130, (200, 33), (0,) * 25 + (1, 2, 0, 1) * 10, (0, 1, 2))
SHAPES = Case("shapes", 70, (32, 256), 520, (600, 70), (0,) * 50 + (1,) * 20, (0, 1))
ROWS = Case("rows", 9, (5, 32), 37, (41, 66), (0, 1, 1), (0, 1))


def gated_inputs(case: Case, dtype: torch.dtype, wider: int = 3) -> dict:
    """`pool_inputs` with gates; NaN where no rank of the token's expert stands. Some are 0."""
    inputs = pool_inputs(case, dtype)
    width = min(max(case.ranks) + wider, ops.MAX_RANK)
    gates = torch.randn(case.num_tokens, len(case.d_out), width)
    gates[torch.rand(gates.shape) < 0.3] = 0
    for t, route in enumerate(inputs["route_of"].tolist()):
        adapter = inputs["adapter_of"][route] if route >= 0 else -1
        gates[t, :, case.ranks[adapter] if adapter >= 0 else 0 :] = torch.nan
    return {**inputs, "rank_gates": gates}


def rows_of(inputs: dict, rows) -> dict:
    named = {name: inputs[name][rows] for name in ("x", "route_of", "rank_gates")}
    return {**inputs, **named, "y": [y[rows] for y in inputs["y"]]}


def check_rows_alone(inputs: dict) -> None:
    """Each token alone has the bits that it has among all."""
    together = run_pool(inputs)
    for t in range(0, len(inputs["x"]), 7):
        for s, y in enumerate(run_pool(rows_of(inputs, slice(t, t + 1)))):
            assert torch.equal(y[0], together[s][t]), f"token {t}, slice {s}"


def check_batch_shapes(inputs: dict) -> None:
    """Shrinks that are cut by ranks, by rows, or not at all, on any number of threads."""
    together, num_tokens = run_pool(inputs), len(inputs["x"])
    for count in (1, 2, 5, 12, 17, 65, 70):
        tokens = torch.randperm(num_tokens)[:count]
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for s, y in enumerate(run_pool(rows_of(inputs, tokens))):
                assert torch.equal(y, together[s][tokens]), f"{count} rows, slice {s}"


def check_strides(inputs: dict) -> None:
    """Rows of x and y that start anywhere: the same bits."""
    want = run_pool(inputs)
    for move in (exact, skip_exact):
        y = [move(t, 3) for t in inputs["y"]]
        ops.grouped_lora_(**{**inputs, "y": y, "x": move(inputs["x"], 1)})
        assert all(torch.equal(got, t) for got, t in zip(y, want, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_against_reference(case, dtype, path, device):
    check_pool_inputs(gated_inputs(case, dtype), device, path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd_sizes", "rank_mix", "tile_plus_one", "dora", "long_run"])
def test_on_each_isa(name, dtype, isa):
    case = next(case for case in CASES if case.name == name)
    check_pool_inputs(gated_inputs(case, dtype))
    check_pool_inputs(gated_inputs(case, dtype, wider=0))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_one_change_no_bit(dtype, path, device):
    inputs = to_device(pool_inputs(MIXED, dtype), device) | {"path": path}
    ones = torch.ones(MIXED.num_tokens, 2, 64, device=device)
    for got, want in zip(run_pool({**inputs, "rank_gates": ones}), run_pool(inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefix_gates_are_a_smaller_rank(dtype, isa):
    """Ranks with gate 0 at the end: the bits of a pool that has no such ranks."""
    inputs = pool_inputs(replace(MIXED, ranks=(32, 32, 32)), dtype)
    gates = torch.ones(MIXED.num_tokens, 2, 32)
    gates[:, :, 20:] = 0
    cut = {**inputs, "ranks": inputs["ranks"].clamp(max=20)}
    for got, want in zip(run_pool({**inputs, "rank_gates": gates}), run_pool(cut), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_batch_invariant(dtype, path, device):
    check_rows_alone(to_device(gated_inputs(MIXED, dtype), device) | {"path": path})


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_at_any_batch_shape_and_thread_count(dtype, isa):
    check_batch_shapes(gated_inputs(SHAPES, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_start_anywhere(dtype, isa):
    check_strides(gated_inputs(ROWS, dtype))


def test_nan_in_a_gate_stays_with_its_row(isa):
    inputs = gated_inputs(MIXED, torch.float32)
    clean = run_pool(inputs)[0]
    inputs["rank_gates"][3, 0, 1] = torch.nan
    dirty = run_pool(inputs)[0]
    rows = torch.arange(MIXED.num_tokens) != 3
    assert torch.equal(dirty[rows], clean[rows]) and dirty[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    inputs = gated_inputs(CASES[2], dtype)
    inputs["rank_gates"] = inputs["rank_gates"].nan_to_num()  # opcheck compares its inputs
    gates = inputs.pop("rank_gates")
    op = torch.ops.milora.grouped_lora_.default
    torch.library.opcheck(op, tuple(inputs.values()), {"rank_gates": gates})


@pytest.mark.parametrize(
    "gates, message",
    [
        (torch.ones(7, 2, 5).double(), "rank_gates must be Float, got Double"),
        (
            torch.ones(7, 5),
            r"rank_gates must be \[num_tokens, num_slices, max_rank\] = \[7, 2, any\], "
            r"got \[7, 5\]",
        ),
        (torch.ones(7, 3, 5), r"rank_gates must be .* got \[7, 3, 5\]"),
        (torch.ones(6, 2, 5), r"rank_gates must be .* got \[6, 2, 5\]"),
        (torch.ones(7, 2, 10)[:, :, ::2], "rank_gates must be contiguous"),
        (torch.ones(7, 2, 0), "rank_gates must have 1 to 256 columns, got 0"),
        (torch.ones(7, 2, 257), "rank_gates must have 1 to 256 columns, got 257"),
        (
            torch.ones(7, 2, 4),
            r"rank_gates must have a column for each rank \(5 for adapter 1, expert 2\), got 4",
        ),
    ],
)
def test_errors(gates, message):
    with pytest.raises(RuntimeError, match="^grouped_lora_: " + message):
        ops.grouped_lora_(**{**pool_inputs(CASES[2], torch.float32), "rank_gates": gates})


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("path", PATHS)
def test_cuda_leaves_rows_with_too_few_gates_alone(path, device):
    inputs = to_device(pool_inputs(CASES[2], torch.float32), device) | {"path": path}
    gates = torch.ones(7, 2, 4, device=device)
    for got, y in zip(run_pool({**inputs, "rank_gates": gates}), inputs["y"], strict=True):
        assert torch.equal(got[1::2], y[1::2]) and not torch.equal(got[::2], y[::2])


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("path", PATHS)
def test_replays_in_a_cuda_graph(path, device):
    from test_cuda_graphs import capture

    inputs = to_device(gated_inputs(MIXED, torch.bfloat16), device)
    start = [t.clone() for t in inputs["y"]]

    def call():
        for y, value in zip(inputs["y"], start, strict=True):
            y.copy_(value)
        ops.grouped_lora_(**inputs, path=path)

    graph = capture(call)
    inputs["rank_gates"].copy_(inputs["rank_gates"].flip(0).nan_to_num(0.5))
    call()
    want = [t.clone() for t in inputs["y"]]
    for y in inputs["y"]:
        y.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(got, t) for got, t in zip(inputs["y"], want, strict=True))
