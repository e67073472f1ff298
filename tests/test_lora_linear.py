"""lora_linear: a frozen linear module and its update in one autograd node, and where it is used."""

from __future__ import annotations

import pytest
import torch
from test_grouped_lora import CASES, Case, run_train, train_inputs
from tiny_models import build, prompts, randomize
from tolerance import assert_as_good_as_torch
from torch import nn

import milora
from milora import MiLoRAConfig, ops, reference
from milora.nn import is_plain_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRAIN = [case for case in CASES if not case.dora]


def linear(update, w, bias):
    """A function with the arguments of `grouped_lora` whose y is w x + bias: y itself is not read,
    so its gradient is zero."""

    def function(y, x, a, b, scales, gates, route_of, adapter_of):
        on = [None if t is None else t.to(x.device, x.dtype) for t in (w, bias)]
        if update is ops.lora_linear:
            return update(x, *on, a, b, scales, gates, route_of, adapter_of)
        y = nn.functional.linear(x, *on)
        return update(y, x, a, b, scales, gates.to(x.dtype), route_of, adapter_of)

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TRAIN, ids=str)
def test_against_reference(case, dtype, device):
    leaves, rest = train_inputs(case, dtype)
    d_out = case.d_out[0]
    w = (torch.randn(d_out, case.d_in) / case.d_in**0.5).to(dtype)
    bias = torch.randn(d_out).to(dtype) if case.num_tokens % 2 else None
    dout = torch.randn(case.num_tokens, d_out).to(dtype)
    actual = run_train(linear(ops.lora_linear, w, bias), leaves, rest, dout, device=device)
    plain = linear(reference.grouped_lora, w, bias)
    expected = run_train(plain, leaves, rest, dout, torch.float64)
    same_dtype = run_train(plain, leaves, rest, dout)
    names = ["out", "dy", "dx", "dgates"] + [f"dweight{i}" for i in range(len(leaves) - 3)]
    for name, got, want, torch_result in zip(names, actual, expected, same_dtype, strict=True):
        assert_as_good_as_torch(got, want, torch_result, name)


def test_idle_rows_have_the_bits_of_the_bare_module(device):
    case = Case("idle", 12, (8, 4), 32, (40,), (0, 1, -1, 2), (0, 0, -1))
    leaves, rest = train_inputs(case, torch.float32)
    leaves[2][1] = 0
    w, dout = torch.randn(40, 32), torch.randn(12, 40)
    out, _, dx, *_ = run_train(linear(ops.lora_linear, w, None), leaves, rest, dout, device=device)
    bare, _, bare_dx, *_ = run_train(
        lambda y, x, *_: nn.functional.linear(x, w.to(x.device)), leaves, rest, dout, device=device
    )
    idle = rest[1] != 0
    assert torch.equal(out[idle], bare[idle]) and torch.equal(dx[idle], bare_dx[idle])
    assert not torch.equal(out[~idle], bare[~idle])


def test_no_adapters():
    x = torch.randn(3, 8, requires_grad=True)
    y = torch.randn(3, 5, requires_grad=True)
    gates = torch.rand(1, requires_grad=True)
    tables = torch.zeros(3, dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32)
    w = torch.randn(5, 8)
    assert torch.equal(ops.lora_linear(x, w, None, [], [], [], gates, *tables), x @ w.T)
    for out in (
        ops.lora_linear(x, w, None, [], [], [], gates, *tables),
        ops.grouped_lora(y, x, [], [], [], gates, *tables),
    ):
        grads = torch.autograd.grad(out.sum(), [x, gates], allow_unused=True)
        assert all(g is None or torch.isfinite(g).all() for g in grads)


def test_no_second_derivative():
    case = Case("second", 6, (4,), 8, (8,), (0,) * 6, (0,))
    (_, x, gates, a, b), (scales, *tables) = train_inputs(case, torch.float32)
    x.requires_grad_()
    w = torch.randn(8, 8)
    out = ops.lora_linear(x, w, None, [a], [b], scales, gates, *tables)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_contiguous_y_is_asked_for():
    case = Case("strided", 6, (4,), 8, (8,), (0,) * 6, (0,))
    (_, x, gates, a, b), (scales, *tables) = train_inputs(case, torch.float32)
    y = torch.zeros(6, 16)[:, :8]
    with pytest.raises(RuntimeError, match="grouped_lora_add_: y must be contiguous"):
        ops._grouped_lora_add_(y, x, [a], [b], scales, gates, *tables)


# ---- where modules use it -----------------------------------------------------------------------


def hooked(linear: nn.Linear) -> None:
    linear.register_forward_hook(lambda *_: None)


def replaced(linear: nn.Linear) -> None:
    linear.forward = linear.forward


def trained(linear: nn.Linear) -> None:
    linear.requires_grad_(True)


def moved(linear: nn.Linear) -> None:
    linear.kept = [linear._parameters.pop("weight")]


@pytest.mark.parametrize("change", [hooked, replaced, trained, moved])
def test_plain_linear_modules(change):
    module, x = nn.Linear(4, 3).requires_grad_(False), torch.randn(2, 4)
    assert is_plain_linear(module, x)
    assert not is_plain_linear(module, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain_linear(module, x)
    change(module)
    assert not is_plain_linear(module, x)


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_subclasses_are_not_plain():
    assert not is_plain_linear(Subclass(4, 3).requires_grad_(False), torch.randn(2, 4))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_same_gradients_with_and_without_it(family):
    """A hook on the base layers sends the very same model through two autograd nodes a module."""
    model = build(family)
    milora.attach(model, MiLoRAConfig(rank=4, seed=3))
    randomize(model)
    model.train()
    ids = prompts(3, 9)
    labels = ids.clone()
    labels[:, :4] = -100

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    assert is_plain_linear(
        next(m for m in model.modules() if type(m) is nn.Linear and not m.weight.requires_grad),
        torch.zeros(1),
    )
    one_node = gradients()
    seen = []
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.register_forward_hook(lambda *_: seen.append(1))
    two_nodes = gradients()
    assert seen and one_node.keys() == two_nodes.keys() and len(one_node) > 10
    for name, grad in one_node.items():
        torch.testing.assert_close(grad, two_nodes[name], rtol=2e-5, atol=1e-6, msg=name)
