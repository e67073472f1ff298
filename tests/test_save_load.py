"""Adapters on disk: round trips, crashes in the middle of a save, and hostile files."""

from __future__ import annotations

import copy
import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, prompts, randomize

import milora
from milora import MiLoRAConfig, adapter_files
from milora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, sha256_of
from milora.adapters import load_weights, read_folder

LENGTH = 7
OPTIONS = {
    "plain": {},
    "dora": {"expert": "dora"},
    "lora_mini": {"expert": "lora_mini", "expert_options": {"inner_in": 6, "inner_out": 5}},
    "no_router": {"router": False},
    "bare_router": {"pooler": "mean", "activation": ["relu", "gelu"]},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "mlp.up_proj": 5},
        "alpha_pattern": {"o_proj": 3.0},
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rslora": True,
    },
    # The first pattern that matches wins, so a file must keep their order.
    "pattern_order": {
        "rank_pattern": {"up_proj": 2, "mlp.*": 3},
        "alpha_pattern": {"z?mlp.*": 5.0},
    },
}


def attached(options: dict | None = None, dtype: torch.dtype = torch.float32, seed: int = 1):
    model = build("llama").to(dtype)
    milora.attach(model, MiLoRAConfig(rank=4, **(options or {})))
    return randomize(model, seed=seed)


def logits(model) -> torch.Tensor:
    with milora.prompt_lengths(model, LENGTH), torch.no_grad():
        return model(prompts(2, LENGTH)).logits


def snapshot(model) -> dict:
    """Everything of a model that a failed load could change."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "attributes": set(vars(model)),
        "adapters": dict(milora.adapters(model)),
    }


def assert_unchanged(model, before: dict) -> None:
    after = snapshot(model)
    values, others = after.pop("values"), before.pop("values")
    assert after == before
    assert values.keys() == others.keys()
    assert all(torch.equal(values[name], others[name]) for name in values)


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


# ---- hostile and damaged files ------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("saved")
    milora.save(attached(), folder)
    return json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)


def write(folder: Path, config: dict | str | bytes, tensors: dict | bytes) -> None:
    """A folder as an attacker would write it: nothing checked, the sum right."""
    folder.mkdir(exist_ok=True)
    weights = folder / WEIGHTS_FILE
    if isinstance(tensors, bytes):
        weights.write_bytes(tensors)
    else:
        save_file({key: value.contiguous() for key, value in tensors.items()}, weights)
    if isinstance(config, dict):
        config = json.dumps({**config, "sha256": sha256_of(weights)})
    text = config if isinstance(config, bytes) else config.encode()
    (folder / CONFIG_FILE).write_bytes(text)


A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
W_R = "base_model.model.model.layers.0.milora_router.w_r"


def with_nan(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


TENSORS = {
    "missing": (lambda t: t.pop(A), [f"missing tensor {A}"]),
    "unknown": (lambda t: t.update({"x.y": torch.ones(2)}), ["unknown tensor x.y"]),
    "transposed": (lambda t: t.update({A: t[A].T}), [A, "[4, 32], got [32, 4]"]),
    "rank": (lambda t: t.update({A: t[A][:3]}), ["must be [4, 32], got [3, 32]"]),
    "scalar": (lambda t: t.update({A: torch.tensor(1.0)}), ["got []"]),
    "empty": (lambda t: t.update({A: torch.zeros(0, 32)}), ["got [0, 32]"]),
    "dtype": (lambda t: t.update({A: t[A].double()}), ["got F64"]),
    "integers": (lambda t: t.update({A: t[A].to(torch.int32)}), ["got I32"]),
    "nan": (lambda t: t.update({A: with_nan(t[A], float("nan"))}), [f"{A}: holds NaN or Inf"]),
    "inf": (lambda t: t.update({B: with_nan(t[B], float("-inf"))}), [f"{B}: holds NaN or Inf"]),
    "bf16_inf": (
        lambda t: t.update({B: with_nan(t[B], float("inf")).bfloat16()}),
        [f"{B}: holds NaN or Inf"],
    ),
    "everything": (
        lambda t: (
            t.pop(A),
            t.update({B: t[B] / 0, W_R: t[W_R][:2], "evil": torch.ones(1)}),
        ),
        [f"missing tensor {A}", f"{B}: holds NaN", W_R, "unknown tensor evil", "4 problems"],
    ),
}


@pytest.mark.parametrize("on_attached", [False, True], ids=["bare_model", "attached_model"])
@pytest.mark.parametrize("case", TENSORS)
def test_bad_tensors_are_listed_and_the_model_is_unchanged(tmp_path, saved, case, on_attached):
    change, messages = TENSORS[case]
    config, tensors = saved[0], dict(saved[1])
    change(tensors)
    write(tmp_path, config, tensors)
    model = attached() if on_attached else build("llama")
    before = snapshot(model)
    with pytest.raises(milora.AdapterError) as error:
        milora.load(model, tmp_path, "bad")
    assert all(message in str(error.value) for message in messages)
    assert_unchanged(model, before)


CONFIGS = {
    "list": ([], "peft_type must be"),
    "number": (3, "peft_type must be"),
    "other_method": ({"peft_type": "IA3"}, "peft_type must be MILORA or LORA, got 'IA3'"),
    "odd_method": ({"peft_type": ["LORA"]}, "peft_type must be"),
    "no_version": ({"format_version": None}, "format_version None cannot be read"),
    "future_version": ({"format_version": 2}, "format_version 2 cannot be read by milora"),
    "true_version": ({"format_version": True}, "format_version True"),
    "experts_number": ({"experts": 3}, "experts must map"),
    "experts_strings": ({"experts": {"a": "b"}}, "experts must map"),
    "experts_others": ({"experts": {}}, "its experts are None, those of this model"),
    "checksums": ({"checksums": [1]}, "checksums must map"),
    "rank_text": ({"rank": "4"}, "rank must be an integer in [1, 256], got '4'"),
    "rank_huge": ({"rank": 10**30}, "rank must be an integer"),
    "rank_true": ({"rank": True}, "rank must be an integer"),
    "alpha": ({"alpha": {}}, "alpha must be a number"),
    "alpha_huge": ({"alpha": 10**400}, "alpha must be a number"),
    "top_k": ({"top_k": 0}, "top_k"),
    "router": ({"router": "no"}, "router must be True or False"),
    "targets": ({"target_modules": {"q_proj": 1}}, "target_modules must be"),
    "targets_elsewhere": ({"target_modules": ["lm_head"]}, "matches 'lm_head'"),
    "pattern_syntax": ({"rank_pattern": {"(": 2}}, "is not a pattern"),
    "pattern_overflow": ({"target_modules": ["a{99999999999999}"]}, "is not a pattern"),
    "pattern_deep": ({"target_modules": ["(" * 9000 + ")" * 9000]}, "config cannot be used"),
    "expert": ({"expert": ["lora"]}, "expert must be a name"),
    "expert_unknown": ({"expert": "moe"}, "must be one of lora"),
    "options_list": ({"expert_options": ["inner_in"]}, "expert_options a dict"),
    "options_none": ({"expert_options": None}, "expert_options a dict"),
    "activation": ({"activation": {"rational": 1}}, "activation must be one of"),
    "activation_length": ({"activation": ["gelu"]}, "activation lists 1 blocks"),
    "dropout": ({"dropout": "0.1"}, "dropout must be"),
    "gate": ({"gate": None}, "gate must be one of"),
    "seed": ({"seed": -1}, "seed must be"),
    "unknown_key": ({"exec": "rm"}, "unknown key 'exec'"),
    "missing_key": ({"gate": ...}, "missing key 'gate'"),
    "other_rank": ({"rank": 8}, "shape must be [8, 32], got [4, 32]"),
    "other_expert": ({"expert": "dora"}, "missing tensor"),
    "huge_factors": (
        {"expert": "lora_mini", "expert_options": {"inner_in": 10**12}},
        "missing tensor",
    ),
    "no_sum": ({"sha256": ...}, "sha256 must be a string"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configs(tmp_path, saved, case):
    change, message = CONFIGS[case]
    config, tensors = copy.deepcopy(saved[0]), saved[1]
    write(tmp_path, config, tensors)
    if isinstance(change, dict):
        config["sha256"] = sha256_of(tmp_path / WEIGHTS_FILE)
        config.update(change)
        config = {key: value for key, value in config.items() if value is not ...}
        change = config
    (tmp_path / CONFIG_FILE).write_text(json.dumps(change))
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(milora.AdapterError) as error:
        milora.load(model, tmp_path)
    assert message in str(error.value)
    assert_unchanged(model, before)


JSON = {
    "empty": b"",
    "not_json": b"{",
    "not_utf8": b"\xff\xfe{}",
    "deep": b"[" * 200_000,
    "long_number": b'{"peft_type": ' + b"9" * 5000 + b"}",
    "nan": b'{"peft_type": "MILORA", "format_version": 1, "alpha": NaN}',
    "surrogate": b'{"peft_type": "\\ud800"}',
}


@pytest.mark.parametrize("case", JSON)
def test_bad_json(tmp_path, saved, case):
    write(tmp_path, JSON[case], saved[1])
    with pytest.raises(milora.AdapterError):
        milora.load(build("llama"), tmp_path)


def test_huge_config(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(adapter_files, "MAX_CONFIG_BYTES", 100)
    write(tmp_path, *saved)
    with pytest.raises(milora.AdapterError, match="larger than 100 bytes"):
        milora.load(build("llama"), tmp_path)


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


WEIGHTS = {
    "empty": b"",
    "short": b"\x00\x00",
    "huge_header": header(b"{}", 2**63),
    "large_header": header(b"{}", 10**9),
    "header_no_json": header(b"pickle!!"),
    "header_list": header(b"[]"),
    "offsets_outside": header(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "shape_overflow": header(
        b'{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'
    ),
    "unknown_dtype": header(b'{"x":{"dtype":"F999","shape":[0],"data_offsets":[0,0]}}'),
    "pickle": b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93",
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_bad_weights_files(tmp_path, saved, case):
    write(tmp_path, saved[0], WEIGHTS[case])
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(milora.AdapterError, match="not a readable safetensors file"):
        milora.load(model, tmp_path)
    assert_unchanged(model, before)


def test_truncated_and_flipped(tmp_path, saved):
    write(tmp_path, *saved)
    payload = (tmp_path / WEIGHTS_FILE).read_bytes()
    flipped = bytearray(payload)
    flipped[-1] ^= 1
    for damaged in (payload[:-1], payload[: len(payload) // 2], bytes(flipped)):
        (tmp_path / WEIGHTS_FILE).write_bytes(damaged)
        with pytest.raises(milora.AdapterError, match="its sha256 is not the one"):
            milora.load(build("llama"), tmp_path)


def test_pickles_are_never_read(tmp_path, saved):
    """A pickled `adapter_model.bin` is not even opened."""
    write(tmp_path, *saved)
    (tmp_path / WEIGHTS_FILE).unlink()
    torch.save(saved[1], tmp_path / "adapter_model.bin")
    with pytest.raises(milora.AdapterError, match=f"{WEIGHTS_FILE} is missing"):
        milora.load(build("llama"), tmp_path)


def test_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        milora.load(build("llama"), tmp_path)
    with pytest.raises(ValueError, match="no adapter 'x'"):
        milora.save(attached(), tmp_path, "x")


def test_replaced_while_it_is_read(tmp_path, saved, monkeypatch):
    """A save that comes between opening and closing the weights is noticed by the inode."""
    write(tmp_path, *saved)
    original = adapter_files.safe_open

    def replaced(path, **kwargs):
        copied = tmp_path / "copy"
        copied.write_bytes(Path(path).read_bytes())
        os.replace(copied, path)
        return original(path, **kwargs)

    monkeypatch.setattr(adapter_files, "safe_open", replaced)
    with pytest.raises(milora.AdapterError, match="was replaced while it was read"):
        milora.load(build("llama"), tmp_path)


@pytest.mark.parametrize("other", ["wider", "deeper", "family"])
def test_another_base_model(tmp_path, saved, other):
    write(tmp_path, *saved)
    model = {
        "wider": lambda: build("llama", hidden_size=64),
        "deeper": lambda: build("llama", num_hidden_layers=3),
        "family": lambda: build("gpt2"),
    }[other]()
    before = snapshot(model)
    with pytest.raises(milora.AdapterError, match="does not fit this model"):
        milora.load(model, tmp_path)
    assert_unchanged(model, before)


def test_frozen_factors_are_checked(tmp_path):
    model = attached(OPTIONS["lora_mini"])
    milora.save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    key = "model.layers.0.mlp.up_proj"
    for change in ({key: "0" * 16}, {key: None}):
        checksums = {**config["checksums"], **change}
        changed = {**config, "checksums": {k: v for k, v in checksums.items() if v is not None}}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(changed))
        with pytest.raises(milora.AdapterError, match="frozen factors came out with checksum"):
            milora.load(build("llama"), tmp_path)


def test_a_model_that_was_cast(tmp_path):
    """The file's checksums are of the factors as they are made, not as a cast rounded them."""
    model = attached(OPTIONS["lora_mini"]).bfloat16()
    milora.save(model, tmp_path)
    assert logits(milora.load(build("llama").bfloat16(), tmp_path)).isfinite().all()


def test_a_load_that_fails_late_takes_the_adapter_off(tmp_path, saved, monkeypatch):
    write(tmp_path, *saved)
    model = attached()
    before = snapshot(model)
    module = sys.modules["milora.adapters"]  # `milora.adapters` is the function

    def out_of_memory(*args):
        raise MemoryError

    monkeypatch.setattr(module, "_copy_into", out_of_memory)
    with pytest.raises(MemoryError):
        milora.load(model, tmp_path, "second")
    assert_unchanged(model, before)
    assert milora.adapters(model).keys() == {"default"}
