"""grouped_lora_ by path PREFILL_WGMMA, on GPUs of compute capability 9.0.

tests/test_emulated_prefill.py runs the same kernels on a CPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cores import MANY, RANKS, core_inputs
from test_emulated_prefill import WGMMA_CASES
from test_grouped_lora import (
    CASES,
    PATHS,
    Case,
    check_pool_inputs,
    on_16_bytes,
    pool_inputs,
    run_pool,
    to_device,
)
from test_rank_gates import gated_inputs

from milora import ops

WGMMA = {"path": ops.PREFILL_WGMMA}
HALVES = [torch.bfloat16, torch.float16]
LONG = Case(
    "long", 700, (32, 8, 200), 4096, (520, 1100), (0,) * 397 + (1,) * 290 + (2,) * 13, (0, 1, 2)
)


@pytest.fixture
def wgmma(device):
    """A device that has the path: the CPU, which takes any, or a GPU of 9.0."""
    if device == "cuda":
        needs_wgmma()
    return device


def needs_wgmma(dtype: torch.dtype = torch.bfloat16) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("PREFILL_WGMMA needs compute capability 9.0")
    if dtype == torch.float32:
        pytest.skip("PREFILL_WGMMA takes 16-bit dtypes")


def on(device: str, inputs: dict) -> dict:
    return {**on_16_bytes(to_device(inputs, device)), **WGMMA}


def check(inputs: dict, device: str) -> None:
    """Rows are laid out on the device: moving them there would close the gaps between them."""
    check_pool_inputs(inputs, device, ops.PREFILL_WGMMA, lay_out=on_16_bytes)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", [*CASES, *WGMMA_CASES, LONG], ids=str)
def test_against_reference(case, dtype, wgmma):
    check(pool_inputs(case, dtype), wgmma)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", [WGMMA_CASES[0], WGMMA_CASES[2], RANKS], ids=str)
def test_gates_and_cores_against_reference(case, dtype, wgmma):
    check(gated_inputs(case, dtype), wgmma)
    check(core_inputs(case, dtype, every=2), wgmma)


def test_one_row_may_have_any_width(wgmma):
    case = Case("odd_row", 1, (8,), 33, (41,), (0,), (0,))
    check_pool_inputs(pool_inputs(case, torch.bfloat16), wgmma, ops.PREFILL_WGMMA)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", [LONG, MANY], ids=str)
def test_is_batch_invariant(case, dtype, wgmma):
    inputs = on(wgmma, pool_inputs(case, dtype))
    together = run_pool(inputs)
    for t in range(0, case.num_tokens, 61):
        alone = {name: inputs[name][t : t + 1] for name in ("x", "route_of")}
        alone["y"] = [y[t : t + 1] for y in inputs["y"]]
        for s, y in enumerate(run_pool({**inputs, **alone})):
            assert torch.equal(y[0], together[s][t]), f"token {t}, slice {s}"


def test_leaves_idle_rows_bitwise(wgmma):
    case = Case("idle", 300, (8, 0), 64, (72,), (0,) * 130 + (1, -1, 2, 3, 0), (0, 0, -1, 1))
    inputs = pool_inputs(case, torch.bfloat16)
    inputs["gates"][1] = 0  # route 1: gate 0; -1: no route; 2: no adapter; 3: rank 0
    idle = inputs["route_of"] != 0
    inputs["y"][0][idle] = torch.tensor([torch.nan, -0.0, torch.inf, 1e-7] * 18).bfloat16()
    inputs["x"][idle] = torch.nan
    after = run_pool(on(wgmma, inputs))[0].cpu()
    before = inputs["y"][0]
    assert torch.equal(after[idle].view(torch.int16), before[idle].view(torch.int16))
    assert (after[~idle] != before[~idle]).any(1).all()


def test_the_cpu_takes_it_like_the_others():
    inputs = pool_inputs(WGMMA_CASES[0], torch.bfloat16)
    want = [run_pool({**inputs, "path": path}) for path in PATHS]
    for got in [*want, run_pool({**inputs, **WGMMA})]:
        assert all(map(torch.equal, got, want[0]))


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"])
def test_names_what_it_takes(device):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    case = replace(CASES[1], num_tokens=5)
    with pytest.raises(RuntimeError, match="must be bfloat16 or float16 on CUDA, got float32"):
        run_pool(on(device, pool_inputs(case, torch.float32)))
    inputs = to_device(pool_inputs(case, torch.bfloat16), device)
    if torch.cuda.get_device_capability() != (9, 0):
        with pytest.raises(RuntimeError, match=r"compute capability 9\.0"):
            run_pool({**inputs, **WGMMA})
        return
    odd = torch.zeros(5, 65, dtype=torch.bfloat16, device=device)[:, :64]
    for change in ({"x": odd}, {"y": [odd]}):
        with pytest.raises(RuntimeError, match=r"rows that start on 16 bytes .* stride of 65"):
            run_pool({**inputs, **WGMMA, **change})
