"""2,400 damaged adapter folders: each is refused in words, or loaded whole; never half.

Every folder goes to `milora.load` and to an `AdapterPool`, which must agree. A failure prints the
seed and the kinds of damage; the same seed makes the same folder again.
"""

from __future__ import annotations

import random
import resource
import time
import warnings
from pathlib import Path

import pytest
import torch
from adapter_mutations import Folder, mutated
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from saved_adapters import LENGTH, OPTIONS, assert_unchanged, attached, snapshot
from tiny_models import build, prompts

import milora
from milora.adapter_files import WEIGHTS_FILE
from milora.adapter_validation import key_of
from milora.adapters import adapter_parameters

FOLDERS = 400  # of each kind
KINDS = ("plain", "dora", "lora_mini", "no_router", "patterns", "peft")
REFUSALS = (milora.AdapterError, FileNotFoundError, ValueError)
MEMORY_GROWTH = 256 << 20
SECONDS = 20.0  # of one load, on a machine that is busy with something else


def save_original(kind: str, folder: Path) -> None:
    if kind == "peft":
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
        get_peft_model(build("llama"), config).save_pretrained(folder)
    else:
        milora.save(attached(OPTIONS[kind]), folder)


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def verdict(function, *args) -> Exception | None:
    """What `function` refused with; anything that is no refusal comes out."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd patterns and dtypes
            function(*args)
        error = None
    except REFUSALS as refusal:
        assert str(refusal)
        error = refusal
    assert time.monotonic() - start < SECONDS
    return error


def assert_whole(model, name: str, folder: Path) -> None:
    """Every tensor of the adapter is the one in the file."""
    theirs = {key_of(key): value for key, value in load_file(folder / WEIGHTS_FILE).items()}
    mine = adapter_parameters(model, name)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key].float()) for key in mine)


def tables_of(pool, slot: int) -> list[torch.Tensor]:
    """What kernels see: the rows of `slot`, and that no other slot has an expert."""
    names = ("offsets", "ranks", "scales", "router_offsets", "router_codes")
    rows = [getattr(tables, name)[slot].clone() for tables in pool.tables for name in names]
    return [*rows, *(tables.ranks.count_nonzero() for tables in pool.tables)]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_folders(kind, tmp_path):
    original, folder = tmp_path / "original", tmp_path / "folder"
    save_original(kind, original)
    folder.mkdir()
    good = Folder.read(original)
    bare, served = build("llama"), build("llama")
    milora.attach(bare, milora.MiLoRAConfig(rank=2), "mine")
    before = snapshot(bare)
    ids = prompts(2, LENGTH)
    names = ["tenant", None]
    with milora.AdapterPool(served, device_bytes=4 << 20, host_bytes=4 << 20) as pool:
        pool.register("tenant", original)
        pool.pin("tenant")

        def logits() -> torch.Tensor:
            with torch.no_grad():
                return served(ids, adapter_names=names, use_cache=True).logits

        slot = pool.entry("tenant").slot
        want, tables, stats = logits(), tables_of(pool, slot), pool.statistics()
        memory, accepted = peak_memory(), 0
        for seed in range(FOLDERS):
            rng = random.Random(f"{kind} {seed}")
            damaged = mutated(rng, good)
            damaged.write(folder)
            try:
                refused = verdict(milora.load, bare, folder, "new")
                if refused is None:
                    accepted += 1
                    assert_whole(bare, "new", folder)
                    milora.delete_adapter(bare, "new")
                    milora.set_adapter(bare, "mine")
                assert_unchanged(bare, before | {"values": dict(before["values"])})

                refused_too = verdict(pool.register, "new", folder)
                if refused_too is None:
                    refused_too = verdict(pool.load, "new")
                    assert pool.is_resident("new") == (refused_too is None)
                    pool.unregister("new")
                assert (refused is None) == (refused_too is None), (refused, refused_too)
                assert list(pool) == ["tenant"]
                now = pool.statistics()
                assert (now.device_used, now.resident) == (stats.device_used, stats.resident)
                assert now.host_used <= now.host_bytes
                assert all(map(torch.equal, tables_of(pool, slot), tables))
                if seed % 50 == 0:
                    assert torch.equal(logits(), want)
            except BaseException as error:
                error.add_note(f"kind {kind!r}, seed {seed}: {', '.join(damaged.log)}")
                raise
        assert torch.equal(logits(), want)
    assert 0 < accepted < FOLDERS // 3, "damage should mostly be seen, and not always be there"
    assert peak_memory() - memory < MEMORY_GROWTH
