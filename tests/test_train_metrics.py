"""Dev perplexity, early stopping on it, and the numbers that the callback logs."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from text_model import examples, make_trainer, tiny_llama

import milora
from milora.data import CompletionCollator
from milora.train import MiLoRACallback
from milora.train.metrics import mean_shares, read_metrics, short_names


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_per_answer_token_whatever_the_batches(tmp_path, batch_size):
    rows = examples(8, seed=4)
    trainer = make_trainer(
        tmp_path, eval_dataset=rows, arguments={"per_device_eval_batch_size": batch_size}
    )
    loss, tokens = 0.0, 0
    collate = CompletionCollator()
    for row in rows:
        batch = collate([row])
        with torch.no_grad():
            logits = trainer.model.eval()(**batch).logits[0, :-1].double()
        targets = batch["labels"][0, 1:]
        kept = targets != -100
        loss += torch.nn.functional.cross_entropy(
            logits[kept], targets[kept], reduction="sum"
        ).item()
        tokens += int(kept.sum())
    measured = trainer.evaluate()["eval_perplexity"]
    assert measured == pytest.approx(math.exp(loss / tokens), rel=1e-5)


def test_early_stopping_follows_perplexity(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=examples(4, seed=4),
        callbacks=[transformers.EarlyStoppingCallback(2)],
        arguments={
            "max_steps": 50,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 1,
            "learning_rate": 0.0,  # nothing gets better
            "metric_for_best_model": "perplexity",
            "greater_is_better": False,
            "load_best_model_at_end": True,
        },
        activation_lr=0.0,
    )
    assert trainer.train().global_step == 3
    assert trainer.state.best_global_step == 1
    assert trainer.state.best_metric > 1


def test_logs_and_metrics_file_hold_the_balance(tmp_path):
    trainer = make_trainer(tmp_path, arguments={"logging_steps": 3})
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["balance_loss"] > 0
        shares = [log[key] for key in log if key.startswith("share/")]
        assert len(shares) == 7 and sum(shares) == pytest.approx(1, abs=1e-3)
    experts, lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [len(block) for block in experts] == [7, 7]
    with_shares = [line for line in lines if "shares" in line]
    assert [line["step"] for line in with_shares] == [3, 6]
    assert sum(with_shares[0]["shares"][1]) == pytest.approx(1, abs=1e-3)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()[1]) < 1500


def test_the_callback_serves_a_stock_trainer(tmp_path):
    model = tiny_llama()
    milora.attach(model, milora.MiLoRAConfig(rank=4))
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=examples(),
        data_collator=CompletionCollator(),
        callbacks=[MiLoRACallback(tmp_path / "elsewhere.jsonl")],
    )
    trainer.train()
    assert all("balance_loss" in log for log in trainer.state.log_history if "loss" in log)
    assert len(read_metrics(tmp_path / "elsewhere.jsonl")[1]) == 3


def test_experts_of_one_name_stay_apart():
    paths = ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]
    assert short_names(paths) == {
        "attn.c_attn": "c_attn", "attn.c_proj": "attn.c_proj", "mlp.c_proj": "mlp.c_proj"
    }  # fmt: skip
    report = {"share": {0: {"a.q": 0.25, "a.k": 0.75}, 1: {"a.q": 0.75, "a.k": 0.25}}}
    assert mean_shares(report) == {"share/q": 0.5, "share/k": 0.5}


def test_the_metrics_header_is_checked(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"format": "other"}) + "\n")
    with pytest.raises(ValueError, match="must begin with format milora_metrics version 1"):
        read_metrics(path)
