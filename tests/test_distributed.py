"""Two gloo processes against one: DDP and FSDP2 give the gradients of the joint batch."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_routing import VOCAB, make_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import milora

WORLD = 2
ROWS, COLUMNS = 4, 12
PROMPTS = (4, 9, 6, 3)  # so that the ranks hold different numbers of answer tokens
SLOW = pytest.mark.slow
CASES = [
    ("ddp", False, "lora"),
    ("fsdp2", True, "dora"),
    pytest.param("ddp", True, "dora", marks=SLOW),
    pytest.param("ddp", True, "lora", marks=SLOW),
    pytest.param("fsdp2", False, "lora", marks=SLOW),
    pytest.param("fsdp2", True, "lora", marks=SLOW),
]


def build(checkpointing: bool, expert: str) -> torch.nn.Module:
    # top_k 1 of 7: some experts are on for one rank's prompts only, and some for nobody's.
    model = make_model(top_k=1, expert=expert, balance_coef=0.5)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def joint_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (ROWS, COLUMNS), generator=generator)
    labels = ids.clone()
    for row, length in enumerate(PROMPTS):
        labels[row, :length] = -100
    return {"input_ids": ids, "labels": labels}


def backward(model: torch.nn.Module, batch: dict[str, torch.Tensor], scale: int) -> None:
    """As Trainer does: a sum over all ranks' labels, times the ranks that will be averaged over."""
    count = (joint_batch()["labels"][:, 1:] != -100).sum()
    (model(**batch, num_items_in_batch=count, use_cache=False).loss * scale).backward()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name.removeprefix("module.")] = whole
    return found


def work(rank: int, port: int, wrapper: str, checkpointing: bool, expert: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    model = build(checkpointing, expert)
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    rows = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    batch = {key: value[rows] for key, value in joint_batch().items()}
    backward(wrapped, batch, WORLD)
    found = gradients(model)
    milora.save(model, f"{folder}/adapter", is_main_process=rank == 0)
    if rank == 0:
        report = milora.balance_report(model)
        torch.save({"gradients": found, "share": report["share"]}, f"{folder}/out.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("wrapper", "checkpointing", "expert"), CASES)
def test_gradients_equal_one_process(wrapper, checkpointing, expert, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, wrapper, checkpointing, expert, str(tmp_path)), nprocs=WORLD)
    got = torch.load(tmp_path / "out.pt", weights_only=True)

    model = build(checkpointing, expert)
    backward(model, joint_batch(), 1)
    want = gradients(model)
    assert got["gradients"].keys() == want.keys()
    unused = 0
    for name, gradient in want.items():
        torch.testing.assert_close(got["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
        unused += int(gradient.abs().max() == 0)
    assert 0 < unused < len(want), "some experts were on for nobody"
    assert got["share"] == milora.balance_report(model)["share"], "shares are pooled over ranks"
    check_saved(tmp_path / "adapter", model)


def check_saved(folder: Path, model: torch.nn.Module) -> None:
    """What two ranks saved together is the whole adapter."""
    milora.save(model, folder.with_name("one"))
    mine, theirs = (
        load_file(path / "adapter_model.safetensors") for path in (folder.with_name("one"), folder)
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
