"""The cores of grouped_lora_, B C (r * A x): against the reference, at their edges, refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_grouped_lora import (
    CASES,
    DTYPES,
    PATHS,
    Case,
    check_pool_inputs,
    pool_inputs,
    run_pool,
    to_device,
)
from test_op_edges import POOL
from test_rank_gates import (
    MIXED,
    ROWS,
    SHAPES,
    check_batch_shapes,
    check_rows_alone,
    check_strides,
    gated_inputs,
)

from milora import ops, reference
from milora.tables import EXPERT_PARTS

CORE = EXPERT_PARTS.index("core")
EDGES = [case for case in CASES + POOL if max(case.ranks) > 0]
SIX = tuple(range(6))
RANKS = Case("ranks", 25, (1, 15, 16, 17, 64, 256), 48, (80, 33), SIX, SIX)
LONG = (0,) * 70 + (1,) * 65 + (2,) * 15
MANY = Case("many_rows", 150, (17, 64, 256), 70, (90,), LONG, (0, 1, 2))


def with_cores(inputs: dict, every: int = 1) -> dict:
    """Cores for the experts number 0, every, 2 every, ... of `inputs`; their padding is NaN."""
    dtype, offsets = inputs["x"].dtype, inputs["offsets"].clone()
    pieces, end = [inputs["pool"]], inputs["pool"].numel()
    for number, (i, e) in enumerate(inputs["ranks"].nonzero().tolist()):
        if number % every:
            continue
        rank = int(inputs["ranks"][i, e])
        core = (torch.randn(rank, rank) / rank**0.5).to(dtype)
        core_alone, _, _ = reference.pack_pool([[{"a": core}]])
        offsets[i, e, CORE] = end
        pieces.append(core_alone)
        end += core_alone.numel()
    return {**inputs, "pool": torch.cat(pieces), "offsets": offsets}


def core_inputs(case: Case, dtype: torch.dtype, every: int = 1) -> dict:
    return with_cores(pool_inputs(case, dtype), every)


def without_cores(inputs: dict) -> dict:
    offsets = inputs["offsets"].clone()
    offsets[:, :, CORE] = -1
    return {**inputs, "offsets": offsets}


def core_of(inputs: dict, adapter: int, expert: int) -> torch.Tensor:
    """The core in the pool, to be read or changed."""
    rank = int(inputs["ranks"][adapter, expert])
    at = int(inputs["offsets"][adapter, expert, CORE])
    return reference.read_pool(inputs["pool"], at, rank, rank, inputs["x"].dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*EDGES, RANKS, MANY], ids=str)
def test_against_reference(case, dtype, path, device):
    check_pool_inputs(core_inputs(case, dtype), device, path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [RANKS, MANY], ids=str)
def test_on_each_isa(case, dtype, isa):
    check_pool_inputs(core_inputs(case, dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [RANKS, MANY], ids=str)
def test_beside_adapters_without_a_core(case, dtype, path, device):
    """Most of the experts have none; what those get, they get without any core in the pool too."""
    inputs = core_inputs(case, dtype, every=3)
    check_pool_inputs(inputs, device, path)
    inputs = to_device(inputs, device) | {"path": path}
    adapters = inputs["adapter_of"][inputs["route_of"].long()].long()
    pairs = zip(run_pool(inputs), run_pool(without_cores(inputs)), strict=True)
    for s, (got, plain) in enumerate(pairs):
        bare = inputs["offsets"][adapters, inputs["experts"][s], CORE] < 0
        assert torch.equal(got[bare], plain[bare])
        assert not torch.equal(got[~bare], plain[~bare])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [RANKS, MANY], ids=str)
def test_after_rank_gates(case, dtype, path, device):
    check_pool_inputs(with_cores(gated_inputs(case, dtype)), device, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_changes_no_bit(dtype, path, device):
    inputs = core_inputs(MIXED, dtype)
    for i, e in inputs["ranks"].nonzero().tolist():
        core = core_of(inputs, i, e)
        core.copy_(torch.eye(len(core)))
    inputs = to_device(inputs, device) | {"path": path}
    for got, want in zip(run_pool(inputs), run_pool(without_cores(inputs)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_batch_invariant(dtype, path, device):
    inputs = with_cores(gated_inputs(MIXED, dtype))
    check_rows_alone(to_device(inputs, device) | {"path": path})


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_at_any_batch_shape_and_thread_count(dtype, isa):
    check_batch_shapes(with_cores(gated_inputs(SHAPES, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_start_anywhere(dtype, isa):
    check_strides(core_inputs(ROWS, dtype))


@pytest.mark.parametrize("path", PATHS)
def test_one_adapters_nan_is_not_anothers(path, device):
    """Adapters 0 and 1 share A and B; the core of 1 is NaN, and so are its rows alone."""
    case = Case("shared", 12, (9, 9), 40, (50,), (0, 1, -1, 2), (0, 1, -1))
    inputs = core_inputs(case, torch.float32)
    inputs["offsets"][1, :, :CORE] = inputs["offsets"][0, :, :CORE]
    check_pool_inputs(inputs, device, path)
    clean = run_pool({**to_device(inputs, device), "path": path})[0].cpu()
    core_of(inputs, 1, 1).fill_(torch.nan)
    dirty = run_pool({**to_device(inputs, device), "path": path})[0].cpu()
    theirs = inputs["route_of"] == 1
    assert dirty[theirs].isnan().all() and torch.equal(dirty[~theirs], clean[~theirs])


def test_idle_rows_keep_their_bits(device):
    case = replace(MIXED, route_of=(0, 1, -1, 2), adapter_of=(0, -1, 1))
    inputs = core_inputs(case, torch.bfloat16)
    inputs["gates"][2] = 0
    idle = inputs["route_of"] != 0
    for y in inputs["y"]:
        y[idle] = torch.nan
    for y in run_pool(to_device(inputs, device)):
        assert y[idle].isnan().all() and not y[~idle].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    inputs = core_inputs(CASES[2], dtype)
    torch.library.opcheck(torch.ops.milora.grouped_lora_.default, tuple(inputs.values()))


@pytest.mark.parametrize("at", [8, 1 << 40])
def test_a_core_outside_of_the_pool(at):
    inputs = pool_inputs(CASES[2], torch.float32)
    inputs["offsets"][1, 2, CORE] = at
    with pytest.raises(
        RuntimeError,
        match="^grouped_lora_: offsets must place the core of adapter 1, expert 2 on 16 bytes "
        rf"inside the pool of \d+ bytes, got {at} \+ 160",
    ):
        ops.grouped_lora_(**inputs)


def test_a_core_that_ends_past_the_pool():
    inputs = pool_inputs(CASES[2], torch.float32)
    inputs["offsets"][1, 2, CORE] = (inputs["pool"].numel() - 159) // 16 * 16 + 16
    with pytest.raises(RuntimeError, match="offsets must place the core"):
        ops.grouped_lora_(**inputs)


def test_tables_of_four_columns_are_refused():
    inputs = pool_inputs(CASES[2], torch.float32)
    message = r"offsets must be \[num_adapters, num_experts, 5\] = .*, got \[2, 3, 4\]"
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_lora_(**{**inputs, "offsets": inputs["offsets"][:, :, :4].contiguous()})


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("path", PATHS)
def test_cuda_leaves_rows_with_a_core_outside_alone(path, device):
    inputs = to_device(pool_inputs(CASES[2], torch.float32), device) | {"path": path}
    inputs["offsets"][1, :, CORE] = 1 << 40
    for got, y in zip(run_pool(inputs), inputs["y"], strict=True):
        assert torch.equal(got[1::2], y[1::2]) and not torch.equal(got[::2], y[::2])
