"""fused_lora: a module and its experts in one op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cores import RANKS, with_cores
from test_grouped_lora import DTYPES, Case, pool_inputs
from tolerance import assert_as_good_as_torch

from milora import ops, reference

CASES = [
    Case("no_tokens", 0, (8,), 64, (64,), (0,), (0,)),
    Case("one_token", 1, (32,), 64, (64,), (0,), (0,)),
    Case("odd_columns", 7, (3, 5), 40, (99,), (0, 1), (0, 1)),
    Case("rank_mix", 9, (1, 2, 17, 64, 256), 48, (80,), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
    Case("bare_rows", 8, (8,), 32, (40,), (0, -1, 1), (0, -1)),
    Case("rank_zero", 6, (0, 8), 32, (40,), (0, 1), (0, 1)),
    Case("runs", 150, (32, 17, 70), 136, (300,), (0,) * 30 + (1, 2, -1) + (2,) * 60, (0, 1, 2)),
    Case("long_runs", 700, (32, 8), 1096, (520,), (0,) * 397 + (1,) * 303, (0, 1)),
    Case("dora", 70, (8, 12), 40, (50,), (0,) * 20 + (1, 2, 0), (0, 1, 1), dora=True),
]


def arguments(case: Case, dtype: torch.dtype, bias: bool = True, cores: int = 0) -> dict:
    """Every `cores`th expert has a core; 0: none has."""
    inputs = pool_inputs(case, dtype)
    if cores:
        inputs = with_cores(inputs, cores)
    (expert,) = inputs.pop("experts")
    inputs.pop("y")
    d_out = case.d_out[0]
    return {
        **inputs,
        "w": (torch.randn(d_out, case.d_in) / case.d_in**0.5).to(dtype),
        "bias": torch.randn(d_out).to(dtype) if bias else None,
        "expert": expert,
    }


def on(device: str, inputs: dict) -> dict:
    """The inputs on a device; skips where the device has no fused kernel for them."""
    if device == "cuda":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("fused_lora on CUDA needs compute capability 9.0")
        if inputs["x"].dtype == torch.float32:
            pytest.skip("fused_lora on CUDA takes 16-bit dtypes")
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case, dtype, bias, device):
    check(arguments(case, dtype, bias), device)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, replace(RANKS, d_out=(80,))], ids=str)
def test_with_cores(case, dtype, every, device):
    check(arguments(case, dtype, cores=every), device)


def check(inputs: dict, device: str) -> None:
    dtype = inputs["x"].dtype
    actual = ops.fused_lora(**on(device, inputs)).cpu()
    wide = {n: inputs[n] if inputs[n] is None else inputs[n].double() for n in ("x", "w", "bias")}
    expected = reference.fused_lora(**{**inputs, **wide}, pool_dtype=dtype)
    assert_as_good_as_torch(actual, expected, reference.fused_lora(**inputs))


def test_takes_leading_dimensions(device):
    inputs = on(device, arguments(CASES[4], torch.bfloat16))
    flat = ops.fused_lora(**inputs)
    shaped = ops.fused_lora(**{**inputs, "x": inputs["x"].view(2, 4, -1)})
    assert shaped.shape == (2, 4, 40) and torch.equal(shaped.view_as(flat), flat)


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"])
def test_is_batch_invariant_on_cuda(device):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    inputs = on(device, arguments(CASES[7], torch.bfloat16))
    together = ops.fused_lora(**inputs)
    for t in (0, 127, 128, 396, 397, 699):
        rows = {name: inputs[name][t : t + 1] for name in ("x", "route_of")}
        assert torch.equal(ops.fused_lora(**{**inputs, **rows})[0], together[t]), f"token {t}"


def test_opcheck():
    inputs = arguments(CASES[2], torch.float32)
    names = ("x", "w", "bias", "pool", "offsets", "ranks", "scales", "gates", "route_of")
    values = [inputs[name] for name in (*names, "adapter_of", "expert")]
    torch.library.opcheck(torch.ops.milora.fused_lora.default, tuple(values))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w": torch.zeros(99, 41)}, r"w must be \[d_out, d_in\] = \[any, 40\], got \[99, 41\]"),
        ({"w": torch.zeros(99, 40).double()}, "w must be Float, got Double"),
        ({"bias": torch.zeros(98)}, r"bias must be \[d_out\] = \[99\], got \[98\]"),
        ({"expert": 2}, r"experts must be in \[0, 2\), got 2"),
        ({"gates": torch.ones(2, 4)}, "gates must be"),
        ({"x": torch.zeros(())}, "x must have at least one dimension"),
    ],
)
def test_errors(change, message):
    inputs = arguments(CASES[2], torch.float32)
    with pytest.raises(RuntimeError, match="^fused_lora: " + message):
        ops.fused_lora(**{**inputs, **change})
