"""The ops in CUDA graphs and on several streams: captured once, replayed with other values."""

from __future__ import annotations

import pytest
import torch
from test_fused_lora import arguments, on
from test_grouped_lora import PATHS, Case, pool_inputs, to_device, train_inputs
from test_prefill_wgmma import needs_wgmma
from test_prompt_router import in_pool, router_inputs

from milora import _build, ops
from milora.prepared import PreparedUpdate

CASE = Case("graph", 150, (32, 17, 64), 256, (320, 136), (0,) * 70 + (1, 2) + (-1, 2), (0, 1, 2))


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    if not _build.cuda_archs():
        pytest.skip("milora was built without CUDA")


pytestmark = pytest.mark.cuda


def capture(function) -> torch.cuda.CUDAGraph:
    """A graph of function(), which has run once before on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def assert_replays(graph: torch.cuda.CUDAGraph, call, outputs: list[torch.Tensor]) -> None:
    """A replay leaves in `outputs` the bits that `call`, which was captured, leaves there."""
    call()
    want = [t.clone() for t in outputs]
    for out in outputs:
        out.fill_(torch.nan)
    graph.replay()
    for got, expected in zip(outputs, want, strict=True):
        assert torch.equal(got, expected)


def change_values(inputs: dict, seed: int) -> None:
    """Other tokens, weights, adapters, routes and gates (some 0) in the same memory."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, low, high):
        values = torch.randint(low, high, tensor.shape, generator=generator, dtype=tensor.dtype)
        tensor.copy_(values)

    draw(inputs["route_of"], -1, len(inputs["gates"]))
    draw(inputs["adapter_of"], -1, len(inputs["ranks"]))
    gates = torch.rand(inputs["gates"].shape, generator=generator)
    inputs["gates"].copy_(gates * (gates > 0.3))
    inputs["x"].copy_(torch.randn(inputs["x"].shape, generator=generator))
    other = pool_inputs(CASE, inputs["x"].dtype)["pool"]  # the same layout, other weights
    if inputs["pool"].numel() == other.numel():
        inputs["pool"].copy_(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", [*PATHS, ops.PREFILL_WGMMA])
def test_grouped_lora_replays(path, dtype):
    if path == ops.PREFILL_WGMMA:
        needs_wgmma(dtype)
    inputs = to_device(pool_inputs(CASE, dtype), "cuda")
    start = [t.clone() for t in inputs["y"]]

    def call():
        for y, value in zip(inputs["y"], start, strict=True):
            y.copy_(value)
        ops.grouped_lora_(**inputs, path=path)

    graph = capture(call)
    for seed in range(3):
        change_values(inputs, seed)
        assert_replays(graph, call, inputs["y"])


@pytest.mark.parametrize("path", PATHS)
def test_prepared_update_replays(path):
    inputs = to_device(pool_inputs(CASE, torch.bfloat16), "cuda")
    inputs |= {"x": inputs["x"].contiguous(), "y": [y.contiguous() for y in inputs["y"]]}
    start = [t.clone() for t in inputs["y"]]
    tables = [value for name, value in inputs.items() if name not in ("x", "y")]
    prepared = PreparedUpdate(inputs["y"], inputs["x"], *tables, path)

    def call():
        for y, value in zip(inputs["y"], start, strict=True):
            y.copy_(value)
        assert prepared(inputs["y"], inputs["x"])

    graph = capture(call)
    for seed in range(3):
        change_values(inputs, seed)
        assert_replays(graph, call, inputs["y"])


def test_fused_lora_replays():
    inputs = on("cuda", arguments(Case(**{**CASE.__dict__, "d_out": (320,)}), torch.bfloat16))
    out = torch.empty(len(inputs["x"]), 320, dtype=torch.bfloat16, device="cuda")

    def call():
        out.copy_(ops.fused_lora(**inputs))

    graph = capture(call)
    for seed in range(3):
        change_values(inputs, seed)
        assert_replays(graph, call, [out])


def test_training_replays():
    leaves, rest = train_inputs(CASE, torch.bfloat16)
    leaves = [t.cuda().requires_grad_() for t in leaves]
    scales, route_of, adapter_of = rest[0], rest[1].cuda(), rest[2].cuda()
    y, x, gates, *weights = leaves
    half = len(weights) // 2
    grads = [torch.empty_like(t) for t in leaves]

    def call():
        out = ops.grouped_lora(
            y, x, weights[:half], weights[half:], scales, gates, route_of, adapter_of
        )
        for grad, value in zip(grads, torch.autograd.grad(out.sum(), leaves), strict=True):
            grad.copy_(value)

    graph = capture(call)
    with torch.no_grad():
        route_of.copy_(route_of.flip(0))
        x.mul_(-0.5)
    assert_replays(graph, call, grads)


@pytest.mark.parametrize("d", [37, 4096])
def test_prompt_router_replays(d):
    """Other hidden states, spans and routers."""
    inputs = to_device(in_pool(router_inputs(torch.bfloat16, d)), "cuda")
    if d == 4096:
        inputs["h"] = inputs["h"].contiguous()  # whole vectors: another kernel
    num_prompts, num_experts = len(inputs["spans"]), inputs["num_experts"]
    shapes = (num_experts, num_experts, d)
    outputs = [torch.empty(num_prompts, n, device="cuda") for n in shapes]

    def call():
        for out, value in zip(outputs, ops.prompt_router_pool(**inputs), strict=True):
            out.copy_(value)

    graph = capture(call)
    for shift in range(3):
        other = to_device(in_pool(router_inputs(torch.bfloat16, d)), "cuda")
        for name in ("h", "pool"):
            inputs[name].copy_(other[name])
        for name in ("spans", "router_of"):
            inputs[name].copy_(other[name].roll(shift, 0))
        assert_replays(graph, call, outputs)


@pytest.mark.parametrize("path", [*PATHS, ops.PREFILL_WGMMA])
def test_streams_do_not_disturb_each_other(path):
    """Two streams at once, each with its own workspace: the bits of one after the other."""
    if path == ops.PREFILL_WGMMA:
        needs_wgmma()
    both = [to_device(pool_inputs(CASE, torch.bfloat16), "cuda") for _ in range(2)]
    want = []
    for inputs in both:
        copies = [t.clone() for t in inputs["y"]]
        ops.grouped_lora_(**{**inputs, "y": copies}, path=path)
        want.append(copies)
    streams = [torch.cuda.Stream() for _ in both]
    for _ in range(20):
        got = [[t.clone() for t in inputs["y"]] for inputs in both]
        torch.cuda.synchronize()
        for stream, inputs, copies in zip(streams, both, got, strict=True):
            with torch.cuda.stream(stream):
                ops.grouped_lora_(**{**inputs, "y": copies}, path=path)
        torch.cuda.synchronize()
        for have, expected in zip(got, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(have, expected, strict=True))
