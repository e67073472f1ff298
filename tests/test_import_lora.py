"""PEFT's LoRA and DoRA checkpoints, read as experts: the same logits in both libraries."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build, prompts
from tolerance import assert_as_good_as_torch

import milora
from milora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from milora.nn import MiLoRALinear

CASES = {
    "lora": ("llama", {"target_modules": "all-linear"}),
    "default_targets": ("llama", {}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "rank_pattern": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6, "^model.*k_proj": 3},
        },
    ),
    "alpha_pattern": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"gate_proj": 7},
            # The first pattern that matches counts, in the order of the file (PEFT sorts it).
            "alpha_pattern": {r"layers\.0\..*_proj": 3, "gate_proj": 32, "v_proj": 1},
        },
    ),
    "layers_to_transform": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "regex": ("llama", {"target_modules": r".*layers\.0\.mlp\.(up|down)_proj"}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2_dora": (
        "gpt2",
        {"target_modules": ["c_fc", "mlp.c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "bert_same_suffix": ("bert", {"target_modules": r".*layer\.\d+\.output\.dense"}),
    "phi_bias_dora": ("phi", {"target_modules": "all-linear", "use_dora": True}),
}


def peft_adapter(folder, family: str, options: dict) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, **options)
    model = get_peft_model(build(family), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.3)
            elif ".lora_magnitude_vector." in name:
                parameter.mul_(1 + torch.rand_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_same_logits(tmp_path, case):
    family, options = CASES[case]
    made = peft_adapter(tmp_path, family, options)
    theirs = PeftModel.from_pretrained(build(family), tmp_path)
    ours = milora.load(build(family), tmp_path)
    exact = copy.deepcopy(theirs).double()
    targets = {n for n, m in ours.named_modules() if isinstance(m, MiLoRALinear)}
    assert targets == set(made.base_model.targeted_module_names)
    ids = prompts(2, 9)
    with torch.no_grad():
        want, got, reference = (m(input_ids=ids).logits for m in (theirs, ours, exact))
        assert_as_good_as_torch(got, reference, want, case)
        assert not torch.allclose(build(family)(input_ids=ids).logits, want, atol=1e-2)


def test_all_experts_are_on_without_a_router(tmp_path):
    peft_adapter(tmp_path, "llama", {"target_modules": "all-linear", "lora_dropout": 0.1})
    model = milora.load(build("llama"), tmp_path, "lora", trainable=True)
    config = milora.adapters(model)["lora"]
    assert not config.router and config.dropout == 0.1
    count = milora.count_parameters(model, "lora")
    assert count.trainable == count.experts and count.activated == count.trainable
    # Beside a routed adapter, in one batch; and as an adapter of ours from then on.
    milora.attach(model, milora.MiLoRAConfig(rank=2), "routed")
    ids = prompts(2, 5)
    model.generate(ids, max_new_tokens=2, adapter_names=["lora", "routed"])
    milora.save(model, tmp_path / "ours", "lora")
    with torch.no_grad():
        milora.set_adapter(model, "lora")
        again = milora.load(build("llama"), tmp_path / "ours")
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_old_dora_keys(tmp_path):
    """Magnitudes with a trailing ".weight" are the same tensors."""
    theirs = peft_adapter(tmp_path, "llama", {"use_dora": True})
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    renamed = {
        f"{key}.weight" if key.endswith("magnitude_vector") else key: value
        for key, value in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / WEIGHTS_FILE)
    ids = prompts(1, 5)
    with torch.no_grad():
        got = milora.load(build("llama"), tmp_path)(ids).logits
        torch.testing.assert_close(got, theirs(input_ids=ids).logits, rtol=0, atol=2e-5)
    both = {**tensors, **{key: value.clone() for key, value in renamed.items()}}
    save_file(both, tmp_path / WEIGHTS_FILE)
    with pytest.raises(milora.AdapterError, match="unknown tensor"):
        milora.load(build("llama"), tmp_path)


REFUSED = {
    "bias": ({"bias": "all"}, "bias must be 'none', got 'all'"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is not supported"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
    "alora": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is not supported"),
    "future": ({"use_quantum": True}, "use_quantum is not supported"),
    "future_dict": ({"quantum_config": {"a": 1}}, "quantum_config is not supported"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
    "olora": ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    "rank": ({"r": "8"}, "rank must be an integer"),
    "alpha": ({"lora_alpha": [1]}, "alpha must be a number"),
    "alpha_pattern": ({"alpha_pattern": [1]}, "alpha_pattern must map"),
    "alpha_pattern_value": ({"alpha_pattern": {"q_proj": "x"}}, "must be a number"),
    "alpha_pattern_syntax": ({"alpha_pattern": {"(": 1}}, "alpha_pattern must map"),
    "dropout": ({"lora_dropout": "much"}, "dropout must be"),
    "rslora": ({"use_rslora": "yes"}, "rslora must be True or False"),
    "dora": ({"use_dora": True}, "missing tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_experts_lack_is_refused_by_name(tmp_path, case):
    changes, message = REFUSED[case]
    peft_adapter(tmp_path, "llama", {"target_modules": ["q_proj"]})
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, **changes}))
    model = build("llama")
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(milora.AdapterError) as error:
        milora.load(model, tmp_path)
    assert message in str(error.value)
    assert modules == {name: id(module) for name, module in model.named_modules()}


def test_modules_outside_blocks_and_odd_tensors(tmp_path):
    peft_adapter(tmp_path, "llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]})
    with pytest.raises(milora.AdapterError) as error:
        milora.load(build("llama"), tmp_path)
    for path in ("lm_head", "model.embed_tokens"):
        assert f"{path} is no linear module inside a block" in str(error.value)
    peft_adapter(tmp_path, "llama", {"target_modules": ["q_proj"]})
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for change, message in (
        ({a: torch.tensor(1.0)}, "shape must be"),
        ({a: torch.zeros(300, 32)}, "must be an integer in"),
        ({a: tensors[a] / 0}, "holds NaN or Inf"),
    ):
        save_file({**tensors, **change}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(milora.AdapterError, match=message):
            milora.load(build("llama"), tmp_path)
    save_file({}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(milora.AdapterError, match="holds no tensors"):
        milora.load(build("llama"), tmp_path)
