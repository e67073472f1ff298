"""fused_lora's kernels on the emulator (tests/cuda_emulator)."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_emulation import PoolParams, address, library
from test_cores import with_cores
from test_grouped_lora import Case, pool_inputs
from tolerance import assert_as_good_as_torch

from milora import reference


@pytest.fixture(scope="module")
def fused_library():
    return library("fused", PoolParams)


@pytest.fixture(scope="module")
def fused(fused_library):
    def run(inputs: dict, w, bias, blocks: int = 2, order: int = 0) -> torch.Tensor:
        y = torch.full_like(inputs["y"][0], torch.nan)
        params = PoolParams({**inputs, "y": [y]})
        w_stride = ctypes.c_int64(w.stride(0))
        fused_library.fused(
            ctypes.byref(params), address(w), w_stride, address(bias), blocks, order
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
@pytest.mark.parametrize("every", [0, 1, 2], ids=["no_core", "cores", "some_cores"])
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
def test_fused_against_reference(fused, case, every, dtype):
    inputs = pool_inputs(case, dtype)
    if every:
        inputs = with_cores(inputs, every)
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

    for order in (0, 1):
        actual = fused(inputs, w, bias, blocks=1 + order, order=order)
        assert_as_good_as_torch(actual, expected(torch.float64), expected(dtype), case.name)
