"""TRL's SFTTrainer and DPOTrainer on an attached model: routes, losses, the reference model."""

from __future__ import annotations

import pytest
import torch
from text_model import byte_tokenizer, tiny_llama
from tiny_models import randomize

import milora
from milora.attach import runtime_of
from milora.integrations.trl import bare_reference

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

PAIRS = [("1+1=", "2"), ("12+5=", "17"), ("3+30=", "thirty three"), ("7+1=", "8, I think")]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def attached(**options):
    model = milora.attach(tiny_llama(), milora.MiLoRAConfig(**{"rank": 4, **options}))
    return randomize(model, std=0.1)


def arguments(kind: type, output, **options):
    return kind(
        output_dir=str(output),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
            **options,
        },
    )


def sft(output, model, data: list[dict] | None = None, **options) -> trl.SFTTrainer:
    data = [{"prompt": p, "completion": c} for p, c in PAIRS] if data is None else data
    return trl.SFTTrainer(
        model=model,
        args=arguments(trl.SFTConfig, output, **options),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=byte_tokenizer(),
    )


def preferences(rejected: str = "no") -> list[dict]:
    return [{"prompt": p, "chosen": c, "rejected": rejected + c[:1]} for p, c in PAIRS]


def dpo(output, model, reference, data: list[dict] | None = None, **options) -> trl.DPOTrainer:
    return trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments(trl.DPOConfig, output, **options),
        train_dataset=datasets.Dataset.from_list(data or preferences()),
        processing_class=byte_tokenizer(),
    )


def first_loss(trainer) -> float:
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def prompt_tokens() -> list[int]:
    return sorted(len(byte_tokenizer()(prompt).input_ids) for prompt, _ in PAIRS)


# ---- SFT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trains_and_routes_on_prompts_alone(tmp_path, padding_free, checkpointing):
    model = attached()
    trainer = sft(
        tmp_path,
        model,
        padding_free=padding_free,
        max_length=None,
        gradient_checkpointing=checkpointing,
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with milora.record_routing(model) as states:
        trainer.train()
    assert len(states) == 2
    for state in states:
        assert sorted(state.prompt_lengths.tolist()) == prompt_tokens()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.rsplit(".", 1)[-1] for name in moved} == {"weight", "w_r", "w_sa"}
    assert all("lora" in name for name in moved)


def test_sft_loss_has_the_balance_loss(tmp_path):
    without = first_loss(sft(tmp_path, attached(balance_coef=0.0), max_steps=1))
    model = attached(balance_coef=0.5)
    with_balance = first_loss(sft(tmp_path, model, max_steps=1))
    balance = milora.balance_report(model)["balance_loss"]
    assert with_balance - without == pytest.approx(0.5 * balance, rel=1e-4)


def test_sft_accumulates_the_balance_loss_as_its_own(tmp_path):
    """Micro-batches of one row weigh as the answers' tokens do."""
    losses = []
    for rows, accumulation in ((4, 1), (1, 4)):
        model = attached(balance_coef=0.5)
        set_history(model)
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        losses.append(first_loss(sft(tmp_path, model, max_steps=1, **options)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def set_history(model) -> None:
    """So long a history that a few prompts do not move the shares."""
    widths = [len(names) for names in runtime_of(model).names]
    counts = torch.cat([torch.arange(n).add(5).mul(10**6) for n in widths])
    window = runtime_of(model).windows["default"]
    window.load_state_dict(
        {"widths": widths, "steps": [[10**8, counts.tolist()]]}, torch.device("cpu")
    )


def test_sft_packing_keeps_the_rows_routes(tmp_path):
    """Packed into one row, each example has the route and the loss it has alone."""
    losses, routes = [], []
    for packing in (False, True):
        model = attached(balance_coef=0.0)
        options = {"packing": True} if packing else {}
        trainer = sft(tmp_path, model, max_steps=1, max_length=64, **options)
        with milora.record_routing(model) as states:
            losses.append(first_loss(trainer))
        order = states[0].probabilities[0, :, 0].argsort()
        routes.append(states[0].gates[:, order])
    assert routes[1].shape == routes[0].shape
    torch.testing.assert_close(routes[1], routes[0], rtol=1e-4, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_adapters_that_were_cast_to_bfloat16_train(tmp_path):
    """TRL does so on bases of 4 and 8 bits; the router computes in float32 all the same."""
    model = attached()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    trainer = sft(tmp_path, model)
    with milora.record_routing(model) as states:
        trainer.train()
    assert states[0].gates.dtype == torch.float32
    milora.save(model, tmp_path / "adapter")
    milora.load(tiny_llama(), tmp_path / "adapter")


def test_text_without_a_prompt_gets_a_clear_error(tmp_path):
    trainer = sft(tmp_path, attached(), [{"text": p + c} for p, c in PAIRS])
    with pytest.raises(ValueError, match="completion-only labels"):
        trainer.train()


def test_sft_checkpoint_resumes(tmp_path):
    def start():
        model = attached(dropout=0.1)
        return sft(tmp_path, model, max_steps=4, save_strategy="steps", save_steps=2)

    whole = start()
    whole.train()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, actual), expected in zip(
        resumed.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        assert torch.equal(actual, expected), name


# ---- DPO --------------------------------------------------------------------------------------


def dpo_states(tmp_path, data: list[dict], **options) -> list[milora.RoutingState]:
    model = attached()
    trainer = dpo(tmp_path, model, bare_reference(model), data, max_steps=1, **options)
    with milora.record_routing(model) as states:
        trainer.train()
    return states


def test_dpo_routes_on_the_prompt_of_the_pair(tmp_path):
    states = dpo_states(tmp_path, preferences())
    assert len(states) == 1  # the reference's forward has none
    gates, lengths = states[0].gates, states[0].prompt_lengths
    assert sorted(lengths[:4].tolist()) == prompt_tokens()
    assert torch.equal(lengths[:4], lengths[4:])
    torch.testing.assert_close(gates[:, :4], gates[:, 4:], rtol=1e-5, atol=1e-7)


def test_dpo_completions_never_change_a_route(tmp_path):
    routes = [
        dpo_states(tmp_path, preferences(rejected))[0] for rejected in ("x", "quite another answer")
    ]
    assert routes[0].same_route(routes[1], tolerance=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_trains_with_a_shared_reference(tmp_path, checkpointing):
    """The same losses and weights as with a reference that is a model of its own."""
    results = []
    for shared in (True, False):
        model = attached()
        separate = tiny_llama()
        trainer = dpo(
            tmp_path,
            model,
            bare_reference(model) if shared else separate,
            gradient_checkpointing=checkpointing,
        )
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        results.append((losses, {n: p.detach() for n, p in model.named_parameters()}))
    (losses, parameters), (expected_losses, expected) = results
    assert losses == expected_losses and len(losses) == 2
    assert not [name for name in expected if not torch.equal(parameters[name], expected[name])]


def test_dpo_loss_has_the_balance_loss(tmp_path):
    losses = []
    for coef in (0.0, 0.5):
        model = attached(balance_coef=coef)
        losses.append(first_loss(dpo(tmp_path, model, bare_reference(model), max_steps=1)))
    balance = milora.balance_report(model)["balance_loss"]
    assert losses[1] - losses[0] == pytest.approx(0.5 * balance, rel=1e-4)


def test_reference_is_the_bare_model_and_leaves_no_trace():
    model = attached()
    bare = tiny_llama()
    reference = bare_reference(model)
    ids = torch.randint(4, 300, (2, 7))
    with torch.no_grad():
        assert torch.equal(reference(ids).logits, bare(ids).logits)
        assert torch.equal(reference.eval()(ids).logits, bare(ids).logits)
    with pytest.raises(ValueError, match="input_ids"):
        reference(input_ids=None)  # a forward that fails must not leave the adapters switched off
    with torch.no_grad():
        adapted = model(ids, use_cache=True).logits
    assert not torch.equal(adapted, bare(ids).logits)
    assert milora.adapters(reference) == {}
    milora.detach(model)
    assert torch.equal(model(ids).logits, bare(ids).logits)
