"""The decode kernels of grouped_lora_ on the emulator (tests/cuda_emulator)."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_emulation import PoolParams, assert_as_reference, library
from test_cores import CORE, RANKS, core_inputs, with_cores
from test_grouped_lora import CASES, DTYPES, Case, clone_strided, pool_inputs
from test_rank_gates import gated_inputs

from milora import reference


@pytest.fixture(scope="module")
def decode():
    kernels = library("decode", PoolParams)

    def run(inputs: dict, clusters: bool, workers: int = 2, order: int = 0) -> list[torch.Tensor]:
        """y after the op, by the cluster form or the split one."""
        inputs = {**inputs, "y": [clone_strided(y) for y in inputs["y"]]}
        kernels.decode(ctypes.byref(PoolParams(inputs)), int(clusters), workers, order)
        return inputs["y"]

    return run


FORMS = pytest.mark.parametrize("clusters", [True, False], ids=["cluster", "split"])
# What the CPU's cases do not reach: several tiles of ranks and of vectors, empty shares, all sizes
# of groups, groups cut by a bare row and by a multiple of eight.
DECODE_CASES = [case for case in CASES if 0 < case.num_tokens < 100] + [
    Case("tiles", 3, (40, 16), 8 * 64 * 8 + 24, (4200, 72), (0, 1), (0, 1)),
    Case("empty_shares", 2, (17,), 9, (8, 3), (0,), (0,)),
    Case("groups", 31, (4, 6), 72, (80,), (0,) * 5 + (1,) * 10 + (2,) + (3,) * 15, (0, 1, -1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
@FORMS
def test_decode_against_reference(decode, case, dtype, clusters):
    inputs = pool_inputs(case, dtype)
    assert_as_reference(decode(inputs, clusters), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd_sizes", "rank_mix", "bare_rows", "tiles", "groups"])
@FORMS
def test_decode_with_rank_gates(decode, name, dtype, clusters):
    inputs = gated_inputs(next(case for case in DECODE_CASES if case.name == name), dtype)
    assert_as_reference(decode(inputs, clusters), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["ranks", "odd_sizes", "bare_rows", "groups", "empty_shares"])
@FORMS
def test_decode_with_cores(decode, name, every, dtype, clusters):
    case = next(case for case in [RANKS, *DECODE_CASES] if case.name == name)
    inputs = core_inputs(case, dtype, every)
    assert_as_reference(decode(inputs, clusters), inputs)
    inputs = with_cores(gated_inputs(case, dtype), every)
    assert_as_reference(decode(inputs, clusters), inputs)


MIXED = Case("mixed", 60, (32, 7, 64), 130, (200, 33), (0,) * 25 + (1, 2, 0, 1) * 10, (0, 1, 2))


@pytest.mark.parametrize("cores", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_bits(decode, dtype, cores):
    """The same bits in both forms, in any order of threads, for any grid, alone or together."""
    inputs = core_inputs(MIXED, dtype, every=3) if cores else pool_inputs(MIXED, dtype)
    together = decode(inputs, clusters=True)
    runs = [{"clusters": True, "order": 1}, {"clusters": True, "order": 2, "workers": 7}]
    runs += [{"clusters": False, "order": order, "workers": 1 + order} for order in range(3)]
    for options in runs:
        for got, want in zip(decode(inputs, **options), together, strict=True):
            assert torch.equal(got, want), options
    for t in range(0, MIXED.num_tokens, 13):
        rows = slice(t, t + 1)
        alone = {name: inputs[name][rows] for name in ("x", "route_of")}
        alone = {**inputs, **alone, "y": [y[rows] for y in inputs["y"]]}
        for s, y in enumerate(decode(alone, clusters=True, workers=1)):
            assert torch.equal(y[0], together[s][t]), f"token {t}, slice {s}"


@FORMS
def test_decode_of_many_items(decode, clusters):
    """More tokens than a block has threads, and more items than its list holds."""
    case = Case("many", 300, (1, 2, 3), 16, (8, 8), (0, 1, 2), (0, 1, 2))
    inputs = pool_inputs(case, torch.float32)
    actual = decode(inputs, clusters)
    expected = [t.double() for t in inputs["y"]]
    reference.grouped_lora_(
        **{**inputs, "y": expected, "x": inputs["x"].double()}, pool_dtype=torch.float32
    )
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@FORMS
def test_decode_leaves_the_rest_alone(decode, clusters):
    """Bare rows, closed gates, and tables that point nowhere: y keeps its bits."""
    case = Case("idle", 9, (8, 0, 8), 32, (40,), (0, 1, -1, 2, 3, 4, 5, 0, 0), (0, 0, -1, 1, 7, 2))
    check_leaves_alone(decode, clusters, case, 0)
    check_leaves_alone(decode, clusters, case, CORE)


def check_leaves_alone(decode, clusters: bool, case: Case, part: int) -> None:
    inputs = pool_inputs(case, torch.bfloat16)
    inputs["gates"][1] = 0
    inputs["offsets"][2, :, part] = 1 << 40
    inputs["route_of"][8] = 99
    inputs["y"][0][1:7] = torch.tensor([torch.nan, -0.0, torch.inf, 1e-7]).repeat(10)
    inputs["y"][0][8] = torch.nan
    before = inputs["y"][0].view(torch.int16).clone()
    after = decode(inputs, clusters)[0].view(torch.int16)
    changed = (after != before).any(1).tolist()
    assert changed == [True, *[False] * 6, True, False]
