"""The prompt router's kernels on the emulator (tests/cuda_emulator)."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import pytest
import torch
from cuda_emulation import DTYPE_CODES, launches
from test_prompt_router import (
    ALL_CODES,
    DTYPES,
    NUM_EXPERTS,
    SPANS,
    in_pool,
    router_inputs,
    run,
)
from tolerance import assert_as_good_as_torch

from milora import reference


class RouterParams(ctypes.Structure):
    """PromptRouterParams."""

    _fields_ = [
        ("h", c_void_p),
        ("h_stride", c_int64),
        *((name, c_void_p) for name in ("spans", "router_of", "w_sa", "w_r", "coef", "pool")),
        ("pool_bytes", c_int64),
        *((name, c_void_p) for name in ("offsets", "codes", "probs", "gates", "pooled")),
        *((f"num_{name}", c_int64) for name in ("tokens", "prompts", "routers", "experts")),
        ("d", c_int64),
        ("dtype", c_int32),
    ]


class RouterBackwardParams(ctypes.Structure):
    """PromptRouterBackwardParams."""

    _fields_ = [
        *((name, c_void_p) for name in ("dprobs", "dgates", "dpooled")),
        ("forward", RouterParams),
        *((name, c_void_p) for name in ("dh", "dw_sa", "dw_r", "dcoef")),
    ]


class Router:
    """The router's kernels on the emulator, called as `milora.reference` is."""

    def __init__(self, order: int = 0):
        self.kernels = launches(RouterParams, RouterBackwardParams)
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
            dtype=DTYPE_CODES[h.dtype],
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
        assert not self.kernels.router_forward(ctypes.byref(p), self.order)
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
                assert not router.kernels.router_backward(ctypes.byref(params), router.order)
                return tuple(found)

        return Function.apply(*(inputs[name] for name in names))


def aligned_router_inputs(*args, **options) -> dict:
    """Rows of whole vectors on 16 bytes, which the fast kernel asks for."""
    inputs = router_inputs(*args, **options)
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


@pytest.mark.parametrize("num_tokens", [31, 32, 33, 34])
@pytest.mark.parametrize("num_prompts", [1, 2, 3])
def test_router_counts(num_prompts, num_tokens):
    """The workspace is the launcher's: vectors in it lie on their own size for any counts."""
    spans = [(i * 10, i * 10 + 10) for i in range(num_prompts - 1)]
    spans.append((10 * len(spans), num_tokens))
    check_router(aligned_router_inputs(torch.bfloat16, 64, spans=spans, num_tokens=num_tokens))


def test_router_spans_that_overlap():
    """Against the contract, so no prompt but the first gets its own; nothing outside is read."""
    codes = [(0, 0, 0, 0, 3, NUM_EXPERTS)]
    inputs = aligned_router_inputs(torch.float32, 64, [(0, 64)], codes, num_tokens=64)
    inputs = {
        **inputs,
        "spans": inputs["spans"].repeat(4, 1),
        "router_of": inputs["router_of"].repeat(4),
    }
    want = reference.prompt_router(**inputs)
    got = run(Router(), inputs)
    assert all(t.isfinite().all() for t in got)
    torch.testing.assert_close(got[0][0], want[0][0])


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
