"""The launches of the CUDA kernels on the emulator: what each asks of the GPU, workspaces, calls
that take several launches, on GPUs of several kinds. Kernels' own cases stand in
test_emulated_<kernel>.py; the router's and training's go through the launches there."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_int64, c_void_p

import pytest
import torch
from cuda_emulation import DTYPE_CODES, PoolParams, address, assert_as_reference, launches
from test_emulated_router import RouterBackwardParams, RouterParams, aligned_router_inputs
from test_emulated_train import (
    LoraWeights,
    TrainBackwardParams,
    check_backward,
    run_backward,
    weight_table,
)
from test_grouped_lora import (
    DTYPES,
    Case,
    clone_strided,
    on_16_bytes,
    pool_inputs,
    reference_at_dtype,
    run_train,
    train_inputs,
)
from tolerance import assert_as_good_as_torch

from milora import reference

INVALID_CONFIGURATION = 9
# Compute capability: clusters or two launches, shared memory of 163, 99 or 227 KB a block.
DEVICES = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]


class TrainParams(ctypes.Structure):
    """GroupedLoraParams."""

    _fields_ = [
        *((name, c_void_p) for name in ("y", "out", "x")),
        ("adapters", ctypes.POINTER(LoraWeights)),
        *((name, c_void_p) for name in ("gates", "route_of", "adapter_of")),
        *((name, c_int64) for name in ("y_stride", "x_stride")),
        *((f"num_{name}", c_int64) for name in ("tokens", "routes", "adapters")),
        *((name, c_int64) for name in ("d_in", "d_out")),
        ("dtype", c_int32),
    ]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return launches(
        PoolParams, TrainParams, TrainBackwardParams, RouterParams, RouterBackwardParams
    )


@pytest.fixture(params=DEVICES, ids=lambda capability: f"sm_{capability[0]}{capability[1]}")
def gpu(library, request) -> ctypes.CDLL:
    """The launches for a GPU of each kind, with two multiprocessors or clusters."""
    yield on_gpu(library, request.param)
    on_gpu(library, (9, 0))


def on_gpu(library: ctypes.CDLL, capability: tuple[int, int]) -> ctypes.CDLL:
    library.set_device(*capability, 2, 2)
    return library


def run_pool(launch, inputs: dict, *options: int) -> list[torch.Tensor]:
    """y after a launch of grouped_lora_."""
    inputs = {**inputs, "y": [clone_strided(y) for y in inputs["y"]]}
    assert not launch(ctypes.byref(PoolParams(inputs)), *options)
    return inputs["y"]


CASES = [
    Case("one", 1, (8,), 64, (40,), (0,), (0,)),
    Case("mix", 37, (32, 17, 256), 136, (72, 1032), (0, 1, 2, -1, 1, 0) * 6 + (2,), (0, 1, 2)),
    Case("two_splits", 20, (40,), 1100, (90,), (0, 0, 1, -1), (0, 0)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode(gpu, case, dtype):
    inputs = pool_inputs(case, dtype)
    assert_as_reference(run_pool(gpu.decode, inputs, 0), inputs)


def test_decode_of_more_tokens_than_a_slab(library):
    """Two launches a slab of 1024 tokens, which share a workspace."""
    case = Case("slabs", 1100, (3, 5), 8, (8, 16), (0, -1, 1) * 300, (0, 1))
    inputs = pool_inputs(case, torch.float32)
    assert_as_reference(run_pool(on_gpu(library, (8, 0)).decode, inputs, 0), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill(gpu, case, dtype):
    inputs = pool_inputs(case, dtype)
    assert_as_reference(run_pool(gpu.prefill, inputs, 0, 0), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_wgmma(library, case, dtype):
    inputs = on_16_bytes(pool_inputs(case, dtype))
    launch = on_gpu(library, (9, 0)).prefill
    assert_as_reference(run_pool(launch, inputs, 1, 0), inputs)


def test_slices_without_columns(gpu):
    """A module of no outputs beside one that has some: nothing is launched for it."""
    case = Case("no_columns", 5, (8,), 64, (40, 0), (0,), (0,))
    inputs = on_16_bytes(pool_inputs(case, torch.bfloat16))
    first = {**inputs, "y": inputs["y"][:1], "experts": inputs["experts"][:1]}
    for launch, options in ((gpu.decode, (0,)), (gpu.prefill, (0, 0))):
        assert_as_reference(run_pool(launch, inputs, *options)[:1], first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 130])
def test_fused(library, num_tokens, dtype):
    case = Case("fused", num_tokens, (32, 17), 136, (300,), (0, 1, -1) * 20, (0, 1))
    inputs = pool_inputs(case, dtype)
    w = (torch.randn(300, case.d_in) / case.d_in**0.5).to(dtype)
    bias = torch.randn(300).to(dtype)
    y = torch.full_like(inputs["y"][0], torch.nan)
    params = PoolParams({**inputs, "y": [y]})
    launch = on_gpu(library, (9, 0)).fused_lora
    assert not launch(ctypes.byref(params), address(w), c_int64(w.stride(0)), address(bias), 0)

    def expected(sums: torch.dtype) -> torch.Tensor:
        out = torch.nn.functional.linear(inputs["x"].to(sums), w.to(sums), bias.to(sums))
        given = {**inputs, "y": [out], "x": inputs["x"].to(sums)}
        reference.grouped_lora_(**given, pool_dtype=dtype)
        return out

    assert_as_good_as_torch(y, expected(torch.float64), expected(dtype), "y")


def run_forward(launch, leaves: list, rest: list, in_place: bool) -> torch.Tensor:
    y, x, gates, *weights = leaves
    scales, route_of, adapter_of = rest
    y = y.clone() if in_place else y
    out = y if in_place else torch.full_like(y, torch.nan, memory_format=torch.contiguous_format)
    tensors = {"y": y, "out": out, "x": x, "gates": gates}
    tensors |= {"route_of": route_of, "adapter_of": adapter_of}
    params = TrainParams(
        **{name: t.data_ptr() for name, t in tensors.items()},
        adapters=weight_table(weights, scales),
        y_stride=y.stride(0),
        x_stride=x.stride(0),
        num_tokens=len(x),
        num_routes=len(gates),
        num_adapters=len(weights) // 2,
        d_in=x.shape[1],
        d_out=y.shape[1],
        dtype=DTYPE_CODES[x.dtype],
    )
    assert not launch(ctypes.byref(params), 0)
    return out


TRAIN_CASES = [
    Case("few", 50, (8, 20, 100), 136, (72,), (0,) * 20 + (1, 2, -1) * 10, (0, 1, 2)),
    # Tables of adapters travel 64 a launch.
    Case("tables", 40, (2, 3) * 35, 16, (24,), tuple(range(40)), tuple(range(30, 70))),
]


@pytest.mark.parametrize("case", TRAIN_CASES, ids=str)
def test_training(gpu, case):
    leaves, rest = train_inputs(case, torch.bfloat16)
    dy = torch.randn(case.num_tokens, case.d_out[0]).to(torch.bfloat16)
    want = run_train(reference.grouped_lora, leaves, rest, dy, torch.float64)[0]
    same_dtype = run_train(reference_at_dtype, leaves, rest, dy)[0]
    for in_place in (False, True):
        got = run_forward(gpu.train_forward, leaves, rest, in_place)
        assert_as_good_as_torch(got, want, same_dtype, "out")
    check_backward(functools.partial(run_backward, gpu.train_backward), leaves, rest, dy)


def test_errors_come_back(library):
    """What a GPU refuses is said: here a grid of no blocks."""
    inputs = aligned_router_inputs(torch.float32, 8, [(0, 4)], [(0, 0, 0, 0, 1, 7)], 4)
    params = RouterParams(h_stride=8, num_tokens=0, num_prompts=0, num_routers=1, num_experts=7)
    params.d, params.h, params.w_sa = 8, inputs["h"].data_ptr(), inputs["w_sa"].data_ptr()
    assert library.router_forward(ctypes.byref(params), 0) == INVALID_CONFIGURATION
