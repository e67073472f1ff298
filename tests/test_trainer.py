"""The stock Trainer on an attached model: checkpoints, resuming, losses, clipping."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor, nn

import milora
from milora.attach import runtime_of
from milora.data import CompletionCollator
from milora.train import MiLoRACallback, MiLoRATrainer

TRAINER_FILES = {
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"
}  # fmt: skip
ADAPTER_FILES = {
    "adapter_config.json", "adapter_model.safetensors", "milora_balance_window.json"
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def rows(answers: list[int], prompt: int = 4, seed: int = 0) -> list[dict]:
    """Examples with a prompt of `prompt` tokens and these numbers of answer tokens."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for answer in answers:
        ids = torch.randint(3, tiny_models.VOCAB, (prompt + answer,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return examples


def attached(base=None, **options):
    model = tiny_models.build("llama") if base is None else base
    milora.attach(model, milora.MiLoRAConfig(**{"rank": 4, "balance_coef": 0.1, **options}))
    return tiny_models.randomize(model)


def quantized(folder: Path):
    """A base whose linear modules hold int8 weights, as transformers loads it."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    tiny_models.build("llama").save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig())
    )


def make_trainer(output: Path, model, *, options: dict | None = None, **arguments):
    """Six steps of AdamW unless `arguments` (of TrainingArguments) say otherwise."""
    arguments = {
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    options = {"train_dataset": rows([3, 5, 2, 6, 4, 4, 3, 5, 2, 6, 4, 4]), **(options or {})}
    trainer_class = options.pop("trainer_class", transformers.Trainer)
    return trainer_class(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        data_collator=CompletionCollator(),
        **options,
    )


def trained(model) -> dict[str, Tensor]:
    return {
        n: p.detach().clone() for n, p in model.named_parameters() if "milora" in n or "lora" in n
    }


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


# ---- checkpoints ------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapter_and_no_base(tmp_path):
    model = attached()
    make_trainer(tmp_path, model, max_steps=2, save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    assert {path.name for path in folder.iterdir()} == ADAPTER_FILES | TRAINER_FILES
    num_bytes = (folder / "adapter_model.safetensors").stat().st_size
    assert num_bytes < 4 * milora.count_parameters(model).trainable + 20_000
    loaded = milora.load(tiny_models.build("llama"), folder)
    assert_equal(trained(loaded), trained(model))


def test_save_model_writes_an_adapter(tmp_path):
    model = attached()
    make_trainer(tmp_path, model).save_model()
    assert {p.name for p in tmp_path.iterdir()} == ADAPTER_FILES | {"training_args.bin"}


@pytest.mark.parametrize("base", ["float32", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, base, checkpointing):
    def start(output: Path):
        model = attached(quantized(tmp_path / "base") if base == "int8" else None, dropout=0.1)
        arguments = {"save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
        if checkpointing:
            name = "activation_checkpointing"
            if not hasattr(transformers.TrainingArguments, name):
                name = "gradient_checkpointing"
            arguments[name] = True
        return make_trainer(output, model, **arguments)

    whole = start(tmp_path / "run")
    before = trained(whole.model)
    whole.train()
    resumed = start(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_equal(trained(resumed.model), trained(whole.model))
    window, expected = (runtime_of(t.model).windows["default"] for t in (resumed, whole))
    assert window.state_dict() == expected.state_dict()
    moved = {n for n, p in trained(whole.model).items() if not torch.equal(p, before[n])}
    assert {name.rsplit(".", 1)[-1] for name in moved} == {"weight", "w_r", "w_sa"}


def test_resuming_another_adapter_is_refused(tmp_path):
    make_trainer(tmp_path, attached(), max_steps=1, save_strategy="steps", save_steps=1).train()
    other = make_trainer(tmp_path, attached(rank=8))
    with pytest.raises(milora.AdapterError, match="rank"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    """With `greater_is_better` the first evaluation of a falling loss is the best."""
    model = attached()
    trainer = make_trainer(
        tmp_path,
        model,
        options={"eval_dataset": rows([3, 5, 2, 6, 4, 4, 3, 5, 2, 6, 4, 4])},
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = milora.load(tiny_models.build("llama"), tmp_path / "checkpoint-2")
    assert_equal(trained(model), trained(best))


def test_a_bare_model_trains_and_resumes_as_before(tmp_path):
    """Trainer has learned of attached models; a model without adapter is none of its business."""
    attached()

    def start():
        return make_trainer(
            tmp_path, tiny_models.build("llama"), save_strategy="steps", save_steps=3
        )

    whole = start()
    whole.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(dict(resumed.model.named_parameters()), dict(whole.model.named_parameters()))


# ---- losses -----------------------------------------------------------------------------------


def one_step(tmp_path, model, *, options=None, **arguments):
    """One SGD step of size 1, so that the change of a parameter is its gradient.

    The load-balance loss reads so long a history that this step's own prompts do not move it.
    """
    widths = [len(names) for names in runtime_of(model).names]
    counts = [torch.arange(n).add(5).mul(10**6) for n in widths]
    history = {"widths": widths, "steps": [[10**8, torch.cat(counts).tolist()]]}
    runtime_of(model).windows["default"].load_state_dict(history, torch.device("cpu"))
    arguments = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, **arguments}
    arguments = {"max_steps": 1, "lr_scheduler_type": "constant", **arguments}
    trainer = make_trainer(tmp_path, model, options=options, **arguments)
    before = trained(model)
    trainer.train()
    after = trained(model)
    gradients = {name: before[name] - after[name] for name in before}
    return trainer.state.log_history[0]["loss"], gradients


@pytest.mark.parametrize("kind", ["model_loss", "label_smoothing", "compute_loss_func"])
def test_accumulated_micro_batches_are_one_batch(tmp_path, kind):
    """One micro-batch of four rows, and four of one row, with unequal numbers of labels."""
    options = {"train_dataset": rows([1, 9, 4, 2])}
    arguments = {}
    if kind == "label_smoothing":
        arguments["label_smoothing_factor"] = 0.1
    if kind == "compute_loss_func":
        options["compute_loss_func"] = summed_loss
    steps = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = attached()
        loss, gradients = one_step(
            tmp_path,
            model,
            options=options,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            **arguments,
        )
        steps.append((loss, gradients))
    (loss, gradients), (split_loss, split) = steps
    assert split_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-3, atol=2e-6, msg=name)


def summed_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


@pytest.mark.parametrize("kind", ["model_loss", "label_smoothing", "compute_loss_func"])
def test_every_kind_of_loss_gets_the_balance_loss(tmp_path, kind):
    options, arguments = {"train_dataset": rows([3, 5])}, {}
    if kind == "label_smoothing":
        arguments["label_smoothing_factor"] = 0.1
    if kind == "compute_loss_func":
        options["compute_loss_func"] = summed_loss
    with_balance, _ = one_step(tmp_path, model := attached(), options=options, **arguments)
    report = milora.balance_report(model)
    without, _ = one_step(tmp_path, attached(balance_coef=0.0), options=options, **arguments)
    assert with_balance - without == pytest.approx(0.1 * report["balance_loss"], rel=1e-3)


def test_the_balance_loss_is_logged_apart(tmp_path):
    model = attached()
    trainer = make_trainer(tmp_path, model, options={"callbacks": [MiLoRACallback()]})
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 6
    assert all(0.5 < line["balance_loss"] < 7.0 for line in lines)  # between balanced and N
    report = milora.balance_report(model)["balance_loss"]
    assert lines[-1]["balance_loss"] == pytest.approx(report, abs=1e-6)


@pytest.mark.parametrize("kind", ["model_loss", "label_smoothing"])
def test_evaluation_is_of_the_task_alone(tmp_path, kind):
    losses = []
    for coef in (0.0, 5.0):
        smoothing = 0.1 if kind == "label_smoothing" else 0.0
        model = attached(balance_coef=coef)
        trainer = make_trainer(tmp_path, model, label_smoothing_factor=smoothing)
        losses.append(trainer.evaluate(rows([3, 5, 2, 6]))["eval_loss"])
        assert not runtime_of(model).windows["default"].steps
    assert losses[0] == losses[1]


def test_text_without_a_prompt_gets_a_clear_error(tmp_path):
    data = [{**row, "labels": row["input_ids"]} for row in rows([3, 5])]
    trainer = make_trainer(tmp_path, attached(), options={"train_dataset": data})
    with pytest.raises(ValueError, match="completion-only labels"):
        trainer.train()


@pytest.mark.parametrize(
    ("version", "options", "message"),
    [
        (1, {}, "set fsdp_version to 2"),
        (2, {"expert": "lorta", "expert_options": {"head_dim": 8}}, "kind lorta share tensors"),
    ],
)
def test_what_fsdp_cannot_shard_is_refused_before_the_training(
    tmp_path, monkeypatch, version, options, message
):
    trainer = make_trainer(tmp_path, attached(**options))
    plugin = SimpleNamespace(fsdp_version=version)  # as accelerate sets it up
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", plugin)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=message):
        trainer.train()


# ---- clipping ---------------------------------------------------------------------------------

OUTLIER = 5


class BlindNorm(nn.Module):
    """RMS norm of all dimensions but one, which comes out as zero."""

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[-1]).index_fill(0, torch.tensor([OUTLIER]), 0.0)
        x = x * keep
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def with_outlier(value: float):
    """A model whose residual stream is `value` in one dimension that only the router can see.

    Real models have such dimensions; the blocks' norms scale them away.
    """
    base = tiny_models.build("llama")
    base.model.norm = BlindNorm()
    for layer in base.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = BlindNorm(), BlindNorm()
    model = attached(base, balance_coef=0.01)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, OUTLIER] = value
        for layer in model.model.layers:
            layer.milora_router["default"].w_r[:, OUTLIER] = 0.0
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.base_layer.weight[OUTLIER] = 0.0
                linear.tensors("default")["lora_B"][OUTLIER] = 0.0
    return model


def test_a_huge_dimension_leaves_the_step_of_omega_as_it_was(tmp_path):
    """One dimension of 1e3 in H gives Θ a huge gradient, which must not shrink the step of Ω.

    Left out are the router's own weights of that dimension. They stay in Ω's norm, so Ω is clipped
    more; AdamW's step depends on the gradients' scale through its epsilon alone, hence the 10 %.
    Clipped together with Θ, Ω would not move at all.
    """
    steps = []
    for value in (0.0, 1e3):
        model = with_outlier(value)
        before = trained(model)
        make_trainer(
            tmp_path,
            model,
            options={
                "trainer_class": MiLoRATrainer,
                "activation_dataset": rows([2, 3], seed=1),
                "activation_lr": 1e-6,
            },
            max_steps=1,
            max_grad_norm=1.0,
        ).train()
        steps.append({n: p - before[n] for n, p in trained(model).items()})
    plain, outlier = steps
    num_moved = 0
    for name, step in plain.items():
        if name.endswith("theta"):
            continue
        if name.endswith(("w_r", "w_sa")):
            step[..., OUTLIER] = outlier[name][..., OUTLIER] = 0.0
        assert (outlier[name] - step).norm() <= 0.1 * step.norm(), name
        num_moved += bool(step.any())
    assert num_moved > 20
