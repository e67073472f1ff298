"""PreparedUpdate: grouped_lora_ without torch's dispatcher, and decode steps with it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_cores import core_inputs
from test_grouped_lora import CASES, PATHS, Case, pool_inputs, to_device
from tiny_models import build, prompts, randomize
from torch import nn

import milora
from milora import MiLoRAConfig, ops
from milora.prepared import PreparedUpdate

TABLES = ("pool", "offsets", "ranks", "scales", "gates", "route_of", "adapter_of", "experts")


def contiguous(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict:
    inputs = to_device(pool_inputs(case, dtype), device)
    return {**inputs, "x": inputs["x"].contiguous(), "y": [y.contiguous() for y in inputs["y"]]}


def prepare(inputs: dict, *path: int) -> PreparedUpdate:
    return PreparedUpdate(inputs["y"], inputs["x"], *(inputs[name] for name in TABLES), *path)


def check_bits(inputs: dict, path: int = ops.DECODE) -> None:
    """Prepared once, run twice, on other values of the same shapes: the op's bits."""
    prepared = prepare(inputs, path)
    for _ in range(2):
        x, y = torch.randn_like(inputs["x"]), [torch.randn_like(t) for t in inputs["y"]]
        want = [t.clone() for t in y]
        ops.grouped_lora_(**{**inputs, "x": x, "y": want}, path=path)
        assert prepared(y, x)
        assert all(torch.equal(a, b) for a, b in zip(y, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_as_the_op(case, path, dtype, device):
    check_bits(contiguous(case, dtype, device), path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_the_op_with_cores(dtype, device):
    case = Case("cores", 9, (5, 64), 40, (50, 30), (0, 1), (0, 1))
    check_bits(to_device(core_inputs(case, dtype, every=3), device))


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


def test_wrong_arguments_are_refused():
    inputs = contiguous(CASES[2], torch.float32)
    with pytest.raises(RuntimeError, match="grouped_lora_prepare: scales must be Float"):
        prepare({**inputs, "scales": inputs["scales"].double()})
    with pytest.raises(RuntimeError, match=r"grouped_lora_prepare: path must be 0 .* got 3"):
        prepare(inputs, 3)


@pytest.mark.cuda
def test_tensors_of_another_device_are_left_to_the_op():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    inputs = contiguous(CASES[2], torch.float32)
    assert not prepare(inputs)([y.cuda() for y in inputs["y"]], inputs["x"].cuda())


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


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(linear: nn.Module) -> object:
    return linear.register_forward_hook(lambda module, args, y: 2 * y).remove


def hooked_in_front(linear: nn.Module) -> object:
    return linear.register_forward_pre_hook(lambda module, args: (2 * args[0],)).remove


def hooked_with_all(linear: nn.Module) -> object:
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, y: 2 * y if module is linear else None
    ).remove


def own_forward(linear: nn.Module) -> object:
    linear.forward = lambda x: 2 * type(linear).forward(linear, x)
    return lambda: delattr(linear, "forward")


def forward_of_all(linear: nn.Module) -> object:
    forward = nn.Linear.forward

    def patched(self, x):
        return forward(self, x) * (2 if self is linear else 1)

    nn.Linear.forward = patched
    return lambda: setattr(nn.Linear, "forward", forward)


def subclassed(linear: nn.Module) -> object:
    linear.__class__ = Doubled
    return lambda: setattr(linear, "__class__", nn.Linear)


def other_weight(linear: nn.Module) -> object:
    weight = linear.weight
    linear.weight = nn.Parameter(2 * weight, requires_grad=False)
    return lambda: setattr(linear, "weight", weight)


def weight_kept_elsewhere(linear: nn.Module) -> object:
    weight = linear._parameters.pop("weight")
    linear.weight = 2 * weight  # as FSDP leaves it while it has gathered the parameters

    def undo():
        del linear.weight
        linear.weight = weight

    return undo


@pytest.mark.parametrize(
    "change",
    [hooked, hooked_in_front, hooked_with_all, own_forward, forward_of_all, subclassed,
     other_weight, weight_kept_elsewhere],
)  # fmt: skip
def test_a_decode_step_sees_what_becomes_of_a_base_layer(change):
    """Between two steps of a generation the base's k gives twice as much: the update stays."""
    model = build("llama")
    milora.attach(model, MiLoRAConfig(rank=4, top_k=7))
    randomize(model).eval()
    k_proj = model.model.layers[0].self_attn.k_proj
    with torch.no_grad():
        cache = model(prompts(2, 7), use_cache=True).past_key_values
        seen = []
        k_proj.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            model(torch.full((2, 1), 5), past_key_values=cache, use_cache=True)
            x, y = seen[-1]
            base = nn.functional.linear(x, k_proj.base_layer.weight)
            return base, y

        step()
        base, before = step()
        undo = change(k_proj.base_layer)
        _, changed = step()
        undo()
        _, after = step()
    torch.testing.assert_close(changed, before + base)
    assert torch.equal(after, before) and not torch.equal(changed, before)
