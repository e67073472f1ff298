"""A route written as an ordinary PEFT adapter answers as the pinned route does."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_models import build, prompts, randomize
from tolerance import assert_as_good_as_torch

import milora
from milora import MiLoRAConfig, RoutingState
from milora.adapter_files import CONFIG_FILE, WEIGHTS_FILE

LENGTH = 6
CASES = {
    "llama": ("llama", {}),
    "llama_renormalized": ("llama", {"gate": "renormalized", "top_k": 2}),
    "llama_hard": ("llama", {"gate": "hard", "top_k": 4}),
    "llama_patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, "mlp.up_proj": 6},
            "alpha_pattern": {"o_proj": 9.0},
            "alpha": 5.0,
            "rslora": True,
            "top_k": 7,
        },
    ),
    "llama_dora": ("llama", {"expert": "dora"}),
    "llama_dora_hard": ("llama", {"expert": "dora", "gate": "hard", "alpha": 3.0}),
    "llama_mini": ("llama", {"expert": "lora_mini", "expert_options": {"inner_in": 8}}),
    "gpt2": ("gpt2", {"top_k": 2}),
    "gpt2_dora": ("gpt2", {"expert": "dora", "top_k": 3}),
    "phi_bias_dora": ("phi", {"expert": "dora"}),
}


def routed(family: str, options: dict, seed: int = 1):
    """An attached model, and the route of two prompts."""
    model = build(family)
    milora.attach(model, MiLoRAConfig(**{"rank": 4, **options}))
    randomize(model, seed=seed)
    with milora.record_routing(model) as states, milora.prompt_lengths(model, LENGTH):
        model(prompts(2, LENGTH))
    return model, states[0]


def pinned_logits(model, state, ids) -> torch.Tensor:
    with milora.pin_route(model, state), torch.no_grad():
        return model(ids).logits


def as_peft(family: str, folder) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of every key that it does not know
        return PeftModel.from_pretrained(build(family), str(folder))


@pytest.mark.parametrize("case", CASES)
def test_peft_answers_as_the_pinned_route(tmp_path, case):
    family, options = CASES[case]
    model, state = routed(family, options)
    ids = prompts(2, 2 * LENGTH, seed=3)  # not the prompts that were routed
    for row in range(2):
        milora.export_route(model, state, tmp_path / str(row), row)
        want = pinned_logits(model, state.select(row), ids)
        theirs = as_peft(family, tmp_path / str(row))
        with torch.no_grad():
            in_peft = theirs(input_ids=ids).logits
            in_milora = milora.load(build(family), tmp_path / str(row))(ids).logits
            reference = theirs.double()(input_ids=ids).logits
        assert_as_good_as_torch(want, reference, in_peft, "pinned route against PEFT")
        assert_as_good_as_torch(in_milora, reference, in_peft, "export read back")
        torch.testing.assert_close(in_peft, want, rtol=0, atol=2e-5)
    assert not torch.allclose(want, build(family)(ids).logits, atol=1e-2)


def test_only_modules_that_are_on_and_nothing_but_standard_keys(tmp_path):
    model, state = routed("llama", {"rank_pattern": {"q_proj": 2}, "top_k": 5, "alpha": 7.0})
    milora.export_route(model, state, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    on = {f"{b}.{p}" for i, b in enumerate(state.blocks) for p in state.active_names(i)}
    assert set(config["target_modules"]) == on
    keys = load_file(tmp_path / WEIGHTS_FILE)
    assert {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in keys} == on
    assert config["rank_pattern"] == {path: 2 for path in on if path.endswith("q_proj")}
    # alpha = rank everywhere: right also for an engine that knows no patterns.
    assert config["lora_alpha"] == config["r"] == 4
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert not set(config) - set(LoraConfig.__dataclass_fields__)


def test_generate_in_peft_as_pinned(tmp_path):
    model, state = routed("llama", {})
    milora.export_route(model, state, tmp_path)
    ids = prompts(2, LENGTH, seed=5)
    with milora.pin_route(model, state.select(0)):
        want = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(as_peft("llama", tmp_path).generate(ids, max_new_tokens=8), want)


def test_one_adapter_of_several_and_a_saved_route(tmp_path):
    model, _ = routed("llama", {})
    milora.attach(model, MiLoRAConfig(rank=3, top_k=2, target_modules=["v_proj", "up_proj"]), "b")
    randomize(model, seed=2)
    ids = prompts(2, LENGTH)
    with milora.record_routing(model) as states:
        model.generate(ids, max_new_tokens=1, adapter_names=["b", None])
    states[0].save(tmp_path / "route")
    state = RoutingState.load(tmp_path / "route")
    milora.export_route(model, state, tmp_path / "lora")
    with torch.no_grad():
        got = as_peft("llama", tmp_path / "lora")(input_ids=ids).logits
    torch.testing.assert_close(got, pinned_logits(model, state.select(0), ids), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="prompt 1 has adapter None"):
        milora.export_route(model, state, tmp_path / "none", 1)


def test_bfloat16_base(tmp_path):
    """The export is float32, whatever the base is."""
    model = build("llama").bfloat16()
    milora.attach(model, MiLoRAConfig(rank=4, expert="dora"))
    randomize(model)
    with milora.record_routing(model) as states, milora.prompt_lengths(model, LENGTH):
        model(prompts(1, LENGTH))
    milora.export_route(model, states[0], tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.float32}
    other = milora.load(build("llama").bfloat16(), tmp_path)
    ids = prompts(1, LENGTH)
    with torch.no_grad():
        got, want = other(ids).logits, pinned_logits(model, states[0], ids)
    torch.testing.assert_close(got, want, rtol=0, atol=0.1)


def test_what_cannot_be_exported(tmp_path):
    model, state = routed("llama", {"expert": "dora", "top_k": 7})
    _, foreign = routed("gpt2", {})
    with pytest.raises(ValueError, match="made for other modules"):
        milora.export_route(model, foreign, tmp_path)
    with pytest.raises(IndexError, match="row must be in"):
        milora.export_route(model, state, tmp_path, 2)
    off = state.select(0)
    off.block_gates = [torch.zeros_like(gates) for gates in off.block_gates]
    with pytest.raises(ValueError, match="no module is on"):
        milora.export_route(model, off, tmp_path)
    # A row of W that is 0 has norm 0: PEFT's m / norm would be NaN there.
    linear = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        linear.base_layer.weight[3] = 0
        linear.tensors("default")["lora_B"][3] = 0
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has a row"):
        milora.export_route(model, state, tmp_path)
    assert not (tmp_path / CONFIG_FILE).exists()
