"""Saving and loading: round trips of every kind, and crashes in the middle of a save."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_adapters import OPTIONS, attached, logits
from tiny_models import build, randomize

import milora
from milora import MiLoRAConfig, adapter_files
from milora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, sha256_of
from milora.adapters import load_weights, read_folder

# ---- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", OPTIONS)
def test_round_trip(tmp_path, case, dtype):
    model = attached(OPTIONS[case], dtype)
    milora.save(model, tmp_path)
    loaded = milora.load(build("llama").to(dtype), tmp_path, "other")
    assert torch.equal(logits(loaded), logits(model))
    assert milora.adapters(loaded)["other"] == milora.adapters(model)["default"]
    assert not any(p.requires_grad for p in loaded.parameters())
    milora.save(loaded, tmp_path / "again", "other")
    assert sha256_of(tmp_path / WEIGHTS_FILE) == sha256_of(tmp_path / "again" / WEIGHTS_FILE)


def test_a_save_warns_of_what_load_refuses(tmp_path):
    model = attached(OPTIONS["dora"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"refused by milora\.load: .*up_proj.*holds NaN or Inf"):
        milora.save(model, tmp_path)
    with pytest.raises(milora.AdapterError, match="holds NaN or Inf"):
        milora.load(build("llama"), tmp_path)


def test_trainable_and_several_adapters(tmp_path):
    model = attached(OPTIONS["dora"])
    milora.attach(model, MiLoRAConfig(rank=2, **OPTIONS["lora_mini"]), "mini")
    randomize(model)
    by_name = {}
    for name in ("default", "mini"):
        milora.save(model, tmp_path / name, name)
        milora.set_adapter(model, name)
        by_name[name] = logits(model)
    loaded = milora.load(build("llama"), tmp_path / "mini", "mini", trainable=True)
    assert torch.equal(logits(loaded), by_name["mini"])
    trainable = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trainable and all(".mini." in name for name in trainable)
    milora.load(loaded, tmp_path / "default", "default")
    assert torch.equal(logits(loaded), by_name["default"])
    assert trainable == {n for n, p in loaded.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="there is an adapter 'mini' already"):
        milora.load(loaded, tmp_path / "mini", "mini")


def test_files_are_peft_layout(tmp_path):
    model = attached({"expert": "dora"})
    milora.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    keys = load_file(tmp_path / WEIGHTS_FILE)
    block = "base_model.model.model.layers.1"
    for key in ("mlp.up_proj.lora_A.weight", "mlp.up_proj.lora_magnitude_vector"):
        assert f"{block}.{key}" in keys
    assert keys[f"{block}.milora_router.w_r"].shape == (7, 32)


def test_an_upload_is_refused_and_not_forgotten(tmp_path):
    with pytest.raises(ValueError, match="push_to_hub is not supported"):
        attached(OPTIONS["dora"]).save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_load_weights_keeps_parameters_and_checks_the_configuration(tmp_path):
    model = attached(seed=1)
    milora.save(model, tmp_path)
    other = attached(seed=2)
    before = {name: id(p) for name, p in other.named_parameters()}
    load_weights(other, tmp_path, "default")
    assert before == {name: id(p) for name, p in other.named_parameters()}
    assert torch.equal(logits(other), logits(model))
    wider = attached({"top_k": 2})
    with pytest.raises(milora.AdapterError, match=r"configured otherwise: top_k 3 \(here 2\)"):
        load_weights(wider, tmp_path, "default")


# ---- crashes ------------------------------------------------------------------------------------

# Every call through which a save touches the disk. `save_file` and `write_text` are also killed
# half way through their output.
STEPS = {
    adapter_files: ("save_file",),
    os: ("open", "fsync", "close", "replace", "unlink"),
    Path: ("mkdir", "write_text", "unlink"),
}


def killed_save(folder: Path, tensors: dict, config: dict, step: int, half: bool) -> bool:
    """`write_folder` in a child process that dies at call number `step`; whether it was reached."""
    child = os.fork()
    if child == 0:
        calls = 0

        def deadly(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == step:
                    if half and function.__name__ in ("save_file", "write_text"):
                        function(*args, **kwargs)
                        target = args[1] if function.__name__ == "save_file" else args[0]
                        os.truncate(target, os.path.getsize(target) // 2)
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        for owner, names in STEPS.items():
            for name in names:
                setattr(owner, name, deadly(getattr(owner, name)))
        adapter_files.write_folder(folder, tensors, config)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("half", [False, True], ids=["before", "half_way"])
@pytest.mark.parametrize("existing", [True, False], ids=["over_an_adapter", "new_folder"])
def test_killed_save_leaves_the_old_adapter_or_none(tmp_path, existing, half):
    small = {"target_modules": ["q_proj"]}
    adapters = {"old": attached(small, seed=1), "new": attached(small, seed=2)}
    for name, model in adapters.items():
        milora.save(model, tmp_path / name)
    saves = {name: load_file(tmp_path / name / WEIGHTS_FILE) for name in adapters}
    config = json.loads((tmp_path / "new" / CONFIG_FILE).read_text())
    bare = build("llama")
    seen, step = [], 1
    while True:
        folder = tmp_path / f"step{step}"
        if existing:
            milora.save(adapters["old"], folder)
        if not killed_save(folder, saves["new"], config, step, half):
            break
        try:
            _, found = read_folder(bare, folder)
        except FileNotFoundError:
            seen.append("none")
        else:
            seen += [
                name
                for name, want in saves.items()
                if all(torch.equal(found[key], want[key]) for key in want)
            ]
        milora.save(adapters["new"], folder)  # leftovers of a killed save are in nobody's way
        assert read_folder(bare, folder)
        step += 1
    assert len(seen) == step - 1 >= 15
    # In this order and nothing else: old, then none, then (its config in place) the new one.
    start = "old" if existing else "none"
    order = [start, "none", "new"]
    assert [order.index(state) for state in seen] == sorted(order.index(state) for state in seen)
    assert seen[0] == start and seen[-1] == "new" and "none" in seen


@pytest.mark.parametrize("step", ["save_file", "replace", "fsync"])
def test_failing_save_cleans_up(tmp_path, monkeypatch, step):
    model = attached()
    milora.save(model, tmp_path)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(adapter_files if step == "save_file" else os, step, full)
    with pytest.raises(OSError, match="No space left"):
        milora.save(model, tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_weights_of_another_save_are_no_mixture(tmp_path):
    milora.save(attached(seed=1), tmp_path / "a")
    milora.save(attached(seed=2), tmp_path / "b")
    os.replace(tmp_path / "b" / WEIGHTS_FILE, tmp_path / "a" / WEIGHTS_FILE)
    with pytest.raises(milora.AdapterError, match="sha256"):
        milora.load(build("llama"), tmp_path / "a")
