"""The bi-level trainer: what moves when, resuming to the same bits, several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from text_model import byte_tokenizer, examples, make_trainer, sums, tiny_llama
from torch.utils.data import IterableDataset

import milora
from milora.train import MiLoRATrainer
from milora.train.bilevel import ACTIVATION_STATE
from milora.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def theta_names(model) -> set[str]:
    ids = {id(p) for p in milora.activation_parameters(model)}
    return {name for name, p in model.named_parameters() if id(p) in ids}


class Watch(transformers.TrainerCallback):
    """Remembers all parameters after each half of a step."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.halves: list[dict[str, torch.Tensor]] = [snapshot(trainer.model)]
        step = trainer.activation_step

        def watched():
            self.halves.append(snapshot(trainer.model))
            step()
            self.halves.append(snapshot(trainer.model))

        trainer.activation_step = watched


def test_the_two_halves_of_a_step_move_disjoint_parameters(tmp_path):
    trainer = make_trainer(tmp_path, arguments={"warmup_steps": 0})
    theta = theta_names(trainer.model)
    assert len(theta) == 2
    watch = Watch(trainer)
    trainer.train()
    assert len(watch.halves) == 1 + 2 * 6
    for i, (before, after) in enumerate(zip(watch.halves, watch.halves[1:], strict=False)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        if i % 2 == 0:
            assert moved and not moved & theta
        else:
            assert moved == theta
    frozen = [n for n, p in trainer.model.named_parameters() if not p.requires_grad]
    base = {name for name in frozen if name not in theta}
    assert all(torch.equal(watch.halves[0][n], watch.halves[-1][n]) for n in base)


def test_theta_is_in_no_optimizer_of_the_trainers(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    ours = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    theta = {id(p) for p in milora.activation_parameters(trainer.model)}
    assert theta and not ours & theta
    mine = {id(p) for g in trainer.activation_optimizer.param_groups for p in g["params"]}
    assert mine == theta


def test_both_learning_rates_follow_the_same_schedule(tmp_path):
    trainer = make_trainer(
        tmp_path, arguments={"warmup_steps": 2, "learning_rate": 1e-3}, activation_lr=1e-5
    )
    rates = []
    step = trainer.activation_step

    def watched():
        step()
        schedulers = trainer.lr_scheduler, trainer.activation_scheduler
        rates.append(tuple(scheduler.get_last_lr()[0] for scheduler in schedulers))

    trainer.activation_step = watched
    trainer.train()
    assert rates == [(pytest.approx(omega), pytest.approx(omega / 100)) for omega, _ in rates]
    assert rates[1][0] == pytest.approx(1e-3) and rates[-1][0] == 0


def test_accumulation_takes_as_many_activation_batches(tmp_path):
    # 22 training rows in batches of 2: 11 micro-batches, so the epoch's last step has 3 of 4.
    trainer = make_trainer(tmp_path, arguments={"gradient_accumulation_steps": 4, "max_steps": 3})
    counts = []
    take = None

    def watched(count):
        counts.append(count)
        return take(count)

    def on_first_step():
        nonlocal take
        if take is None:
            take = trainer._activation_stream.take
            trainer._activation_stream.take = watched
        step()

    step = trainer.activation_step
    trainer.activation_step = on_first_step
    trainer.train()
    assert counts == [4, 4, 3]


def test_the_accumulated_gradient_of_theta_is_that_of_one_large_batch(tmp_path):
    gradients = []
    for batch, accumulation in ((4, 1), (2, 2)):
        trainer = make_trainer(
            tmp_path,
            config=milora.MiLoRAConfig(rank=4, balance_coef=0.0),
            arguments={
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "max_steps": 1,
                "learning_rate": 0.0,
            },
            activation_max_grad_norm=0.0,
        )
        # B is 0 at the start, and with it the gates' gradient.
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(
                    parameter, std=0.1, generator=torch.Generator().manual_seed(3)
                )
        recorded = []
        trainer.create_scheduler = _recording_scheduler(trainer, recorded)
        trainer.train()
        gradients.append(torch.cat(recorded[0]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-7)


def _recording_scheduler(trainer, recorded):
    """`create_scheduler` that also records Θ's gradients at each step of its optimizer."""
    create = trainer.create_scheduler

    def wrapped(num_training_steps, optimizer=None):
        scheduler = create(num_training_steps, optimizer)
        theta = milora.activation_parameters(trainer.model)
        trainer.activation_optimizer.register_step_pre_hook(
            lambda *_: recorded.append([p.grad.clone() for p in theta])
        )
        return scheduler

    return wrapped


def test_clipping_theta_does_not_touch_the_rest(tmp_path):
    recorded = []
    trainer = make_trainer(tmp_path, activation_max_grad_norm=1e-9)
    trainer.create_scheduler = _recording_scheduler(trainer, recorded)
    trainer.train()
    assert all(torch.cat(step).norm() <= 1.01e-9 for step in recorded)
    assert len(recorded) == 6
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert all(norm > 1e-6 for norm in norms)


# ---- when there is no Θ step --------------------------------------------------------------------


def test_without_bilevel_theta_stays_as_it_was(tmp_path):
    for bilevel in (True, False):  # in the config; the trainer's own argument says no either way
        model = tiny_llama()
        milora.attach(model, milora.MiLoRAConfig(rank=4, bilevel=bilevel))
        thetas = {n: p.clone() for n, p in model.named_parameters() if n.endswith("theta")}
        trainer = make_trainer(tmp_path, model, bilevel=False)
        assert len(trainer.train_dataset) == 24
        trainer.train()
        after = dict(model.named_parameters())
        assert thetas and all(torch.equal(after[n], theta) for n, theta in thetas.items())


def test_a_router_without_coefficients_trains_as_usual(tmp_path):
    trainer = make_trainer(tmp_path, config=milora.MiLoRAConfig(rank=4, activation="gelu"))
    assert not trainer.bilevel
    assert trainer.train().global_step == 6
    with pytest.raises(ValueError, match="needs a router with the rational activation"):
        make_trainer(tmp_path, model=trainer.model, bilevel=True)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(examples())


REFUSED = {
    "a streaming set": ({"train_dataset": Endless()}, {}, "no tenth to hold out"),
    "one row": ({"train_dataset": examples(1)}, {}, "must have 2 rows or more, got 1"),
    "a share of 1": ({"activation_share": 1.0}, {}, r"activation_share must be in \(0, 1\), got 1"),
    "a negative rate": ({"activation_lr": -1.0}, {}, "must be >= 0, got -1.0"),
    "a schedule by metric": (
        {"eval_dataset": examples(4)},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        "must be a schedule of the step number, got reduce_lr_on_plateau",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_theta_step_is_refused(tmp_path, name):
    options, arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, arguments=arguments, **options)


# ---- data ---------------------------------------------------------------------------------------


def test_a_tenth_is_held_out_the_same_way_each_time(tmp_path):
    first, second = make_trainer(tmp_path), make_trainer(tmp_path)
    assert len(first.train_dataset) == 22 and len(first.activation_dataset) == 2
    assert first.activation_dataset.indices == second.activation_dataset.indices
    rows = [*first.train_dataset, *first.activation_dataset]
    assert sorted(map(str, rows)) == sorted(map(str, examples()))


def test_a_hub_dataset_keeps_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "note": "unused"} for row in examples()]
    trainer = make_trainer(tmp_path, train_dataset=datasets.Dataset.from_list(rows))
    assert isinstance(trainer.activation_dataset, datasets.Dataset)
    assert (len(trainer.train_dataset), len(trainer.activation_dataset)) == (22, 2)
    assert trainer.train().global_step == 6


def test_given_activation_data_leave_the_training_data_whole(tmp_path):
    trainer = make_trainer(tmp_path, activation_dataset=examples(4, seed=9))
    assert len(trainer.train_dataset) == 24
    assert trainer.train().global_step == 6


def test_the_mixin_serves_trl(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from milora.train import BilevelTrainerMixin

    class Trainer(BilevelTrainerMixin, trl.SFTTrainer):
        pass

    model = milora.attach(tiny_llama(), milora.MiLoRAConfig(rank=4))
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, save_strategy="no",
        report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(sums(24)),
        processing_class=byte_tokenizer(),
        activation_lr=1e-2,
    )
    before = [theta.clone() for theta in milora.activation_parameters(model)]
    trainer.train()
    assert trainer._activation_stream.position == 3
    after = milora.activation_parameters(model)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- resuming -----------------------------------------------------------------------------------


def _train_to(output, steps: int, **options) -> MiLoRATrainer:
    """Six steps are planned; stop after `steps`, as an interrupted run would."""
    trainer = make_trainer(
        output, arguments={"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}, **options
    )

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= steps

    trainer.add_callback(Stop())
    return trainer


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole = _train_to(tmp_path / "whole", 6)
    whole.train()
    _train_to(tmp_path / "parts", 4).train()  # one step past its checkpoint: those bits are lost
    resumed = _train_to(tmp_path / "parts", 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-3"))
    expected, actual = snapshot(whole.model), snapshot(resumed.model)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert resumed._activation_stream.position == whole._activation_stream.position == 6
    mine = whole.activation_optimizer.state_dict()["state"]
    theirs = resumed.activation_optimizer.state_dict()["state"]
    for index in mine:
        assert all(torch.equal(mine[index][key], theirs[index][key]) for key in mine[index])
    for name in ("whole", "parts"):
        _, lines = read_metrics(tmp_path / name / "metrics.jsonl")
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_holds_the_adapter_and_a_plain_state(tmp_path):
    _train_to(tmp_path, 3).train()
    folder = tmp_path / "checkpoint-3"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", ACTIVATION_STATE} <= names
    assert not any(name.startswith("model") for name in names)
    state = torch.load(folder / ACTIVATION_STATE, weights_only=True)
    assert state["position"] == 3 and state["version"] == 1


def test_a_checkpoint_without_theta_is_no_start_for_a_bilevel_run(tmp_path):
    _train_to(tmp_path, 3).train()
    checkpoint = tmp_path / "checkpoint-3"
    state = torch.load(checkpoint / ACTIVATION_STATE, weights_only=True)
    torch.save({**state, "version": 99}, checkpoint / ACTIVATION_STATE)
    with pytest.raises(ValueError, match="must have version 1, got 99"):
        _train_to(tmp_path, 6).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / ACTIVATION_STATE).unlink()
    with pytest.raises(FileNotFoundError, match="saved without bi-level training"):
        _train_to(tmp_path, 6).train(resume_from_checkpoint=str(checkpoint))


# ---- several processes --------------------------------------------------------------------------

WORKER = """
import json, os, sys, torch
torch.set_num_threads(1)
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import milora
from text_model import make_trainer
trainer = make_trainer(
    {output!r} + os.environ["RANK"],
    arguments={{"max_steps": 3, "per_device_train_batch_size": {batch}}},
    config=milora.MiLoRAConfig(rank=4),
)
trainer.train()
theta = torch.cat([p.detach() for p in milora.activation_parameters(trainer.model)])
rest = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
torch.save([theta, rest], {output!r} + os.environ["RANK"] + ".pt")
"""


def _launch(output, world_size: int, batch: int) -> list:
    code = WORKER.format(root=str(ROOT), output=str(output), batch=batch)
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611",
        "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out[-3000:]
    return [torch.load(f"{output}{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.mark.slow
def test_two_processes_do_the_step_of_one(tmp_path):
    first, second = _launch(tmp_path / "two", 2, batch=2)
    (alone,) = _launch(tmp_path / "one", 1, batch=4)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    start = torch.cat([p.detach() for p in milora.activation_parameters(_fresh())])
    assert not torch.equal(first[0], start)
    # AdamW's first steps divide by a gradient's own size: rounding in a tiny one may flip its sign.
    close = torch.isclose(first[0], alone[0], rtol=1e-2, atol=2e-3)
    assert close.float().mean() > 0.9


def _fresh():
    return milora.attach(tiny_llama(), milora.MiLoRAConfig(rank=4))
