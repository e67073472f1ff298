"""The prefill kernels of grouped_lora_ on the emulator (tests/cuda_emulator)."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from cuda_emulation import PoolParams, address, assert_as_reference, library
from test_cores import CORE, MANY, RANKS, core_inputs, with_cores
from test_grouped_lora import CASES, DTYPES, Case, clone_strided, pool_inputs
from test_rank_gates import gated_inputs

TILE_ROWS = 64


@pytest.fixture(scope="module")
def prefill():
    kernels = library("prefill", PoolParams)
    kernels.prefill.restype = ctypes.c_int64

    def run(
        inputs: dict, blocks: int = 3, order: int = 0
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """y after the op; the plan's tiles: first, rows, route, adapter, slices, number of jobs."""
        inputs = {**inputs, "y": [clone_strided(t) for t in inputs["y"]]}
        capacity = max(len(inputs["x"]), 1)
        plan = torch.full((capacity, 6), -1)
        count = kernels.prefill(
            *(ctypes.byref(PoolParams(inputs)), blocks, order),
            *(address(plan), ctypes.c_int64(capacity)),
        )
        return inputs["y"], plan[:count]

    return run


MORE_CASES = [
    Case("two_splits", 70, (40, 16), 1100, (90,), (0,) * 66 + (1,) * 4, (0, 1)),
    Case("siblings", 20, (32, 17), 72, (64, 1032, 8), (0,) * 9 + (1,) * 11, (0, 1)),
    Case("two_passes", 18, (100, 3), 64, (40, 48), (0, 1, 1), (0, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [case for case in CASES + MORE_CASES if case.num_tokens > 0], ids=str
)
def test_prefill_against_reference(prefill, case, dtype):
    inputs = pool_inputs(case, dtype)
    assert_as_reference(prefill(inputs)[0], inputs)
    if case in MORE_CASES:
        assert_as_reference(prefill(inputs, blocks=1, order=1)[0], inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rank_mix", "bare_rows", "dora", "two_splits", "siblings"])
def test_prefill_with_rank_gates(prefill, name, dtype):
    inputs = gated_inputs(next(case for case in CASES + MORE_CASES if case.name == name), dtype)
    assert_as_reference(prefill(inputs)[0], inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "case", [RANKS, MANY, *(c for c in CASES if c.name == "bare_rows"), *MORE_CASES[:2]], ids=str
)
def test_prefill_with_cores(prefill, case, every, dtype):
    inputs = core_inputs(case, dtype, every)
    assert_as_reference(prefill(inputs)[0], inputs)
    inputs = with_cores(gated_inputs(case, dtype), every)
    assert_as_reference(prefill(inputs, blocks=1, order=1)[0], inputs)


@pytest.mark.parametrize("cores", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_is_batch_invariant(prefill, dtype, cores):
    case = Case("mixed", 90, (32, 7), 130, (70, 33), (0,) * 70 + (1, 0), (0, 1, 2), True)
    inputs = core_inputs(case, dtype, every=3) if cores else pool_inputs(case, dtype)
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


def test_prefill_leaves_rows_with_a_core_outside_alone(prefill):
    case = Case("outside", 12, (8, 8), 40, (40,), (0, 1), (0, 1))
    inputs = pool_inputs(case, torch.bfloat16)
    inputs["offsets"][1, :, CORE] = 1 << 40
    after = prefill(inputs)[0][0]
    changed = (after != inputs["y"][0]).any(1).tolist()
    assert changed == [True, False] * 6


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
