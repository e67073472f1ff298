"""PreparedUpdate: grouped_lora_ on a CPU without torch's dispatcher, and decode steps with it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_cores import core_inputs
from test_grouped_lora import CASES, Case, pool_inputs
from tiny_models import build, prompts, randomize

import milora
from milora import MiLoRAConfig, ops
from milora.prepared import PreparedUpdate

TABLES = ("pool", "offsets", "ranks", "scales", "gates", "route_of", "adapter_of", "experts")


def contiguous(case: Case, dtype: torch.dtype) -> dict:
    inputs = pool_inputs(case, dtype)
    return {**inputs, "x": inputs["x"].contiguous(), "y": [y.contiguous() for y in inputs["y"]]}


def prepare(inputs: dict) -> PreparedUpdate:
    return PreparedUpdate(inputs["y"], inputs["x"], *(inputs[name] for name in TABLES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_the_op(case, dtype):
    inputs = contiguous(case, dtype)
    prepared = prepare(inputs)
    for _ in range(2):  # other values of the same shapes
        x, y = torch.randn_like(inputs["x"]), [torch.randn_like(t) for t in inputs["y"]]
        want = [t.clone() for t in y]
        ops.grouped_lora_(**{**inputs, "x": x, "y": want})
        assert prepared(y, x)
        assert all(torch.equal(a, b) for a, b in zip(y, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_the_op_with_cores(dtype):
    inputs = core_inputs(Case("cores", 9, (5, 64), 40, (50, 30), (0, 1), (0, 1)), dtype, every=3)
    want = [t.clone() for t in inputs["y"]]
    ops.grouped_lora_(**{**inputs, "y": want})
    assert prepare(inputs)(inputs["y"], inputs["x"])
    assert all(torch.equal(a, b) for a, b in zip(inputs["y"], want, strict=True))


def test_reads_tables_that_change_in_place():
    inputs = contiguous(CASES[2], torch.float32)
    prepared = prepare(inputs)
    inputs["gates"].zero_()
    before = [t.clone() for t in inputs["y"]]
    assert prepared(inputs["y"], inputs["x"])
    assert all(torch.equal(a, b) for a, b in zip(inputs["y"], before, strict=True))
    inputs["route_of"].fill_(10**6)
    with pytest.raises(RuntimeError, match="grouped_lora_: route_of must be in"):
        prepared(inputs["y"], inputs["x"])


@pytest.mark.parametrize("change", ["dtype", "size", "strides", "subclass", "y_size"])
def test_other_tensors_are_left_to_the_op(change):
    inputs = contiguous(CASES[2], torch.float32)
    prepared, x, y = prepare(inputs), inputs["x"], [t.clone() for t in inputs["y"]]
    if change == "dtype":
        x = x.double()
    elif change == "size":
        x = x[:-1]
    elif change == "strides":
        x = x.T.contiguous().T
    elif change == "subclass":
        x = torch.nn.Parameter(x)
    else:
        y[0] = torch.cat([y[0], y[0]])
    before = [t.clone() for t in y]
    assert not prepared(y, x)
    assert all(torch.equal(a, b) for a, b in zip(y, before, strict=True))


def test_wrong_tables_are_refused():
    inputs = contiguous(CASES[2], torch.float32)
    with pytest.raises(RuntimeError, match="grouped_lora_prepare: scales must be Float"):
        prepare({**inputs, "scales": inputs["scales"].double()})


def test_many_threads():
    inputs = contiguous(CASES[2], torch.float32)
    prepared = prepare(inputs)
    start = inputs["y"]
    want = [t.clone() for t in start]
    prepared(want, inputs["x"])

    def run(_: int) -> bool:
        y = [t.clone() for t in start]
        return prepared(y, inputs["x"]) and all(map(torch.equal, y, want))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(60)))


def test_decode_steps_use_it(monkeypatch):
    model = build("llama")
    for name in ("a", "b"):
        milora.attach(model, MiLoRAConfig(rank=4, top_k=3), adapter_name=name)
    randomize(model).eval()
    ids, names = prompts(3, 7), ["a", None, "b"]
    calls = {"op": 0, "prepared": 0}
    op, run = ops.grouped_lora_, PreparedUpdate.__call__

    def counted_op(*args):
        calls["op"] += 1
        return op(*args)

    def counted_run(*args):
        done = run(*args)
        calls["prepared"] += done
        return done

    def generate():
        calls.update(op=0, prepared=0)
        return model.generate(
            ids, adapter_names=names, max_new_tokens=6, min_new_tokens=6, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip

    generate()  # shows which modules share an input
    monkeypatch.setattr(ops, "grouped_lora_", counted_op)
    monkeypatch.setattr(PreparedUpdate, "__call__", counted_run)
    got = generate()
    # A prefill and five decode steps; the first of these prepares the calls of the others.
    assert calls["prepared"] == 4 * (calls["op"] // 2) > 0
    monkeypatch.setattr(PreparedUpdate, "__call__", lambda *_: False)
    want = generate()
    assert calls["prepared"] == 0
    assert torch.equal(got.sequences, want.sequences)
    assert all(map(torch.equal, got.logits, want.logits))
