"""CUDA kernels on the emulator (tests/cuda_emulator): the same cases, against float64.

This shows that indices, fragments, barriers and the order of copies are right, on a machine without
a GPU. It says nothing about speed.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from cuda_emulation import DTYPE_CODES, PoolArguments, address, build
from test_grouped_lora import (
    CASES,
    DTYPES,
    Case,
    clone_strided,
    pool_inputs,
    reference_at_dtype,
    run_train,
    train_inputs,
)
from test_rank_gates import gated_inputs
from tolerance import assert_as_good_as_torch

from milora import reference

TILE_ROWS = 64


@pytest.fixture(scope="module")
def prefill(tmp_path_factory):
    library = build("prefill", tmp_path_factory.mktemp("emulator"))
    library.emulate_prefill.restype = ctypes.c_int64

    def run(inputs: dict, blocks: int = 3, descending: bool = False):
        """y after the op; the plan's tiles: first, rows, route, adapter, slices, number of jobs."""
        inputs = {**inputs, "y": [clone_strided(t) for t in inputs["y"]]}
        arguments = PoolArguments(inputs)
        capacity = max(len(inputs["x"]), 1)
        plan = torch.full((capacity, 6), -1)
        count = library.emulate_prefill(
            ctypes.byref(arguments), blocks, descending, address(plan), ctypes.c_int64(capacity)
        )
        return inputs["y"], plan[:count]

    return run


MORE_CASES = [
    Case("two_splits", 70, (40, 16), 1100, (90,), (0,) * 66 + (1,) * 4, (0, 1)),
    Case("siblings", 20, (32, 17), 72, (64, 1032, 8), (0,) * 9 + (1,) * 11, (0, 1)),
    Case("two_passes", 18, (100, 3), 64, (40, 48), (0, 1, 1), (0, 1)),
]


def check(run, case: Case, dtype: torch.dtype, **options) -> None:
    check_inputs(run, pool_inputs(case, dtype), **options)


def check_inputs(run, inputs: dict, **options) -> None:
    dtype = inputs["x"].dtype
    actual, _ = run(inputs, **options)
    expected = [t.double() for t in inputs["y"]]
    reference.grouped_lora_(
        **{**inputs, "y": expected, "x": inputs["x"].double()}, pool_dtype=dtype
    )
    same_dtype = [t.clone() for t in inputs["y"]]
    reference.grouped_lora_(**{**inputs, "y": same_dtype})
    for s, got in enumerate(actual):
        assert_as_good_as_torch(got, expected[s], same_dtype[s], f"slice {s}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [case for case in CASES + MORE_CASES if case.num_tokens > 0], ids=str
)
def test_prefill_against_reference(prefill, case, dtype):
    check(prefill, case, dtype)
    if case.name in ("two_splits", "siblings", "two_passes"):
        check(prefill, case, dtype, blocks=1, descending=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rank_mix", "bare_rows", "dora", "two_splits", "siblings"])
def test_prefill_with_rank_gates(prefill, name, dtype):
    case = next(case for case in CASES + MORE_CASES if case.name == name)
    check_inputs(prefill, gated_inputs(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_is_batch_invariant(prefill, dtype):
    case = Case("mixed", 90, (32, 7), 130, (70, 33), (0,) * 70 + (1, 0), (0, 1, 2), True)
    inputs = pool_inputs(case, dtype)
    together, _ = prefill(inputs)
    for t in (0, 63, 64, 70, 71, 89):
        alone = {
            **inputs,
            "y": [y[t : t + 1] for y in inputs["y"]],
            "x": inputs["x"][t : t + 1],
            "route_of": inputs["route_of"][t : t + 1],
        }
        rows, _ = prefill(alone, blocks=1)
        for s, y in enumerate(rows):
            assert torch.equal(y[0], together[s][t]), f"token {t}, slice {s}"


def test_prefill_leaves_rows_alone(prefill):
    case = Case("idle", 12, (8,), 40, (40, 40), (0, 1, -1, 2), (0, 0, -1))
    inputs = pool_inputs(case, torch.bfloat16)
    inputs["gates"][1] = 0
    inputs["gates"][0, inputs["experts"][1]] = 0
    inputs["y"][1][:] = torch.nan
    inputs["x"][1::4] = torch.nan
    rows, plan = prefill(inputs)
    idle = inputs["route_of"] != 0
    bits = [t.view(torch.int16) for t in (*rows, *inputs["y"])]
    assert torch.equal(bits[0][idle], bits[2][idle]) and torch.equal(bits[1], bits[3])
    assert not torch.equal(bits[0], bits[2])
    assert plan[:, 4].tolist() == [1] * 3  # the first slice alone


def expected_tiles(routes: list[int]) -> list[list[int]]:
    tiles, start = [], 0
    for t, route in enumerate(routes):
        if t == 0 or route != routes[t - 1]:
            start = t
        if route < 0:
            continue
        if (t - start) % TILE_ROWS == 0:
            tiles.append([t, 0, route])
        tiles[-1][1] += 1
    return tiles


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 129, 4095, 4096, 4097, 9000])
def test_plan(prefill, num_tokens):
    """Tiles of random runs; routes 3 and -1 are bare."""
    case = Case("plan", num_tokens, (1,), 8, (8,), (0,), (0, 0, 0, -1))
    inputs = pool_inputs(replace(case, num_tokens=1), torch.float32)
    generator = torch.Generator().manual_seed(num_tokens)
    lengths = torch.randint(1, 200, (num_tokens,), generator=generator)
    lengths[::3] = lengths[::3] % 3 + 1
    run_routes = torch.randint(-1, 4, (num_tokens,), generator=generator)
    inputs["route_of"] = run_routes.repeat_interleave(lengths)[:num_tokens].int()
    inputs["x"] = torch.zeros(num_tokens, 8)
    inputs["y"] = [torch.zeros(num_tokens, 8)]
    _, plan = prefill(inputs, blocks=1)
    routes = [-1 if route == 3 else route for route in inputs["route_of"].tolist()]
    want = expected_tiles(routes)
    assert plan[:, :3].tolist() == want
    assert plan[:, 3].tolist() == [0] * len(want)
    assert plan[:, 5].tolist() == [len(want)] * len(want)


@pytest.fixture(scope="module")
def fused_library(tmp_path_factory):
    return build("fused", tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def fused(fused_library):
    def run(inputs: dict, w, bias, blocks: int = 2, descending: bool = False):
        y = torch.full_like(inputs["y"][0], torch.nan)
        arguments = PoolArguments({**inputs, "y": [y]})
        fused_library.emulate_fused(
            ctypes.byref(arguments),
            address(w),
            ctypes.c_int64(w.stride(0)),
            None if bias is None else address(bias),
            blocks,
            descending,
        )
        return y

    return run


@pytest.mark.parametrize("down, across", [(1, 1), (1, 43), (7, 5), (8, 16), (9, 3), (32, 43)])
def test_output_tiles(fused_library, down, across):
    """Each tile once, and bands of 8 rows of tiles one after the other."""
    tiles = torch.full((down * across, 2), -1, dtype=torch.int32)
    fused_library.output_tiles(ctypes.c_int64(down), ctypes.c_int64(across), address(tiles))
    pairs = [tuple(pair) for pair in tiles.tolist()]
    assert sorted(pairs) == [(i, j) for i in range(down) for j in range(across)]
    bands = [i // 8 for i, _ in pairs]
    assert bands == sorted(bands)


def test_segments(fused_library):
    tiles = [(3, 61, 0), (64, 64, 0), (128, 2, 0), (130, 5, 1), (140, 1, 1), (141, 1, 0)]
    want = [(3, 127, 0), (130, 5, 1), (140, 1, 1), (141, 1, 0)]
    given = torch.tensor(tiles, dtype=torch.int32)
    found = torch.zeros_like(given)
    count = fused_library.segments(address(given), len(tiles), address(found))
    assert [tuple(row) for row in found[:count].tolist()] == want


FUSED_CASES = [
    Case("one_tile", 5, (8,), 64, (40,), (0,), (0,)),
    Case("runs", 150, (32, 17, 70), 136, (300,), (0,) * 30 + (1, 2, -1) + (2,) * 60, (0, 1, 2)),
    Case("odd_columns", 20, (16, 256), 72, (259,), (0, 1), (0, 1)),
    Case("dora", 70, (8, 12), 40, (50,), (0,) * 20 + (1, 2, 0), (0, 1, 1), dora=True),
    Case("deep", 130, (4,), 600, (24,), (0,), (0,)),
    Case("bare", 10, (4,), 16, (24,), (-1,), (0,)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_fused_against_reference(fused, case, dtype):
    inputs = pool_inputs(case, dtype)
    d_out = case.d_out[0]
    w = (torch.randn(d_out, case.d_in) / case.d_in**0.5).to(dtype)
    bias = torch.randn(d_out).to(dtype) if case.num_tokens % 2 == 0 else None

    def expected(dtype_of_sum):
        y = torch.nn.functional.linear(
            *(None if t is None else t.to(dtype_of_sum) for t in (inputs["x"], w, bias))
        )
        reference.grouped_lora_(
            **{**inputs, "y": [y], "x": inputs["x"].to(dtype_of_sum)}, pool_dtype=dtype
        )
        return y

    for descending in (False, True):
        actual = fused(inputs, w, bias, blocks=1 + descending, descending=descending)
        assert_as_good_as_torch(actual, expected(torch.float64), expected(dtype), case.name)


@pytest.fixture(scope="module")
def backward(tmp_path_factory):
    library = build("train", tmp_path_factory.mktemp("emulator"))

    def pointers(tensors):
        return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])

    def run(leaves: list, rest: list, dy, descending: bool = False):
        """dx, dgates, da.., db.. for the arguments that `run_train` takes."""
        _, x, gates, *weights = leaves
        scales, route_of, adapter_of = rest
        half = len(weights) // 2
        a, b = weights[:half], weights[half:]
        grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in leaves[1:]]
        dx, dgates, *dweights = grads
        sizes = (len(x), len(gates), half, x.shape[1], dy.shape[1], x.stride(0), dy.stride(0))
        ranks = (ctypes.c_int64 * half)(*[t.shape[0] for t in a])
        library.emulate_backward(
            (ctypes.c_int64 * 8)(*sizes, DTYPE_CODES[x.dtype]),
            *(address(dy), address(x), pointers(a), pointers(b), ranks),
            *((ctypes.c_float * half)(*scales), address(gates)),
            *(address(route_of), address(adapter_of), address(dx)),
            *(pointers(dweights[:half]), pointers(dweights[half:]), address(dgates)),
            descending,
        )
        return grads

    return run


BACKWARD_CASES = [
    Case("odd", 7, (3, 5), 33, (100,), (0, 1), (0, 1)),
    Case("bare", 9, (8, 4), 32, (40,), (0, -1, 1, 2), (0, -1, 1)),
    Case("runs", 210, (32, 20), 136, (72,), (0,) * 70 + (1, 2) + (3,) * 60, (0, 1, 0, 1)),
    Case("two_splits", 20, (8,), 1040, (24,), (0,), (0,)),
    Case("high_rank", 30, (100, 256), 40, (48,), (0, 0, 1), (0, 1)),
    Case("unaligned", 10, (8, 4), 40, (50,), (0, 1), (0, 1), strided=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_backward_against_reference(backward, case, dtype):
    leaves, rest = train_inputs(case, dtype)
    dy = torch.randn(case.num_tokens, case.d_out[0]).to(dtype)
    actual = backward(leaves, rest, dy)
    expected = run_train(reference.grouped_lora, leaves, rest, dy, torch.float64)[2:]
    same_dtype = run_train(reference_at_dtype, leaves, rest, dy)[2:]
    names = ["dx", "dgates"] + [f"dweight{i}" for i in range(len(leaves) - 3)]
    for name, got, want, torch_result in zip(names, actual, expected, same_dtype, strict=True):
        assert_as_good_as_torch(got, want, torch_result, name)
    if case.name == "runs":
        for got, again in zip(actual, backward(leaves, rest, dy, descending=True), strict=True):
            assert torch.equal(got, again)
