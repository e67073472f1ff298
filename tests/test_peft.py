"""MiLoRA as a method of PEFT: its whole life cycle, with our adapters inside."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build, prompts, randomize
from transformers import Trainer, TrainingArguments, set_seed

import milora
from milora import MiLoRAConfig
from milora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, sha256_of
from milora.adapter_validation import key_of
from milora.integrations.peft import PeftMiLoRAConfig
from milora.nn import MiLoRALinear

LENGTH = 6
KINDS = {
    "lora": {},
    "dora": {"expert": "dora"},
    "lora_mini": {"expert": "lora_mini", "expert_options": {"inner_in": 6}},
    "no_router": {"router": False},
}
checks_tensors = pytest.mark.skipif(
    tuple(int(part) for part in peft.__version__.split(".")[:2]) < (0, 21),
    reason="PEFT before 0.21 gives a method no say in how its tensors are loaded",
)


@pytest.fixture(autouse=True)
def _no_warnings_of_peft():
    """PEFT warns of missing keys, unknown options and models that it modifies twice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="peft")
        # Before 0.21 PEFT looks for the config of a base model that has no name.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        yield


def wrapped(options: dict | None = None, seed: int = 1, **peft_options) -> PeftModel:
    config = PeftMiLoRAConfig(rank=4, **(options or {}), **peft_options)
    model = get_peft_model(build("llama"), config)
    randomize(model, seed=seed)
    return model


def adapter(model, name: str = "default") -> dict[str, torch.nn.Parameter]:
    return {key: p for key, p in model.named_parameters() if f".{name}." in key}


def thetas(model) -> dict[str, torch.nn.Parameter]:
    """The rational coefficients, which do not train with the rest."""
    found = {key: p for key, p in model.named_parameters() if key.endswith(".theta")}
    assert found
    return found


def logits(model, ids: torch.Tensor | None = None) -> torch.Tensor:
    with milora.prompt_lengths(model, LENGTH), torch.no_grad():
        return model(input_ids=prompts(2, LENGTH) if ids is None else ids).logits


# ---- get_peft_model -----------------------------------------------------------------------------


def test_a_plain_config_is_enough():
    config = MiLoRAConfig(rank=4, seed=3)
    base = build("llama")
    want = milora.attach(build("llama"), MiLoRAConfig(rank=4, seed=3))
    model = get_peft_model(base, config)
    assert isinstance(config, PeftConfig) and config.peft_type == PeftType("MILORA") == "MILORA"
    assert model.get_base_model() is base and model.peft_config == {"default": config}
    assert milora.adapters(model) == milora.adapters(want)
    mine = {n: p for n, p in base.named_parameters() if p.requires_grad}
    assert mine.keys() == {n for n, p in want.named_parameters() if p.requires_grad}
    assert torch.equal(logits(model), logits(want))
    for name in ("self_attn.q_proj.lora_A.default.weight", "milora_router.default.w_r"):
        assert f"base_model.model.model.layers.0.{name}" in dict(model.named_parameters())


def test_a_plain_config_stays_plain_without_peft_asking():
    config = MiLoRAConfig()
    assert not hasattr(config, "anything_else")
    assert type(copy.deepcopy(config)) is MiLoRAConfig
    with pytest.raises(AttributeError, match="has no attribute 'task'"):
        _ = config.task
    assert type(config) is MiLoRAConfig


def test_parameters_and_status(capsys):
    model = wrapped(task_type="CAUSAL_LM")
    assert isinstance(model, PeftModelForCausalLM)
    trainable, total = model.get_nb_trainable_parameters()
    count = milora.count_parameters(model)
    assert trainable == count.experts + count.router + count.pooler
    assert total == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,d}" in capsys.readouterr().out
    status = model.get_model_status()
    assert status.active_adapters == ["default"] and status.enabled is True
    assert status.trainable_params == trainable
    assert status.num_adapter_layers == 2 * (7 + 1)


def test_bad_targets_leave_the_model_alone():
    model = build("llama")
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="did you mean q_proj"):
        get_peft_model(model, MiLoRAConfig(target_modules=["qproj"]))
    assert modules == {name: id(module) for name, module in model.named_modules()}


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_library_reads_what_the_other_writes(tmp_path, kind, low_memory):
    model = wrapped(KINDS[kind])
    want = logits(model)
    model.save_pretrained(tmp_path / "theirs")
    milora.save(model, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("ours", "theirs"))
    assert ours.keys() == {key_of(key) for key in theirs}
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        again = PeftModel.from_pretrained(build("llama"), folder, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(again), want)
        assert not any(p.requires_grad for p in again.parameters())
        assert {p.dtype for p in again.parameters()} == {torch.float32}
        assert torch.equal(logits(milora.load(build("llama"), folder)), want)


def test_bfloat16_base_keeps_float32_adapters(tmp_path):
    model = get_peft_model(build("llama").bfloat16(), MiLoRAConfig(rank=4))
    randomize(model)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        base = build("llama").bfloat16()
        again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(again), logits(model))


def test_trainable_and_task(tmp_path):
    wrapped(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    assert isinstance(model, PeftModelForCausalLM)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == adapter(model).keys() - thetas(model).keys()


def test_pattern_order_survives(tmp_path):
    options = {"rank_pattern": {"up_proj": 2, "mlp.*": 3}}
    model = wrapped(options)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), logits(model))


@pytest.mark.parametrize("damage", ["version", "nan", "truncated", "shape", "pickle"])
def test_damaged_files_leave_the_model_alone(tmp_path, damage):
    wrapped().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    key = next(key for key in tensors if "lora_A" in key)
    if damage == "version":
        config["format_version"] = 99
    elif damage == "truncated":
        payload = (tmp_path / WEIGHTS_FILE).read_bytes()
        (tmp_path / WEIGHTS_FILE).write_bytes(payload[:-10])
    elif damage == "pickle":
        (tmp_path / WEIGHTS_FILE).unlink()
        torch.save(tensors, tmp_path / "adapter_model.bin")
    else:
        tensors[key] = tensors[key] / 0 if damage == "nan" else tensors[key][:2].clone()
        save_file(tensors, tmp_path / WEIGHTS_FILE)
        config["sha256"] = sha256_of(tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    model = build("llama")
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(milora.AdapterError):
        PeftModel.from_pretrained(model, tmp_path)
    assert modules == {name: id(module) for name, module in model.named_modules()}
    assert "_milora_runtime" not in vars(model)
    attached = wrapped()
    with pytest.raises(milora.AdapterError):
        attached.load_adapter(tmp_path, "second")
    assert list(attached.peft_config) == ["default"]
    assert milora.adapters(attached).keys() == {"default"}


@checks_tensors
def test_bad_tensors_do_not_get_into_an_adapter_that_is_there(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    key = next(key for key in tensors if "lora_A" in key)
    before = logits(model)
    for change in ({key: tensors[key] / 0}, {"x": torch.ones(1)}, {key: tensors[key].double()}):
        save_file({**tensors, **change}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(milora.AdapterError, match="1 problem"):
            model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), before)


# ---- several adapters ---------------------------------------------------------------------------


def test_add_switch_and_delete(tmp_path):
    model = wrapped(seed=1)
    first = logits(model)
    model.add_adapter("b", MiLoRAConfig(rank=2, expert="dora"))
    assert model.active_adapters == ["default"] and torch.equal(logits(model), first)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and not any(".b." in name for name in trainable)
    randomize(model, seed=5)
    model.set_adapter("b")
    second = logits(model)
    assert not torch.equal(second, first)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == adapter(model, "b").keys() - thetas(model).keys()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(milora.load(build("llama"), tmp_path / "b")), second)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "b", "b")
    assert loaded.active_adapters == ["default"]
    loaded.set_adapter("b")
    assert torch.equal(logits(loaded), second)
    model.delete_adapter("b")
    assert model.active_adapters == ["default"] and list(model.peft_config) == ["default"]
    loaded.set_adapter("default")
    assert torch.equal(logits(model), logits(loaded))
    assert not any(".b." in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("b")
    with pytest.raises(ValueError, match="one MiLoRA adapter can be active at a time"):
        model.base_model.set_adapter(["default", "b"])


def test_the_last_adapter_deleted_leaves_the_bare_model():
    model = wrapped()
    base = model.get_base_model()
    model.delete_adapter("default")
    assert torch.equal(base(prompts(2, LENGTH)).logits, build("llama")(prompts(2, LENGTH)).logits)
    assert not any(isinstance(module, MiLoRALinear) for module in base.modules())
    model.add_adapter("again", MiLoRAConfig(rank=2))
    model.set_adapter("again")
    assert milora.adapters(model).keys() == {"again"}
    assert logits(model).shape[:2] == (2, LENGTH)


def test_adapter_names_in_one_batch():
    model = wrapped(task_type="CAUSAL_LM")
    model.add_adapter("b", MiLoRAConfig(rank=2, expert="dora", top_k=2))
    randomize(model)
    ids = prompts(3, LENGTH)
    names = ["b", "__base__", "default"]
    mixed = model.generate(input_ids=ids, max_new_tokens=5, adapter_names=names)
    beams = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2}
    assert model.generate(input_ids=ids, adapter_names=names, **beams).shape[0] == 6
    with milora.prompt_lengths(model, LENGTH), torch.no_grad():
        rows = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=ids, max_new_tokens=5)
                scores = model(input_ids=ids).logits
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=ids, max_new_tokens=5)
            scores = logits(model, ids)
        assert torch.equal(mixed[row], alone[row])
        torch.testing.assert_close(rows[row], scores[row], rtol=0, atol=1e-5)
    # An error inside leaves no names behind, unlike PEFT's hooks.
    with pytest.raises(ValueError, match="unknown"):
        model.generate(input_ids=ids, max_new_tokens=2, adapter_names=["x", "b", "b"])
    model.set_adapter("default")
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5)[2], mixed[2])


def test_disable_adapter():
    model = wrapped()
    want = logits(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
        bare = model(input_ids=prompts(2, LENGTH)).logits
        with model.disable_adapter():
            model.set_adapter("default")
    assert torch.equal(bare, build("llama")(prompts(2, LENGTH)).logits)
    assert torch.equal(logits(model), want)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits(model), want)


def test_disabled_is_disabled_for_a_conversation_too():
    """Which keeps its route otherwise, whatever adapter is active."""
    model = wrapped(task_type="CAUSAL_LM")
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(input_ids=prompts(2, LENGTH), **options)
    turn = torch.cat([first.sequences, prompts(2, 3)], 1)

    def go() -> torch.Tensor:
        cache = copy.deepcopy(first.past_key_values)
        out = model.generate(input_ids=turn, past_key_values=cache, output_logits=True, **options)
        return torch.stack(out.logits)

    want = go()
    with milora.disabled(model):
        bare = go()
    assert not torch.equal(bare, want)
    with model.disable_adapter():
        assert torch.equal(go(), bare)
    assert torch.equal(go(), want)


def test_merging_is_refused_and_unload_restores():
    model = wrapped()
    base = model.get_base_model()
    for name in ("merge_and_unload", "merge_adapter", "unmerge_adapter"):
        with pytest.raises(ValueError, match="cannot be merged: which experts are on depends"):
            getattr(model, name)()
    fresh = build("llama")
    assert model.unload() is base
    assert base.state_dict().keys() == fresh.state_dict().keys()
    assert all(p.requires_grad for p in base.parameters()) and not hasattr(base, "peft_config")
    assert torch.equal(base(prompts(1, 4)).logits, fresh(prompts(1, 4)).logits)


def test_coefficients_train_in_their_phase_alone():
    model = wrapped()
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    model.set_requires_grad("default")
    assert not any(p.requires_grad for p in thetas(model).values())
    with milora.activation_phase(model):
        assert all(p.requires_grad for p in thetas(model).values())
    assert not any(p.requires_grad for p in thetas(model).values())


def test_generate_routes_once_per_prompt():
    model = wrapped(task_type="CAUSAL_LM")
    milora.reset_stats(model)
    model.generate(input_ids=prompts(3, LENGTH), max_new_tokens=5)
    assert milora.stats(model).routed_prompts == 2 * 3
    assert torch.equal(
        copy.deepcopy(model).generate(input_ids=prompts(1, 4), max_new_tokens=4),
        model.generate(input_ids=prompts(1, 4), max_new_tokens=4),
    )


# ---- Trainer ------------------------------------------------------------------------------------


def examples() -> Dataset:
    rows = prompts(24, 8, seed=9).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * 5 + row[5:]} for row in rows])


def trainer(folder, model, eval_dataset=None, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        save_steps=3,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=examples(), eval_dataset=eval_dataset)


def test_trainer_saves_the_adapter_and_resumes(tmp_path):
    options = {"balance_coef": 0.0}  # its running window is not part of PEFT's checkpoints
    straight = wrapped(options, task_type="CAUSAL_LM")
    start = {name: p.detach().clone() for name, p in adapter(straight).items()}
    trainer(tmp_path / "run", straight).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert (checkpoint / CONFIG_FILE).is_file() and not (checkpoint / "model.safetensors").exists()
    resumed = wrapped(options, seed=8, task_type="CAUSAL_LM")
    set_seed(0)
    trainer(tmp_path / "other", resumed).train(resume_from_checkpoint=str(checkpoint))
    want, got = adapter(straight), adapter(resumed)
    assert all(torch.equal(got[name], want[name]) for name in want)
    moved = {name.split(".")[-1] for name in want if not torch.equal(want[name], start[name])}
    assert moved == {"weight", "w_r", "w_sa"}
    assert torch.equal(
        logits(milora.load(build("llama"), tmp_path / "run" / "checkpoint-6")),
        logits(straight.eval()),
    )


def test_trainer_loads_the_best_model(tmp_path):
    model = wrapped(task_type="CAUSAL_LM")
    run = trainer(
        tmp_path,
        model,
        examples().select(range(4)),
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    run.train()
    best = milora.load(build("llama"), run.state.best_model_checkpoint)
    assert torch.equal(logits(model), logits(best))
