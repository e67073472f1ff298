"""The packed weights of attached adapters, where threads name, add and delete adapters."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import build, prompts, randomize

import milora
from milora.packs import Packs
from milora.runtime import runtime_of


@pytest.fixture
def model():
    model = build("llama")
    for name, rank in (("a", 4), ("b", 4), ("c", 2)):
        milora.attach(model, milora.MiLoRAConfig(rank=rank, top_k=3), name)
    return randomize(model)


def logits(model, *names: str) -> torch.Tensor:
    with torch.no_grad():
        ids = prompts(len(names), 6)
        return model(ids, use_cache=True, adapter_names=list(names)).logits


def in_a_thread(function) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_an_adapter_that_is_named_while_a_block_is_packed_gets_into_it(model, monkeypatch):
    want = logits(model, "a"), logits(model, "b")
    runtime = runtime_of(model)
    runtime.forget_packs()
    build_block, others = Packs._build, []

    def build_slowly(packs, *args):
        built = build_block(packs, *args)
        if not others:
            others.append(None)
            in_a_thread(lambda: others.append(logits(model, "b")))
        return built

    monkeypatch.setattr(Packs, "_build", build_slowly)
    assert torch.equal(logits(model, "a"), want[0])
    assert torch.equal(others[1], want[1])
    assert runtime.packs.block(0, torch.float32).ranks.shape[0] == 2


@pytest.mark.parametrize("change", ["delete", "attach", "train"])
def test_a_running_forward_keeps_its_slots(model, change):
    """Slots that were given anew would be those of other adapters, without any error."""
    want = logits(model, "a"), logits(model, "b")  # slots 0 and 1

    def other() -> None:
        if change == "delete":
            milora.delete_adapter(model, "c")
        elif change == "attach":
            milora.attach(model, milora.MiLoRAConfig(rank=4), "d")
        else:
            runtime_of(model).forget_packs()  # what the first forward of a training does
        logits(model, "b", "a")

    def between_blocks(*_) -> None:
        handle.remove()
        in_a_thread(other)

    handle = model.model.layers[0].register_forward_hook(between_blocks)
    assert torch.equal(logits(model, "b"), want[1])
    assert torch.equal(logits(model, "a"), want[0])
