"""Modules that read the same tensor share one op call, and nothing else changes."""

from __future__ import annotations

import collections

import pytest
import torch
from test_routing import LENGTHS, NUM_BLOCKS, VOCAB, make_model, pad, randomize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import milora
from milora.prepared import PreparedUpdate
from milora.runtime import runtime_of


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(7)
    return pad([torch.randint(3, VOCAB, (n,), generator=generator) for n in LENGTHS], "left")


def siblings_of(model) -> list[set[frozenset[str]]]:
    runtime = runtime_of(model)
    return [
        {
            frozenset(block.experts[s.column].rpartition(".")[2] for s in linear.siblings)
            for linear in linears
            if linear.siblings
        }
        for block, linears in zip(runtime.blocks, runtime.linears, strict=True)
    ]


class OpCount(TorchDispatchMode):
    """Counts every op that reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.ops = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def test_one_forward_shows_the_siblings(prompts):
    model = make_model()
    assert siblings_of(model) == [set()] * NUM_BLOCKS
    with torch.no_grad():
        model(**prompts, use_cache=True)
    qkv = frozenset(("q_proj", "k_proj", "v_proj"))
    assert siblings_of(model) == [{qkv, frozenset(("gate_proj", "up_proj"))}] * NUM_BLOCKS


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_siblings_get_the_bits_of_modules_that_work_alone(prompts, mode):
    model = make_model(top_k=4)
    runtime = runtime_of(model)

    def run() -> list[torch.Tensor]:
        with mode():
            out = model(**prompts, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            step = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return [out.logits, step.logits]

    alone = run()  # the forward that learns is the last one in which each module works alone
    runtime.forget_siblings()
    runtime.siblings_known = True
    for got, want in zip(run(), alone, strict=True):
        assert torch.equal(got, want)
    runtime.forget_siblings()
    run()
    assert all(siblings_of(model))
    for got, want in zip(run(), alone, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_decode_step_adds_four_calls_a_block_and_allocates_nothing(
    prompts, prepared, monkeypatch
):
    """Beside the base's own ops there are the four calls for qkv, o, gate and up, down, which on a
    CPU are no torch ops: so no tensor is made, viewed or copied for the adapters."""
    model = make_model(top_k=7)
    run = PreparedUpdate.__call__
    calls = []

    def counted(*args):
        calls.append(prepared and run(*args))
        return calls[-1]

    monkeypatch.setattr(PreparedUpdate, "__call__", counted)

    def ops_of_a_step(cache) -> collections.Counter:
        token = torch.full((len(LENGTHS), 1), 5)
        calls.clear()
        with torch.no_grad(), OpCount() as count:
            model(input_ids=token, past_key_values=cache, use_cache=True)
        return count.ops

    def cache_of(name):
        milora.set_adapter(model, name)
        with torch.no_grad():
            cache = model(**prompts, use_cache=True).past_key_values
        ops_of_a_step(cache)  # the first step prepares the calls for this number of tokens
        return cache

    bare = ops_of_a_step(cache_of(None))
    routed = ops_of_a_step(cache_of("default"))
    tries = 1 if prepared else 2  # as the tensors are, then made contiguous
    assert len(calls) == tries * 4 * NUM_BLOCKS and all(calls) == prepared
    routed.subtract(bare)
    changed = {name: count for name, count in routed.items() if count}
    assert changed == ({} if prepared else {"milora::grouped_lora_": 4 * NUM_BLOCKS})


def test_bare_rows_alone_cost_no_op(prompts):
    model = make_model()
    with torch.no_grad():
        model(**prompts, use_cache=True)  # learns
        with OpCount() as count:
            model(**prompts, use_cache=True, adapter_names=[None] * len(LENGTHS))
    assert not any(name.startswith("milora::") for name in count.ops)


def test_adapters_that_come_later_are_served_too(prompts):
    model = make_model()
    with torch.no_grad():
        model(**prompts, use_cache=True)  # packs the first
    milora.attach(model, milora.MiLoRAConfig(rank=2, top_k=1), "second")
    randomize(model, 5)
    milora.set_adapter(model, "default")
    with torch.no_grad():
        bare = model(**prompts, use_cache=True, adapter_names=[None] * 3).logits
        alone = model(**prompts, use_cache=True, adapter_names=["second"] * 3).logits
        default = model(**prompts, use_cache=True, adapter_names=["default"] * 3).logits
        mixed = model(**prompts, use_cache=True, adapter_names=["default", None, "second"]).logits
    assert torch.equal(mixed[0], default[0])
    assert torch.equal(mixed[1], bare[1])
    assert torch.equal(mixed[2], alone[2])


# ---- modules that are no siblings, or not always ------------------------------------------------


class Block(nn.Module):
    """Three linear modules; `order` says what each forward feeds them."""

    def __init__(self, order: list[str]):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in "abc")
        self.order = order

    def forward(self, hidden_states):
        x = hidden_states * 1.0
        how = self.order[0]
        a = self.a(x)
        if how == "in place":
            x += 1.0
        b = self.b(x + 1.0) if how == "other" else self.b(x)
        c = 0.0 if how == "skipped" else self.c(x)
        return hidden_states + a * b + c


class Toy(nn.Module):
    def __init__(self, order: list[str]):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList([Block(order) for _ in range(2)])

    def forward(self, input_ids):
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return h


def toy(order: list[str]) -> Toy:
    torch.manual_seed(1)
    model = Toy(order).eval()
    milora.attach(model, milora.MiLoRAConfig(rank=2, top_k=2))
    randomize(model, 1)
    return model


@pytest.mark.parametrize("first", ["same", "other", "in place", "skipped"])
@pytest.mark.parametrize("then", ["same", "other", "in place", "skipped"])
def test_a_model_may_change_what_it_does(first, then):
    """Whatever the first forward showed, later ones are right: those of a model that never learns
    siblings are the reference."""
    order = [first]
    model, reference = toy(order), toy(order)
    runtime_of(reference).siblings_known = True
    ids = torch.arange(3, 9).view(2, 3)

    def check() -> None:
        with torch.no_grad(), milora.prompt_lengths(model, 2), milora.prompt_lengths(reference, 2):
            assert torch.equal(model(ids), reference(ids))

    check()
    order[0] = then
    check()
    check()


def test_siblings_that_are_not_asked_for_are_forgotten():
    order = ["same"]
    model = toy(order)
    ids = torch.arange(3, 9).view(2, 3)
    with torch.no_grad(), milora.prompt_lengths(model, 2):
        model(ids)
        assert siblings_of(model) == [{frozenset("abc")}] * 2
        order[0] = "skipped"
        model(ids)
    assert siblings_of(model) == [set()] * 2


def test_hooks_of_a_sibling_run_and_may_change_its_input(prompts):
    model = make_model()
    with torch.no_grad():
        model(**prompts, use_cache=True)
        want = model(**prompts, use_cache=True).logits
        seen = []
        k_proj = model.model.layers[0].self_attn.k_proj
        handle = k_proj.register_forward_hook(lambda *args: seen.append(1))
        assert torch.equal(model(**prompts, use_cache=True).logits, want)
        assert seen
        handle.remove()
        handle = k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        assert not torch.equal(model(**prompts, use_cache=True).logits, want)
        handle.remove()
        assert torch.equal(model(**prompts, use_cache=True).logits, want)
