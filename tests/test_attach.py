"""`attach` on one model: targets and ranks, errors, several adapters, counts, classifiers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.fsdp
import transformers
from plain_model import plain_model
from tiny_models import build, config_of, left_padded, randomize, spread
from tolerance import assert_as_good_as_torch
from torch import nn

import milora
from milora.attach import runtime_of
from milora.nn import MiLoRALinear

Config = milora.MiLoRAConfig


def experts(model) -> dict[str, tuple[int, float]]:
    """{path in the model: (rank, scale)} of adapter "default"."""
    return {
        path: (module.specs["default"].rank, module.specs["default"].scale)
        for path, module in model.named_modules()
        if isinstance(module, MiLoRALinear)
    }


def both(*names: str) -> set[str]:
    return {f"model.layers.{block}.{name}" for block in (0, 1) for name in names}


TARGETS = {
    "suffix": (["q_proj", "v_proj"], both("self_attn.q_proj", "self_attn.v_proj")),
    "dotted suffix": (["mlp.up_proj"], both("mlp.up_proj")),
    "string": ("down_proj", both("mlp.down_proj")),
    "regex inside the block": ([r"mlp\.(up|gate)_proj"], both("mlp.up_proj", "mlp.gate_proj")),
    "regex on the whole path": (
        [r"model\.layers\.1\..*\.[kv]_proj"],
        {"model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"},
    ),
    "whole path": (["model.layers.0.mlp.up_proj"], {"model.layers.0.mlp.up_proj"}),
}


@pytest.mark.parametrize("case", TARGETS)
def test_target_modules(case):
    targets, expected = TARGETS[case]
    bare = build("llama")
    model = milora.attach(copy.deepcopy(bare), Config(rank=4, top_k=1, target_modules=targets))
    assert set(experts(model)) == expected
    check_against_plain(bare, randomize(model))


def test_rank_and_alpha_per_module():
    bare = build("llama")
    config = Config(
        rank=4,
        alpha=8,
        rank_pattern={
            "model.layers.1.self_attn.o_proj": 3,
            "o_proj": 5,
            r"mlp\..*": 7,
            "mlp.up_proj": 2,  # too late: the first pattern that matches wins
        },
        alpha_pattern={"k_proj": 1.0, r".*layers\.0\.mlp\.down_proj": 14},
    )
    model = milora.attach(copy.deepcopy(bare), config)
    found = experts(model)
    assert found["model.layers.0.self_attn.o_proj"] == (5, 8 / 5)
    assert found["model.layers.1.self_attn.o_proj"] == (3, 8 / 3)
    assert found["model.layers.0.mlp.up_proj"] == (7, 8 / 7)
    assert found["model.layers.1.self_attn.k_proj"] == (4, 1 / 4)
    assert found["model.layers.0.mlp.down_proj"] == (7, 2.0)
    assert found["model.layers.1.mlp.down_proj"] == (7, 8 / 7)
    assert found["model.layers.1.self_attn.q_proj"] == (4, 2.0)
    check_against_plain(bare, randomize(model))


def check_against_plain(bare, model) -> None:
    ids = left_padded((6,))["input_ids"]
    with torch.no_grad(), milora.record_routing(model) as states:
        logits = model(ids, use_cache=True).logits
        plains = [
            plain_model(model, bare, states[0], 0, dtype)
            for dtype in (torch.float64, torch.float32)
        ]
        expected, same_dtype = (plain(ids).logits for plain in plains)
    assert_as_good_as_torch(logits, expected, same_dtype)
    assert not torch.equal(logits, bare(ids).logits)


MISTAKES = {
    "typing error": ({"target_modules": ["q_porj"]}, "did you mean q_proj"),
    "outside the blocks": ({"target_modules": ["lm_head"]}, "no linear module inside the blocks"),
    "rank of nothing": ({"rank_pattern": {"up_poj": 2}}, "did you mean up_proj"),
    "rank of a module that is not targeted": (
        {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}},
        "no targeted linear module matches 'v_proj'",
    ),
    "alpha of nothing": ({"alpha_pattern": {"wq": 2.0}}, "no targeted linear module matches 'wq'"),
    "activations of other blocks": ({"activation": ["gelu"] * 3}, "one per block, got 3"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_leave_the_model_alone(case):
    options, message = MISTAKES[case]
    model = build("llama")
    modules, attributes = dict(model.named_modules()), set(model.__dict__)
    with pytest.raises(ValueError, match=message):
        milora.attach(model, Config(rank=4, **options))
    assert dict(model.named_modules()) == modules and set(model.__dict__) == attributes
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["", "a.b", "__base__", "base_layer", "default", "keys", 5])
def test_adapter_names_that_cannot_be(name):
    model = milora.attach(build("llama"), Config(rank=4))
    with pytest.raises(ValueError, match="adapter"):
        milora.attach(model, Config(rank=4), adapter_name=name)
    assert list(milora.adapters(model)) == ["default"]


def test_what_is_no_config_is_refused():
    with pytest.raises(TypeError, match="config must be a MiLoRAConfig, got dict"):
        milora.attach(build("llama"), {"rank": 4})


def test_a_part_of_a_model_with_adapters_is_refused():
    """A second layer of experts would work on its own, and come off in the wrong order."""
    model = randomize(milora.attach(build("llama"), Config(rank=4, target_modules=["q_proj"])))
    ids = left_padded((6,))["input_ids"]
    logits = model(ids, use_cache=True).logits
    for targets in ("q_proj", "v_proj"):
        with pytest.raises(ValueError, match=r"q_proj carries adapters"):
            milora.attach(model.model, Config(rank=4, target_modules=[targets]))
    assert torch.equal(model(ids, use_cache=True).logits, logits)


def test_modules_with_adapters_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"q_proj carries adapters .*\(peft\."):
        milora.attach(model, Config(rank=4))
    assert dict(model.named_modules()) == modules
    milora.attach(model, Config(rank=4, target_modules=["v_proj"]))


def test_deleting_the_active_adapter_switches_to_another():
    model = build("llama")
    for name in ("first", "second", "third"):
        milora.attach(model, Config(rank=4), name)
    ids = left_padded((6,))["input_ids"]

    def used() -> tuple[str | None, ...]:
        with torch.no_grad(), milora.record_routing(model) as states:
            model(ids, use_cache=True)
        return tuple(state.adapters[0] for state in states)

    assert used() == ("third",)
    milora.delete_adapter(model, "third")
    assert used() == ("first",)
    milora.delete_adapter(model, "second")
    assert used() == ("first",)
    milora.set_adapter(model, None)
    milora.attach(model, Config(rank=4), "fourth")
    milora.set_adapter(model, None)
    milora.delete_adapter(model, "fourth")
    assert used() == ()  # the bare model was asked for


def test_adapters_made_in_inference_mode_are_ordinary_ones(tmp_path):
    model = randomize(milora.attach(build("llama"), Config(rank=4)))
    milora.save(model, tmp_path)
    prompt = left_padded((6,))["input_ids"]
    with torch.inference_mode():
        expected = model(prompt, use_cache=True).logits
        for expert in ("lora", "dora", "lora_mini"):
            other = milora.attach(build("llama"), Config(rank=4, expert=expert), expert)
            milora.load(other, tmp_path, trainable=True)
            assert torch.equal(other(prompt, use_cache=True).logits, expected)
            tensors = [*other.named_parameters(), *other.named_buffers()]
            ours = [tensor for name, tensor in tensors if "lora" in name]
            assert ours and not any(tensor.is_inference() for tensor in ours)


def test_adapters_with_other_targets_ranks_and_kinds():
    """One batch, each row its own adapter; rows equal plain models with that adapter alone."""
    bare = build("llama")
    model = copy.deepcopy(bare)
    milora.attach(model, Config(rank=4, target_modules=["q_proj", "up_proj"], top_k=1), "small")
    milora.attach(model, Config(rank=6, expert="dora", target_modules=[r"mlp\..*"]), "dora")
    milora.attach(model, Config(rank=3, router=False, target_modules=["v_proj"]), "plain")
    randomize(model)
    ids = left_padded((6, 6, 6, 6))["input_ids"]
    names = ["dora", None, "small", "plain"]
    with torch.no_grad(), milora.record_routing(model) as states:
        logits = model(ids, use_cache=True, adapter_names=names).logits
        for row, name in enumerate(names):
            plains = [
                plain_model(model, bare, states[0], row, dtype)
                for dtype in (torch.float64, torch.float32)
            ]
            expected, same_dtype = (plain(ids[row : row + 1]).logits[0] for plain in plains)
            assert_as_good_as_torch(logits[row], expected, same_dtype, str(name))
    assert states[0].adapters == tuple(names)
    assert states[0].active_names(0, row=3) == ("self_attn.v_proj",)

    milora.delete_adapter(model, "plain")
    milora.set_adapter(model, None)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bare(ids).logits)
    milora.delete_adapter(model, "dora")
    milora.delete_adapter(model, "small")
    assert milora.adapters(model) == {}
    assert {k: type(m) for k, m in model.named_modules()} == {
        k: type(m) for k, m in bare.named_modules()
    }


# ---- parameter arithmetic ---------------------------------------------------------------------


def llama_2_7b(num_blocks: int = 32) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=num_blocks,
        num_attention_heads=32,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def test_parameters_of_llama_2_7b():
    """The numbers of design section 1; the paper's table 4 says 80.9 M and 16.4 M."""
    model = milora.attach(llama_2_7b(), Config(rank=32, top_k=1))
    count = milora.count_parameters(model)
    assert (count.experts, count.router, count.pooler, count.activation) == (
        79_953_920, 917_504, 131_072, 384,
    )  # fmt: skip
    assert count.trainable == 81_002_880
    added = [p for key, p in model.named_parameters() if ".lora_" in key or "milora_router" in key]
    assert sum(p.numel() for p in added) == count.trainable
    assert all(p.is_meta and p.dtype == torch.float32 for p in added)
    # k = 1: the largest expert of a block, rank · (4096 + 11008), and the routers.
    assert count.activated == 32 * 32 * (4096 + 11008) + 917_504 + 131_072 + 384


@pytest.mark.parametrize(
    ("options", "experts"),
    [
        ({"expert": "dora"}, 2 * (2_498_560 + 4 * 4096 + 2 * 11008 + 4096)),
        ({"expert": "lora_mini"}, 2 * 7 * 32 * (64 + 64)),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, 2 * 3 * 32 * (4096 + 4096)),
    ],
    ids=["dora", "lora_mini", "three modules"],
)
def test_parameters_of_other_experts_in_two_blocks(options, experts):
    model = milora.attach(llama_2_7b(num_blocks=2), Config(rank=32, **options))
    assert milora.count_parameters(model).experts == experts


# ---- models that read all their tokens --------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_routes_on_all_attended_tokens(side):
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config_of("llama", num_labels=3)).eval()
    spread(model)
    bare = copy.deepcopy(model)
    randomize(milora.attach(model, Config(rank=4)))
    lengths = (3, 7, 5)
    batch = left_padded(lengths, side=side)
    labels = torch.tensor([0, 2, 1])
    with milora.record_routing(model) as states:
        out = model(**batch, labels=labels)
    assert states[0].prompt_lengths.tolist() == list(lengths)
    out.loss.backward()
    assert all(r.w_sa.grad.any() for r in runtime_of(model).routers_of("default"))
    for row, length in enumerate(lengths):
        ids = batch["input_ids"][row, batch["attention_mask"][row] == 1][None]
        assert ids.shape[1] == length
        with torch.no_grad():
            expected, same_dtype = (
                plain_model(model, bare, states[0], row, dtype)(ids).logits[0]
                for dtype in (torch.float64, torch.float32)
            )
        assert_as_good_as_torch(out.logits[row], expected, same_dtype)


def test_balance_loss_of_a_classifier_is_weighted_by_all_its_labels():
    model = build("bert")
    milora.attach(model, Config(rank=4, balance_coef=1.0))
    batch, labels = left_padded((4, 4, 4, 4)), torch.tensor([0, 1, 1, 0])
    with torch.no_grad(), milora.disabled(model):
        task = model(**batch, labels=labels).loss
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    whole = model(**batch, labels=labels).loss - task
    runtime_of(model).windows["default"].steps.clear()
    part = model(**batch, labels=labels, num_items_in_batch=torch.tensor(8)).loss - task
    torch.testing.assert_close(part, whole / 2)


def test_a_sharded_model_is_refused():
    """FSDP2 and tensor parallelism replace parameters: attach must come before the one."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = dist.fsdp.fully_shard(build("llama"), mesh=mesh)
        with pytest.raises(ValueError, match="sharded already"):
            milora.attach(model, milora.MiLoRAConfig(rank=2))
        assert milora.adapters(model) == {}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("version", ["5.16.9", "5.24.0", "4.57.1", "6.0.0.dev0"])
def test_an_untested_transformers_is_refused(monkeypatch, version):
    model = build("llama")
    monkeypatch.setattr("milora.integrations.transformers.version", lambda _: version)
    with pytest.raises(ImportError, match=f"5.17 to 5.23, got {version}"):
        milora.attach(model, milora.MiLoRAConfig(rank=2))
    assert milora.adapters(model) == {}
