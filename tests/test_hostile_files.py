"""Adapter files are hostile input: an error lists what is wrong, and the model is unchanged."""

from __future__ import annotations

import copy
import gc
import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_adapters import OPTIONS, assert_unchanged, attached, logits, snapshot
from tiny_models import build

import milora
from milora import adapter_files
from milora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, sha256_of


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
    "pattern_endless": ({"target_modules": ["(q|q_proj)+x"]}, "can take forever"),
    "pattern_nested": ({"rank_pattern": {"(.*a)*b": 2}}, "can take forever"),
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


@pytest.mark.parametrize("how", ["cut", "emptied", "grown"])
def test_cut_off_while_it_is_read(tmp_path, saved, monkeypatch, how):
    """Of a file that is mapped into memory this would end the process, without a word."""
    write(tmp_path, *saved)
    weights = tmp_path / WEIGHTS_FILE
    get_tensor, reads = adapter_files.OpenWeights.get_tensor, []

    def slowly(self, name):
        reads.append(name)
        if len(reads) == 3:
            size = weights.stat().st_size
            os.truncate(weights, {"cut": size // 2, "emptied": 0, "grown": 2 * size}[how])
        return get_tensor(self, name)

    monkeypatch.setattr(adapter_files.OpenWeights, "get_tensor", slowly)
    model = build("llama")
    before = snapshot(model)
    if how == "grown":  # what was there still is
        milora.load(model, tmp_path)
        return
    with pytest.raises(milora.AdapterError, match="was changed while it was read"):
        milora.load(model, tmp_path)
    assert_unchanged(model, before)


def test_reading_gives_all_memory_back(tmp_path, saved):
    """safetensors' own reading leaks two integers with each tensor."""
    write(tmp_path, *saved)

    def read() -> None:
        with adapter_files.open_weights(tmp_path, None) as file:
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118

    for _ in range(5):
        read()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(20):
        read()
    gc.collect()
    assert sys.getallocatedblocks() - before < 20 * len(saved[1]) / 2


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
