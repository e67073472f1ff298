"""The CUDA kernels' own source, thread by thread on a CPU (tests/simt): indices, barriers, copies.

A stand-in for CUDA runs each thread as a fiber, in several orders: a missing barrier changes a
result or ends in a deadlock; a copy's target holds NaN until its barrier is waited for; a vector
load outside of the tensors ends the process. What it cannot see: the compiler, and time.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_grouped_lora import CASES, DTYPES, Case, clone_strided, pool_inputs
from test_prompt_router import ALL_CODES, SPANS, in_pool, router_inputs, run
from test_rank_gates import gated_inputs
from tolerance import assert_as_good_as_torch

from milora import reference

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BUILD = ROOT / "build" / "simt"
FLAGS = ["-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-shared"]
# A fiber's jump looks like a jump into a finished function.
FLAGS += ["-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-unknown-pragmas"]


def library(name: str) -> ctypes.CDLL:
    """tests/simt/<name>.cpp as a library, built when a source is newer."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    sources = [*(TESTS / "simt").rglob("*"), *(ROOT / "csrc").rglob("*.h")]
    sources += (ROOT / "csrc").rglob("*.cuh")
    newest = max(path.stat().st_mtime for path in sources if path.is_file())
    target = BUILD / f"{name}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists() or target.stat().st_mtime < newest:
            # The stand-in's folder first: its sm90.cuh takes the place of the kernels' own.
            includes = [f"-I{TESTS / 'simt' / 'include'}", f"-I{ROOT / 'csrc'}"]
            source = TESTS / "simt" / f"{name}.cpp"
            command = [compiler, *FLAGS, *includes, "-o", target, source]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(target))


MAX_SLICES = 16
POINTER, INT64, INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class PoolParams(ctypes.Structure):
    """GroupedLoraPoolParams."""

    _fields_ = [
        ("y", POINTER * MAX_SLICES),
        ("y_stride", INT64 * MAX_SLICES),
        ("d_out", INT64 * MAX_SLICES),
        ("expert", INT32 * MAX_SLICES),
        ("x", POINTER),
        ("x_stride", INT64),
        ("pool", POINTER),
        ("pool_bytes", INT64),
        *((name, POINTER) for name in ("offsets", "ranks", "scales", "gates")),
        *((name, POINTER) for name in ("route_of", "adapter_of")),
        *((f"num_{name}", INT64) for name in ("tokens", "routes", "experts", "adapters")),
        ("num_slices", INT64),
        ("d_in", INT64),
        ("dtype", INT32),
        ("rank_gates", POINTER),
        ("max_rank", INT64),
    ]


@pytest.fixture(scope="module")
def decode():
    kernels = library("decode")
    kernels.params_bytes.restype = INT64
    assert kernels.params_bytes() == ctypes.sizeof(PoolParams)

    def run(inputs: dict, clusters: bool, workers: int = 2, order: int = 0) -> list[torch.Tensor]:
        inputs = {**inputs, "y": [clone_strided(y) for y in inputs["y"]]}
        p = PoolParams(
            num_tokens=inputs["x"].shape[0],
            num_routes=inputs["gates"].shape[0],
            num_experts=inputs["ranks"].shape[1],
            num_adapters=inputs["ranks"].shape[0],
            num_slices=len(inputs["y"]),
            d_in=inputs["x"].shape[1],
            x_stride=inputs["x"].stride(0),
            pool_bytes=inputs["pool"].numel(),
            dtype=DTYPES.index(inputs["x"].dtype),
        )
        names = ("x", "pool", "offsets", "ranks", "scales", "gates", "route_of", "adapter_of")
        for name in names:
            setattr(p, name, inputs[name].data_ptr())
        if (rank_gates := inputs.get("rank_gates")) is not None:
            p.rank_gates, p.max_rank = rank_gates.data_ptr(), rank_gates.shape[2]
        for s, y in enumerate(inputs["y"]):
            p.y[s], p.y_stride[s], p.d_out[s] = y.data_ptr(), y.stride(0), y.shape[1]
            p.expert[s] = inputs["experts"][s]
        kernels.decode(ctypes.byref(p), int(clusters), workers, order)
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
    check_decode(decode, pool_inputs(case, dtype), clusters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd_sizes", "rank_mix", "bare_rows", "tiles", "groups"])
@FORMS
def test_decode_with_rank_gates(decode, name, dtype, clusters):
    case = next(case for case in DECODE_CASES if case.name == name)
    check_decode(decode, gated_inputs(case, dtype), clusters)


def check_decode(decode, inputs: dict, clusters: bool) -> None:
    dtype = inputs["x"].dtype
    actual = decode(inputs, clusters)
    expected = [t.double() for t in inputs["y"]]
    reference.grouped_lora_(
        **{**inputs, "y": expected, "x": inputs["x"].double()}, pool_dtype=dtype
    )
    same_dtype = [t.clone() for t in inputs["y"]]
    reference.grouped_lora_(**{**inputs, "y": same_dtype})
    for s in range(len(actual)):
        assert_as_good_as_torch(actual[s], expected[s], same_dtype[s], f"y[{s}]")


MIXED = Case("mixed", 60, (32, 7, 64), 130, (200, 33), (0,) * 25 + (1, 2, 0, 1) * 10, (0, 1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_bits(decode, dtype):
    """The same bits in both forms, in any order of threads, for any grid, alone or together."""
    inputs = pool_inputs(MIXED, dtype)
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
    inputs = pool_inputs(case, torch.bfloat16)
    inputs["gates"][1] = 0
    inputs["offsets"][2, :, 0] = 1 << 40
    inputs["route_of"][8] = 99
    inputs["y"][0][1:7] = torch.tensor([torch.nan, -0.0, torch.inf, 1e-7]).repeat(10)
    inputs["y"][0][8] = torch.nan
    before = inputs["y"][0].view(torch.int16).clone()
    after = decode(inputs, clusters)[0].view(torch.int16)
    changed = (after != before).any(1).tolist()
    assert changed == [True, *[False] * 6, True, False]


class RouterParams(ctypes.Structure):
    """PromptRouterParams."""

    _fields_ = [
        ("h", POINTER),
        ("h_stride", INT64),
        *((name, POINTER) for name in ("spans", "router_of", "w_sa", "w_r", "coef", "pool")),
        ("pool_bytes", INT64),
        *((name, POINTER) for name in ("offsets", "codes", "probs", "gates", "pooled")),
        *((f"num_{name}", INT64) for name in ("tokens", "prompts", "routers", "experts")),
        ("d", INT64),
        ("dtype", INT32),
    ]


class RouterBackwardParams(ctypes.Structure):
    """PromptRouterBackwardParams."""

    _fields_ = [
        *((name, POINTER) for name in ("dprobs", "dgates", "dpooled")),
        ("forward", RouterParams),
        *((name, POINTER) for name in ("dh", "dw_sa", "dw_r", "dcoef")),
    ]


class Router:
    """The router's kernels on the stand-in, called as `milora.reference` is."""

    def __init__(self, order: int = 0):
        self.kernels = library("router")
        self.kernels.params_bytes.restype = INT64
        assert self.kernels.params_bytes() == ctypes.sizeof(RouterParams)
        self.order = order

    def params(self, inputs: dict) -> tuple[RouterParams, list[torch.Tensor]]:
        h, num_prompts = inputs["h"], len(inputs["spans"])
        num_experts = inputs["num_experts"] if "pool" in inputs else inputs["w_r"].shape[1]
        p = RouterParams(
            h_stride=h.stride(0),
            num_tokens=h.shape[0],
            num_prompts=num_prompts,
            num_routers=len(inputs["codes"]),
            num_experts=num_experts,
            d=h.shape[1],
            dtype=DTYPES.index(h.dtype),
            pool_bytes=inputs["pool"].numel() if "pool" in inputs else 0,
        )
        outputs = [torch.full((num_prompts, n), torch.nan) for n in (num_experts,) * 2]
        outputs.append(torch.full((num_prompts, h.shape[1]), torch.nan))
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                setattr(p, name, value.data_ptr())
        for name, value in zip(("probs", "gates", "pooled"), outputs, strict=True):
            setattr(p, name, value.data_ptr())
        return p, outputs

    def forward(self, inputs: dict) -> list[torch.Tensor]:
        p, outputs = self.params(inputs)
        self.kernels.router_forward(ctypes.byref(p), self.order)
        return outputs

    def __call__(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        names = ("h", "w_sa", "w_r", "coef")
        router = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *leaves):
                ctx.inputs = {**inputs, **dict(zip(names, leaves, strict=True))}
                ctx.outputs = router.forward({n: t.detach() for n, t in ctx.inputs.items()})
                return tuple(t.clone() for t in ctx.outputs)

            @staticmethod
            def backward(ctx, *grads):
                p, _ = router.params({n: t.detach() for n, t in ctx.inputs.items()})
                p.probs, p.pooled = ctx.outputs[0].data_ptr(), ctx.outputs[2].data_ptr()
                grads = [t.contiguous() for t in grads]
                found = [torch.zeros(ctx.inputs[n].shape, dtype=ctx.inputs[n].dtype) for n in names]
                params = RouterBackwardParams(*(t.data_ptr() for t in grads), p)
                for name, value in zip(("dh", "dw_sa", "dw_r", "dcoef"), found, strict=True):
                    setattr(params, name, value.data_ptr())
                router.kernels.router_backward(ctypes.byref(params), router.order)
                return tuple(found)

        return Function.apply(*(inputs[name] for name in names))


def aligned_router_inputs(dtype: torch.dtype, d: int, **options) -> dict:
    """Rows of whole vectors on 16 bytes, which the fast kernel asks for."""
    inputs = router_inputs(dtype, d, **options)
    return {**inputs, "h": inputs["h"].contiguous()}


def check_router(inputs: dict, order: int = 0) -> None:
    actual = run(Router(order), inputs)
    expected = run(reference.prompt_router, inputs, torch.float64)
    same_dtype = run(reference.prompt_router, inputs)
    names = ["probs", "gates", "pooled", "dh", "dw_sa", "dw_r", "dcoef"]
    for name, got, want, torch_result in zip(names, actual, expected, same_dtype, strict=True):
        assert_as_good_as_torch(got, want, torch_result, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", range(0, len(ALL_CODES), 5))
@pytest.mark.parametrize("make", [router_inputs, aligned_router_inputs], ids=["any", "aligned"])
def test_router_against_reference(make, first, dtype):
    """All poolers, activations and norms; rows on any address, and rows of whole vectors."""
    check_router(make(dtype, 40, codes=ALL_CODES[first:] + ALL_CODES[:first]), order=first)


@pytest.mark.parametrize("d", [2048, 2056, 4104, 8200, 16392])
def test_router_widths(d):
    """Each number of vectors that a thread can have of a row, and more."""
    codes = [(0, 0, 1, 1, 3, 7), (2, 1, 0, 0, 2, 5)]
    spans = [(0, 19), (19, 20), (20, 28)]
    check_router(aligned_router_inputs(torch.bfloat16, d, spans=spans, codes=codes, num_tokens=30))


@pytest.mark.parametrize("dtype", DTYPES)
def test_router_bits(dtype):
    """The same bits from a pool, in any order of threads, alone or among other prompts."""
    inputs = aligned_router_inputs(dtype, 136)
    together = Router().forward(inputs)
    for order in (1, 2):
        for got, want in zip(Router(order).forward(in_pool(inputs)), together, strict=True):
            assert torch.equal(got, want)
    for i, (begin, end) in enumerate(SPANS):
        alone = {
            **inputs,
            "h": inputs["h"][begin:end],
            "spans": torch.tensor([[0, end - begin]], dtype=torch.int32),
            "router_of": inputs["router_of"][i : i + 1],
        }
        for got, want in zip(Router().forward(alone), together, strict=True):
            assert torch.equal(got[0], want[i]), f"prompt {i}"


def test_router_scores_without_bound():
    """Scores of -inf weigh nothing beside finite ones; NaN and +inf give NaN, as in torch."""
    for row, value in ((3, -torch.inf), (20, torch.nan), (20, torch.inf)):
        inputs = aligned_router_inputs(
            torch.float32, 8, spans=[(0, 33)], codes=[(0, 2, 0, 0, 3, 7)], num_tokens=33
        )
        inputs["w_sa"][:] = 1.0
        inputs["h"] = inputs["h"].clone()
        inputs["h"][row] = value
        if value == -torch.inf:  # a score that overflows while the row stays finite
            inputs["h"][row] = -3e38
        got = Router().forward(inputs)
        want = reference.prompt_router(**inputs)
        torch.testing.assert_close(got[0], want[0], equal_nan=True)
        torch.testing.assert_close(got[2], want[2], equal_nan=True)
