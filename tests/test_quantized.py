"""Quantized bases: torchao's int8 and bitsandbytes' 8 and 4 bit train, generate, carry DoRA."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from tiny_models import build, left_padded, randomize
from tolerance import assert_as_good_as_torch
from torch import nn

import milora
from milora.attach import runtime_of
from milora.nn import MiLoRALinear

LENGTHS = (3, 7, 5)


def torchao_int8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), is_in_block)


def torchao_int8_dynamic(model: nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), is_in_block)


def bitsandbytes_int8(model: nn.Module) -> None:
    from bitsandbytes.nn import Linear8bitLt

    replace(
        model, lambda d_in, d_out: Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False)
    )


def bitsandbytes_nf4(model: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit

    def make(d_in: int, d_out: int) -> nn.Module:
        return Linear4bit(d_in, d_out, bias=False, quant_type="nf4", compute_dtype=torch.float32)

    replace(model, make)


def is_in_block(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and ".layers." in path


def replace(model: nn.Module, make) -> None:
    for path, module in list(model.named_modules()):
        if is_in_block(module, path):
            quantized = make(module.in_features, module.out_features)
            quantized.load_state_dict({"weight": module.weight.data})
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, quantized.to("cpu"))  # packs the weight


QUANTIZERS = {
    "torchao-int8": torchao_int8,
    "torchao-int8-dynamic": torchao_int8_dynamic,
    "bitsandbytes-int8": bitsandbytes_int8,
    "bitsandbytes-nf4": bitsandbytes_nf4,
}


@pytest.fixture(params=QUANTIZERS)
def base(request):
    """A tiny Llama whose blocks' linears are quantized."""
    torch.set_num_threads(1)
    package = request.param.partition("-")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model = build("llama", hidden_size=64, intermediate_size=64)  # 4-bit blocks hold 64 weights
    QUANTIZERS[request.param](model)
    model.requires_grad_(False)
    return model.eval()


def attached(base: nn.Module, kind: str) -> nn.Module:
    config = milora.MiLoRAConfig(rank=4, top_k=2, expert=kind)
    return randomize(milora.attach(base, config), seed=2)


def linears_of(model: nn.Module) -> list[MiLoRALinear]:
    return [linear for linears in runtime_of(model).linears for linear in linears]


@pytest.mark.parametrize("kind", ["lora", "dora", "lora_mini"])
def test_linears_follow_the_formula(base, kind):
    """y = base_layer(x) + gate · update, with the base's own (quantized) product."""
    model = attached(base, kind)
    seen = []
    for linear in linears_of(model):
        linear.register_forward_hook(
            lambda module, args, y: seen.append((module, args[0].clone(), y.clone()))
        )
    with milora.record_routing(model) as states:
        out = model.generate(
            **left_padded(LENGTHS), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    assert out.shape == (3, 7 + 4)
    assert len(seen) == 4 * len(linears_of(model))
    with torch.no_grad():
        for module, x, y in seen:
            gates = states[0].block_gates[module.block][:, module.column][:, None, None]
            weights = module.weights("default")
            y_base = module.base_layer(x)

            def formula(dtype, x=x, y_base=y_base, gates=gates, weights=weights):
                change = (
                    weights.scale * (x.to(dtype) @ weights.a.T.to(dtype)) @ weights.b.T.to(dtype)
                )
                if weights.output is not None:
                    change = change + weights.output.to(dtype) * y_base.to(dtype)
                return y_base.to(dtype) + gates.to(dtype) * change

            assert_as_good_as_torch(y, formula(torch.float64), formula(torch.float32))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_step(base, kind):
    model = attached(base, kind).train()
    before = [linear.base_layer.weight for linear in linears_of(model)]
    batch = left_padded(LENGTHS)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(
        a is linear.base_layer.weight for a, linear in zip(before, linears_of(model), strict=True)
    )


def test_first_block_gets_a_gradient_through_the_quantized_ones(base):
    model = attached(base, "lora")
    batch = left_padded(LENGTHS)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    model(**batch, labels=labels).loss.backward()
    assert runtime_of(model).routers_of("default")[0].w_r.grad.any()


def test_dense_weight_is_what_the_base_computes_with(base):
    model = attached(base, "dora")
    for linear in linears_of(model):
        x = torch.eye(linear.d_in)
        dense = linear.dense_weight()
        assert dense.shape == (linear.d_out, linear.d_in)
        with torch.no_grad():
            product = linear.base_layer(x).T
        # Products with unit vectors are the weight's columns; activations are quantized to 1 / 127.
        torch.testing.assert_close(product, dense.float(), atol=1e-2, rtol=1e-2)
        norm = dense.double().norm(dim=1)
        magnitude = linear.tensors("default")["lora_magnitude_vector"]
        assert ((magnitude >= norm * 0.999) & (magnitude <= norm * 1.301)).all()  # see randomize


def test_detach_gives_the_quantized_model_back(base):
    batch = left_padded(LENGTHS)
    modules = dict(base.named_modules())
    with torch.no_grad():
        before = base(**batch).logits
        milora.detach(attached(base, "dora"))
        assert torch.equal(base(**batch).logits, before)
    assert dict(base.named_modules()) == modules


# ---- bases that keep their weight in a form of their own --------------------------------------


class PackedLinear(nn.Module):
    """As GPTQ, AWQ and HQQ have it: no nn.Linear, no `weight`, packed integers in buffers."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.data / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)

    def forward(self, x):
        return x @ (self.qweight * self.scales).T


class Float8Linear(nn.Linear):
    """A weight in float8 whose scale is another tensor of the module."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.data.abs().max() / 448
        weight = (linear.weight.data / self.scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


@pytest.fixture(params=[PackedLinear, Float8Linear])
def packed(request):
    model = build("llama")
    for path, module in list(model.named_modules()):
        if is_in_block(module, path):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, request.param(module))
    return model


def test_packed_base_trains_and_generates_with_lora(packed):
    model = attached(packed, "lora")
    assert len(linears_of(model)) == 2 * 7
    batch = left_padded(LENGTHS)
    out = model.generate(**batch, max_new_tokens=3, min_new_tokens=3)
    assert out.shape == (3, 7 + 3)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    model(**batch, labels=labels).loss.backward()
    assert runtime_of(model).routers_of("default")[0].w_r.grad.any()


def test_packed_base_refuses_dora_by_name(packed):
    modules = copy.copy(dict(packed.named_modules()))
    with pytest.raises(TypeError, match=r"(Packed|Float8)Linear with .* cannot be dequantized"):
        attached(packed, "dora")
    assert dict(packed.named_modules()) == modules


def test_repacked_4_bit_base_generates_with_dora_and_refuses_to_train():
    """On CPUs with AVX-512 BF16, bitsandbytes rearranges a weight on its first eval forward."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX-512 BF16")
    torch.set_num_threads(1)
    model = build("llama", hidden_size=64, intermediate_size=64)
    bitsandbytes_nf4(model)
    attached(model.eval(), "dora")
    before = [linear.dense_weight() for linear in linears_of(model)]
    batch = left_padded(LENGTHS)
    with torch.no_grad():
        model(**batch, use_cache=True)
    for linear, dense in zip(linears_of(model), before, strict=True):
        assert linear.base_layer.weight.quant_state.packing_format_for_cpu
        torch.testing.assert_close(linear.dense_weight(), dense, atol=0, rtol=2**-6)  # bfloat16
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    with pytest.raises(RuntimeError, match="repacked this model's 4-bit weights"):
        model.train()(**batch, labels=labels)
