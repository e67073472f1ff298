"""DDP and FSDP2 with two gloo processes: gradients are those of one process on the joint batch.

The ranks route to different experts, so neither wrapper may wait for a gradient that never comes.
Two processes start once, run every case and write down what differed; each test reads its case.
"""

from __future__ import annotations

import json
import os
import socket
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.distributed as dist
import transformers.trainer as trainer_module
from test_checkpointing import checkpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

import milora
from milora.attach import runtime_of

WORLD = 2
TIMEOUT = timedelta(seconds=60)  # a rank that waits for a gradient in vain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]


@dataclass(frozen=True)
class Case:
    """`checkpointing` is None (off) or whether it is reentrant; `forwards` precede one backward."""

    wrapper: str
    family: str = "llama"
    checkpointing: bool | None = None
    forwards: int = 1
    theta: bool = False
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        modes = {None: "plain", False: "checkpointing", True: "reentrant"}
        parts = [self.wrapper, self.family, modes[self.checkpointing], f"{self.forwards}x"]
        parts += ["theta"] * self.theta + [str(value) for value in self.options.values()]
        return "-".join(parts)


# Up to 5.17 transformers runs FSDP2's own hooks inside the recomputed region. With reentrant
# autograd and two forwards they leave gradients of one rank, on the bare model just the same.
HOOKS_OUTSIDE = "__init_subclass__" in GradientCheckpointingLayer.__dict__
CASES = [
    *(Case("ddp", checkpointing=c) for c in (None, False, True)),
    *(Case("fsdp2", checkpointing=c, forwards=n) for c in (None, False) for n in (1, 2)),
    *(Case("fsdp2", checkpointing=True, forwards=n) for n in ((1, 2) if HOOKS_OUTSIDE else (1,))),
    *(Case(w, family="t5", checkpointing=c) for w in ("ddp", "fsdp2") for c in (None, False)),
    *(Case(w, options={"expert": e}) for w in ("ddp", "fsdp2") for e in ("dora", "lora_mini")),
    *(Case("fsdp2", theta=True, checkpointing=c) for c in (None, False)),
    Case("ddp", options={"router": False}),
]
BY_TRAINER = Case("fsdp2")


def make(case: Case) -> nn.Module:
    dropout = {"dropout_rate": 0.0} if case.family == "t5" else {}
    config = {"rank": 4, "top_k": 1, "balance_coef": 0.5, **case.options}
    model = tiny_models.build(case.family, **dropout)
    tiny_models.randomize(milora.attach(model, milora.MiLoRAConfig(**config))).train()
    checkpoint(model, case.checkpointing)
    return model


def batches(case: Case) -> list[dict[str, Tensor]]:
    """Joint batches of four rows; the first two rows are rank 0's.

    T5's loss is a mean over each rank's labels, so its rows have as many of them.
    """
    found = []
    for index in range(case.forwards):
        prompt, answers = 6 + index, [4, 4, 4, 4] if case.family == "t5" else [3, 7, 5, 2]
        inputs = tiny_models.left_padded([prompt + n for n in answers], side="right", seed=index)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :prompt] = -100
        found.append({**inputs, "labels": labels})
    return found


def train(case: Case, model: nn.Module, rank: int | None) -> None:
    """Leave the gradients of the case: of Ω, or (`theta`) of Θ after one backward of Ω."""
    forward_backward(case, model, rank)
    if case.theta:  # as bi-level training alternates
        model.zero_grad(set_to_none=True)
        with milora.activation_phase(model):
            forward_backward(case, model, rank)


def forward_backward(case: Case, model: nn.Module, rank: int | None) -> None:
    """One backward over all batches: of a rank's rows, or (None) of all rows."""
    loss = 0.0
    for batch in batches(case):
        num_items = (batch["labels"] != -100).sum()
        if rank is not None:
            batch = {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}
        extra = {"num_items_in_batch": num_items} if case.family == "llama" else {}
        term = model(**batch, **extra, use_cache=False).loss
        # As Trainer does it: the wrapper's mean over ranks must become a sum.
        loss = loss + (term * WORLD if rank is not None and extra else term)
    loss.backward()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def results(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name (zeros count as none), and the shares of the balance loss."""
    found = {
        name.removeprefix("module."): full(p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    found = {name: gradient for name, gradient in found.items() if gradient.any()}
    for window in runtime_of(model).windows.values():
        found |= {f"shares of {i}": torch.tensor(s) for i, s in enumerate(window.shares())}
    return found


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What differs by more than sums of float32 in another order may."""
    wrong = [f"only in one: {name}" for name in actual.keys() ^ expected.keys()]
    for name in actual.keys() & expected.keys():
        scale = expected[name].abs().max().item()
        error = (actual[name] - expected[name]).abs().max().item()
        if error > 2e-5 * scale + 1e-7:
            wrong.append(f"{name}: error {error:.1e} at scale {scale:.1e}")
    return wrong


# ---- in the two processes -----------------------------------------------------------------------


def shard(model: nn.Module) -> nn.Module:
    for block in runtime_of(model).blocks:
        fully_shard(block.module)
    return fully_shard(model)


def run_case(case: Case, rank: int, expected: dict[str, Tensor], folder: Path) -> list[str]:
    model = make(case)
    wrapped = shard(model) if case.wrapper == "fsdp2" else DistributedDataParallel(model)
    with milora.record_routing(model) as states:
        train(case, wrapped, rank)
    if case.options.get("router", True) and not different_experts(states[0]):
        return ["both ranks route to the same experts, so this case shows nothing"]
    save(case, wrapped, rank, folder / str(case))
    return differences(results(wrapped), expected)


def save(case: Case, wrapped: nn.Module, rank: int, folder: Path) -> None:
    """By `milora.save`, and under FSDP2 once by Trainer, as if accelerate had set it up."""
    if case != BY_TRAINER:
        milora.save(wrapped, folder, is_main_process=rank == 0)
        return
    arguments = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model=wrapped, args=arguments)
    trainer.is_fsdp_enabled = True
    trainer.save_model()
    trainer_module.save_fsdp_model(None, None, wrapped, str(folder))


def different_experts(state: milora.RoutingState) -> bool:
    used = (state.gates > 0).any(1).int()
    everywhere = [torch.empty_like(used) for _ in range(WORLD)]
    dist.all_gather(everywhere, used)
    return not torch.equal(*everywhere)


def process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=TIMEOUT)
    reports: dict[str, list[str]] = {}
    for case in CASES:
        expected = torch.load(Path(folder, f"{case}.pt"), weights_only=True)
        try:
            reports[str(case)] = run_case(case, rank, expected, Path(folder))
        except Exception:
            reports[str(case)] = [traceback.format_exc()]
        Path(folder, f"rank{rank}.json").write_text(json.dumps(reports))
    dist.destroy_process_group()


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the two processes left `rank<i>.json` and an adapter per case."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("distributed")
    for case in CASES:
        model = make(case)
        train(case, model, None)
        torch.save(results(model), folder / f"{case}.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, args=(port, str(folder)), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_one_process(folder, case):
    for rank in range(WORLD):
        report = json.loads((folder / f"rank{rank}.json").read_text())
        assert not report[str(case)], f"rank {rank}:\n" + "\n".join(report[str(case)])


@pytest.mark.parametrize("case", [c for c in CASES if c.wrapper == "fsdp2"], ids=str)
def test_save_writes_whole_tensors(folder, case):
    expected = make(case)
    bare = tiny_models.build(case.family)
    loaded = milora.load(bare, folder / str(case))
    theirs = dict(loaded.named_parameters())
    for name, parameter in expected.named_parameters():
        assert torch.equal(theirs[name], parameter), name
    if case == BY_TRAINER:
        names = {path.name for path in (folder / str(case)).iterdir()}
        assert names == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "milora_balance_window.json",
            "training_args.bin",
        }
