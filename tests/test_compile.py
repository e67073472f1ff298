"""`torch.compile`: the same numbers as eager, and few graph breaks.

The router runs inside the graph; what reads values of tensors (where does the prompt end, which
cache has a route) runs before the first block and after the last, outside of it.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import StaticCache

import milora
from milora.attach import runtime_of

# Compilers decompose attention and fuse norms: sums in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _fresh():
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(**options):
    config = milora.MiLoRAConfig(**{"rank": 4, "balance_coef": 0.1, **options})
    return tiny_models.randomize(milora.attach(tiny_models.build("llama"), config))


def num_breaks() -> int:
    return sum(counters["graph_break"].values())


@torch.no_grad()
def decode(forward, config, ids: Tensor, steps: int = 4) -> Tensor:
    """[steps + 1, rows, vocab]: logits of a prefill and greedy steps with a static cache."""
    cache = StaticCache(config=config, max_cache_len=32)
    logits = []
    for _ in range(steps + 1):
        logits.append(forward(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1])
        ids = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expert", ["lora", "dora", "smora"])
def test_prefill_and_decode_equal_eager(backend, expert):
    if backend == "inductor" and expert != "lora":
        pytest.skip("one expert kind is enough for the slow backend")
    model = make(expert=expert, expert_options={"top_k": 2} if expert == "smora" else {})
    ids = tiny_models.prompts(2, 8)
    expected = decode(model, model.config, ids)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter)
    milora.reset_stats(model)
    actual = decode(compiled, model.config, ids)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert milora.stats(model) == milora.Stats(routed_prompts=4, router_launches=2)
    # One break at the start of the prefill, its end, and the start of a decode step (twice: dynamo
    # recompiles the second step); no block and no module breaks the graph.
    assert num_breaks() <= 4
    assert counter.frame_count <= 3
    counters.clear()
    other = tiny_models.prompts(2, 8, seed=3)  # other prompts, other routes, the same graphs
    expected = decode(model, model.config, other)
    torch.testing.assert_close(decode(compiled, model.config, other), expected, **TOLERANCE)
    assert num_breaks() == 0


def test_changed_weights_are_seen():
    """Packs of experts are part of no graph."""
    model = make()
    ids = tiny_models.prompts(2, 8)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(ids, use_cache=True)
        tiny_models.randomize(model, seed=9)
        actual = compiled(ids, use_cache=True).logits
        torch.testing.assert_close(actual, model(ids, use_cache=True).logits, **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_step_equals_eager(backend):
    ids = tiny_models.prompts(3, 12)
    labels = ids.clone()
    labels[:, :5] = -100

    def step(forward, model) -> tuple[Tensor, dict[str, Tensor]]:
        runtime_of(model).windows["default"].steps.clear()
        model.zero_grad(set_to_none=True)
        loss = forward(input_ids=ids, labels=labels).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    model = make().train()
    loss, gradients = step(model, model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter)
    compiled_loss, compiled_gradients = step(compiled, model)
    torch.testing.assert_close(compiled_loss, loss, **TOLERANCE)
    for name, gradient in gradients.items():
        actual = compiled_gradients[name]
        if gradient is None:  # eager skips experts that nobody uses
            assert actual is None or not actual.any(), name
        else:
            torch.testing.assert_close(actual, gradient, **TOLERANCE, msg=name)
    assert num_breaks() <= 2
    step(compiled, model)  # the second step finds what the first has set, and may recompile a hook
    counters.clear()
    again, _ = step(compiled, model)
    torch.testing.assert_close(again, loss, **TOLERANCE)
    assert num_breaks() == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_generate_with_a_static_cache(compiled):
    model = make()
    inputs = tiny_models.left_padded([8, 5])
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **options)
    if compiled:
        model.forward = torch.compile(model.forward, backend="eager")
    actual = model.generate(**inputs, cache_implementation="static", **options)
    assert torch.equal(actual, expected)


def test_other_shapes_recompile_and_agree():
    model = make()
    compiled = torch.compile(model, backend="eager")
    for rows, length in ((2, 6), (3, 9)):
        ids = tiny_models.prompts(rows, length, seed=rows)
        expected = decode(model, model.config, ids, steps=1)
        actual = decode(compiled, model.config, ids, steps=1)
        torch.testing.assert_close(actual, expected, **TOLERANCE)
