"""LoRTA: tensors that the experts of one adapter share, in the model, in files and in training."""

from __future__ import annotations

import json

import pytest
import torch
from expert_cases import move
from safetensors.torch import load_file
from tiny_models import build, prompts, randomize

import milora
from milora import MiLoRAConfig
from milora.adapter_files import WEIGHTS_FILE
from milora.attach import runtime_of
from milora.experts import get_kind, make_spec

ATTENTION = ["q_proj", "o_proj"]
OPTIONS = {"expert": "lorta", "expert_options": {"head_dim": 8}, "rank": 3}


def attached(**changes):
    model = milora.attach(build("llama"), MiLoRAConfig(**{**OPTIONS, **changes}))
    randomize(model, seed=1)
    for name, tensor in tensors_of(model).items():
        move({name: tensor}, frozenset(), 0.3, seed=len(name))
    return model


def linears_of(model):
    return {
        f"{block.path}.{block.experts[linear.column]}": linear
        for block, linears in zip(runtime_of(model).blocks, runtime_of(model).linears, strict=True)
        for linear in linears
    }


def tensors_of(model, name: str = "default") -> dict[str, torch.Tensor]:
    """Every tensor of an adapter once."""
    found = {}
    for path, linear in linears_of(model).items():
        for key, tensor in linear.tensors(name).items():
            if not any(tensor is other for other in found.values()):
                found[f"{path}.{key}"] = tensor
    return found


def test_count_of_the_papers_setting():
    """d x d matrices only: rank · (d + d_h + heads + matrices + layers), for the whole model."""
    model = attached(target_modules=ATTENTION, router=False)
    count = milora.count_parameters(model)
    assert count.trainable == 3 * (32 + 8 + 4 + 2 + 2)
    assert count.activated == count.trainable
    assert count.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_what_is_shared_by_whom():
    linears = linears_of(attached())
    get = {path: linear.tensors("default") for path, linear in linears.items()}
    q0, q1 = (get[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
    k0, down0 = get["model.layers.0.self_attn.k_proj"], get["model.layers.0.mlp.down_proj"]
    assert q0["lora_lorta_A"] is q1["lora_lorta_A"] is k0["lora_lorta_A"]
    assert q0["lora_lorta_A"] is not down0["lora_lorta_A"]  # d_in 32 and 48
    assert q0["lora_lorta_B"] is down0["lora_lorta_B"]
    assert q0["lora_lorta_head"] is down0["lora_lorta_head"]  # d_out 32
    assert q0["lora_lorta_head"] is not k0["lora_lorta_head"]  # d_out 16
    assert q0["lora_lorta_matrix"] is q1["lora_lorta_matrix"] is not k0["lora_lorta_matrix"]
    assert q0["lora_lorta_layer"] is k0["lora_lorta_layer"] is not q1["lora_lorta_layer"]


def test_layers_differ_by_a_diagonal_alone():
    linears = linears_of(attached(router=False))
    made = [linears[f"model.layers.{i}.self_attn.q_proj"].weights("default") for i in (0, 1)]
    assert torch.equal(made[0].a, made[1].a)
    ratio = made[0].b.detach().double() / made[1].b.detach().double()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


def test_ranks_by_pattern_share_among_themselves():
    model = attached(rank_pattern={"v_proj": 2})
    linears = linears_of(model)
    v0, v1 = (linears[f"model.layers.{i}.self_attn.v_proj"].tensors("default") for i in (0, 1))
    assert v0["lora_lorta_A"] is v1["lora_lorta_A"] and v0["lora_lorta_A"].shape == (2, 32)


def test_one_step_reaches_each_tensor_from_all_its_modules():
    model = attached(router=False).train()
    ids = prompts(2, 7)
    model(ids, labels=ids).loss.backward()
    tensors = tensors_of(model)
    whole = {name: tensor.grad.clone() for name, tensor in tensors.items()}
    assert all(grad.abs().max() > 0 for grad in whole.values())

    def loss():
        with torch.no_grad():
            return model(ids, labels=ids).loss.double()

    name = next(name for name in tensors if name.endswith("lorta_B"))
    direction = whole[name] / whole[name].norm()
    with torch.no_grad():
        tensors[name].add_(1e-2 * direction)
        ahead = loss()
        tensors[name].sub_(2e-2 * direction)
        behind = loss()
    slope = ((ahead - behind) / 2e-2).item()
    assert slope == pytest.approx(whole[name].norm().item(), rel=0.05)


def test_the_file_has_each_tensor_once_and_the_first_expert_has_it(tmp_path):
    model = attached()
    milora.save(model, tmp_path)
    stored = [key for key in load_file(tmp_path / WEIGHTS_FILE) if "lorta" in key]
    tensors = tensors_of(model)
    assert len(stored) == len(tensors)
    assert {key.removeprefix("base_model.model.").removesuffix(".weight") for key in stored} == set(
        tensors
    )
    loaded = milora.load(build("llama"), tmp_path, trainable=True)
    assert len(tensors_of(loaded)) == len(tensors)
    other = attached(seed=5)
    milora.adapters(other)["default"].seed = 0
    from milora.adapters import load_weights

    load_weights(other, tmp_path, "default")
    for (name, tensor), got in zip(tensors.items(), tensors_of(other).values(), strict=True):
        assert torch.equal(tensor, got), name


def test_adapters_do_not_share_and_one_can_go():
    model = attached()
    milora.attach(model, MiLoRAConfig(**OPTIONS), "second")
    first, second = tensors_of(model), tensors_of(model, "second")
    assert not any(a is b for a in first.values() for b in second.values())
    milora.delete_adapter(model, "default")
    assert len(tensors_of(model, "second")) == len(second)
    milora.detach(model)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_merging(tmp_path):
    model = attached(router=False, target_modules=[*ATTENTION, "down_proj"])
    milora.save(model, tmp_path / "a")
    milora.merge([tmp_path / "a"], tmp_path / "out", model=build("llama").to("meta"))
    merged = linears_of(milora.load(build("llama"), tmp_path / "out"))
    for path, linear in linears_of(model).items():
        dense = [
            w.scale * w.b.double() @ w.a.double()
            for w in (linear.weights("default"), merged[path].weights("default"))
        ]
        torch.testing.assert_close(dense[0], dense[1], rtol=0, atol=1e-6)


def test_refused():
    with pytest.raises(ValueError, match=r"k_proj: lorta: head_dim must divide d_out, got 32"):
        attached(expert_options={"head_dim": 32})
    with pytest.raises(ValueError, match="lorta: init_scale must be a number above 0, got nan"):
        get_kind("lorta").validate({"init_scale": float("nan")})
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"kind lorta share tensors.*use milora.attach"):
        peft.get_peft_model(build("llama"), MiLoRAConfig(**OPTIONS))


def test_start():
    spec = make_spec(16, 8, 3, options={"head_dim": 4, "init_scale": 2.0})
    big = get_kind("lorta").init(spec)
    small = get_kind("lorta").init(make_spec(16, 8, 3, options={"head_dim": 4}))
    assert torch.equal(big["lora_lorta_layer"], 2 * small["lora_lorta_layer"])
    assert torch.equal(big["lora_lorta_A"], small["lora_lorta_A"])
    assert not big["lora_lorta_B"].any()
    json.dumps(spec.options)
