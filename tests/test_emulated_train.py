"""grouped_lora's backward on the emulator (tests/cuda_emulator)."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p

import pytest
import torch
from cuda_emulation import DTYPE_CODES, launches
from test_grouped_lora import DTYPES, Case, reference_at_dtype, run_train, train_inputs
from tolerance import assert_as_good_as_torch

from milora import reference


class LoraWeights(ctypes.Structure):
    _fields_ = [("a", c_void_p), ("b", c_void_p), ("rank", c_int32), ("scale", c_float)]


class LoraGrads(ctypes.Structure):
    _fields_ = [("da", c_void_p), ("db", c_void_p)]


class TrainBackwardParams(ctypes.Structure):
    """GroupedLoraBackwardParams."""

    _fields_ = [
        ("dy", c_void_p),
        ("x", c_void_p),
        ("adapters", ctypes.POINTER(LoraWeights)),
        *((name, c_void_p) for name in ("gates", "route_of", "adapter_of", "dx")),
        ("grads", ctypes.POINTER(LoraGrads)),
        ("dgates", c_void_p),
        *((name, c_int64) for name in ("dy_stride", "x_stride")),
        *((f"num_{name}", c_int64) for name in ("tokens", "routes", "adapters")),
        *((name, c_int64) for name in ("d_in", "d_out")),
        ("dtype", c_int32),
    ]


def weight_table(weights: list[torch.Tensor], scales: list[float]) -> ctypes.Array:
    """LoraWeights of a.., b..."""
    half = len(weights) // 2
    table = (LoraWeights * half)()
    for i in range(half):
        a, b = weights[i::half]
        table[i] = LoraWeights(a.data_ptr(), b.data_ptr(), len(a), scales[i])
    return table


def run_backward(
    kernel, leaves: list, rest: list, dy: torch.Tensor, order: int = 0
) -> list[torch.Tensor]:
    """dx, dgates, da.., db.. for the arguments that `run_train` takes."""
    _, x, gates, *weights = leaves
    scales, route_of, adapter_of = rest
    half = len(weights) // 2
    found = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in leaves[1:]]
    dx, dgates, *dweights = found
    grads = (LoraGrads * half)()
    for i in range(half):
        grads[i] = LoraGrads(*(t.data_ptr() for t in dweights[i::half]))
    tensors = {"dy": dy, "x": x, "gates": gates, "route_of": route_of}
    tensors |= {"adapter_of": adapter_of, "dx": dx, "dgates": dgates}
    params = TrainBackwardParams(
        **{name: t.data_ptr() for name, t in tensors.items()},
        adapters=weight_table(weights, scales),
        grads=grads,
        dy_stride=dy.stride(0),
        x_stride=x.stride(0),
        num_tokens=len(x),
        num_routes=len(gates),
        num_adapters=half,
        d_in=x.shape[1],
        d_out=dy.shape[1],
        dtype=DTYPE_CODES[x.dtype],
    )
    assert not kernel(ctypes.byref(params), order)
    return found


@pytest.fixture(scope="module")
def backward():
    return functools.partial(run_backward, launches(TrainBackwardParams).train_backward)


BACKWARD_CASES = [
    Case("odd", 7, (3, 5), 33, (100,), (0, 1), (0, 1)),
    Case("bare", 9, (8, 4), 32, (40,), (0, -1, 1, 2), (0, -1, 1)),
    Case("runs", 210, (32, 20), 136, (72,), (0,) * 70 + (1, 2) + (3,) * 60, (0, 1, 0, 1)),
    Case("two_splits", 20, (8,), 1040, (24,), (0,), (0,)),
    Case("high_rank", 30, (100, 256), 40, (48,), (0, 0, 1), (0, 1)),
    Case("unaligned", 10, (8, 4), 40, (50,), (0, 1), (0, 1), strided=True),
]


def check_backward(backward, leaves: list, rest: list, dy: torch.Tensor) -> list[torch.Tensor]:
    """What `backward` gives, after a comparison with float64."""
    actual = backward(leaves, rest, dy)
    expected = run_train(reference.grouped_lora, leaves, rest, dy, torch.float64)[2:]
    same_dtype = run_train(reference_at_dtype, leaves, rest, dy)[2:]
    names = ["dx", "dgates"] + [f"dweight{i}" for i in range(len(leaves) - 3)]
    for name, got, want, torch_result in zip(names, actual, expected, same_dtype, strict=True):
        assert_as_good_as_torch(got, want, torch_result, name)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_backward_against_reference(backward, case, dtype):
    leaves, rest = train_inputs(case, dtype)
    dy = torch.randn(case.num_tokens, case.d_out[0]).to(dtype)
    actual = check_backward(backward, leaves, rest, dy)
    if case.name == "runs":
        for got, again in zip(actual, backward(leaves, rest, dy, order=1), strict=True):
            assert torch.equal(got, again)
