"""The prefill kernels of grouped_lora_ on the emulator (tests/cuda_emulator)."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from cuda_emulation import PoolParams, address, assert_as_reference, library
from test_cores import CORE, MANY, RANKS, core_inputs, with_cores
from test_grouped_lora import CASES, DTYPES, Case, clone_strided, on_16_bytes, pool_inputs
from test_rank_gates import gated_inputs

TILE_ROWS = 64


@pytest.fixture(scope="module")
def prefill():
    kernels = library("prefill", PoolParams)
    kernels.prefill.restype = ctypes.c_int64

    def run(
        inputs: dict, blocks: int = 3, order: int = 0, wgmma: bool = False
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """y after the op; the plan's tiles: first, rows, route, adapter, slices, number of jobs."""
        inputs = {**inputs, "y": [clone_strided(t) for t in inputs["y"]]}
        capacity = max(len(inputs["x"]), 1)
        plan = torch.full((capacity, 6), -1)
        count = kernels.prefill(
            *(ctypes.byref(PoolParams(inputs)), wgmma, blocks, order),
            *(address(plan), ctypes.c_int64(capacity)),
        )
        return inputs["y"], plan[:count]

    return run


MORE_CASES = [
    Case("two_splits", 70, (40, 16), 1100, (90,), (0,) * 66 + (1,) * 4, (0, 1)),
    Case("siblings", 20, (32, 17), 72, (64, 1032, 8), (0,) * 9 + (1,) * 11, (0, 1)),
    Case("two_passes", 18, (100, 3), 64, (40, 48), (0, 1, 1), (0, 1)),
]
# Of the two kernels: mma.sync for every dtype, wgmma for those of 16 bits.
FORMS = [(False, dtype) for dtype in DTYPES] + [(True, torch.bfloat16), (True, torch.float16)]
FORM_NAMES = [f"{'wgmma' if wgmma else 'mma'}-{str(dtype)[6:]}" for wgmma, dtype in FORMS]
forms = pytest.mark.parametrize("wgmma, dtype", FORMS, ids=FORM_NAMES)


def inputs_for(wgmma: bool, inputs: dict) -> dict:
    return on_16_bytes(inputs) if wgmma else inputs


@forms
@pytest.mark.parametrize(
    "case", [case for case in CASES + MORE_CASES if case.num_tokens > 0], ids=str
)
def test_prefill_against_reference(prefill, case, wgmma, dtype):
    inputs = inputs_for(wgmma, pool_inputs(case, dtype))
    assert_as_reference(prefill(inputs, wgmma=wgmma)[0], inputs)
    if case in MORE_CASES:
        assert_as_reference(prefill(inputs, blocks=1, order=1, wgmma=wgmma)[0], inputs)


# Stages and units one after the other, tiles of every height, wide passes, all counts of 16 ranks.
WGMMA_CASES = [
    Case(
        "tiles", 300, (32, 20, 64), 200, (72, 136), (0,) * 129 + (1,) * 65 + (2,) * 106, (0, 1, 2)
    ),
    Case("short_runs", 90, (16, 48), 136, (200,), (0, 0, 1, -1, 1, 1, 1, 0, 1) * 10, (0, 1)),
    Case(
        "wide",
        130,
        (48, 80, 100),
        1032,
        (1032, 24, 70),
        (0,) * 70 + (1,) * 8 + (2,) * 52,
        (0, 1, 2),
    ),
    Case("high", 9, (256, 130, 65), 64, (1100, 40), (0, 1, 1, 2), (0, 1, 2), dora=True),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", WGMMA_CASES, ids=str)
def test_wgmma_in_any_order(prefill, case, dtype):
    """Also with turns shuffled: each warp may be ahead of or behind the others."""
    inputs = on_16_bytes(pool_inputs(case, dtype))
    results = []
    for order, blocks in ((0, 3), (1, 1), (7, 2), (8, 5)):
        results.append(prefill(inputs, blocks, order, wgmma=True)[0])
        assert_as_reference(results[-1], inputs)
    for result in results:
        assert all(map(torch.equal, result, results[0]))


@forms
@pytest.mark.parametrize("name", ["rank_mix", "bare_rows", "dora", "two_splits", "siblings"])
def test_prefill_with_rank_gates(prefill, name, wgmma, dtype):
    case = next(case for case in CASES + MORE_CASES if case.name == name)
    inputs = inputs_for(wgmma, gated_inputs(case, dtype))
    assert_as_reference(prefill(inputs, wgmma=wgmma)[0], inputs)


@forms
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "case", [RANKS, MANY, *(c for c in CASES if c.name == "bare_rows"), *MORE_CASES[:2]], ids=str
)
def test_prefill_with_cores(prefill, case, every, wgmma, dtype):
    inputs = inputs_for(wgmma, core_inputs(case, dtype, every))
    assert_as_reference(prefill(inputs, wgmma=wgmma)[0], inputs)
    inputs = inputs_for(wgmma, with_cores(gated_inputs(case, dtype), every))
    assert_as_reference(prefill(inputs, blocks=1, order=1, wgmma=wgmma)[0], inputs)


@pytest.mark.parametrize("cores", [False, True])
@forms
def test_prefill_is_batch_invariant(prefill, wgmma, dtype, cores):
    case = Case("mixed", 150, (32, 7), 130, (70, 33), (0,) * 130 + (1, 0), (0, 1, 2), True)
    inputs = core_inputs(case, dtype, every=3) if cores else pool_inputs(case, dtype)
    inputs = inputs_for(wgmma, inputs)
    together, _ = prefill(inputs, wgmma=wgmma)
    for t in (0, 63, 64, 127, 128, 130, 131, 149):
        alone = {
            **inputs,
            "y": [y[t : t + 1] for y in inputs["y"]],
            "x": inputs["x"][t : t + 1],
            "route_of": inputs["route_of"][t : t + 1],
        }
        rows, _ = prefill(alone, blocks=1, wgmma=wgmma)
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
