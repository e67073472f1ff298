"""`milora methods`, and that docs/methods.md says what it prints."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import build

import milora
from milora import MiLoRAConfig
from milora.cli import main
from milora.cli.methods import LLAMA_2_7B, count_kind, llama_modules
from milora.experts import REGISTRY

DOCS = Path(__file__).parents[1] / "docs" / "methods.md"


def run_json(capsys, *argv: str) -> dict:
    assert main(["methods", *argv, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def llama_2_7b(num_blocks: int):
    with torch.device("meta"):
        config = transformers.LlamaConfig(num_hidden_layers=num_blocks)
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", REGISTRY)
def test_counts_are_those_of_an_attached_adapter(kind, capsys):
    """At the Llama-2-7B shape, two blocks, on the meta device."""
    modules = llama_modules(**{**LLAMA_2_7B, "layers": 2})
    count = count_kind(kind, modules, 32)
    config = MiLoRAConfig(rank=32, expert=kind)
    if count.refused:
        with pytest.raises(ValueError, match=f"{kind}: rank 32 on a 4096 x 4096 module"):
            milora.attach(llama_2_7b(2), config)
        return
    model = milora.attach(llama_2_7b(2), config)
    parameters = milora.count_parameters(model)
    assert parameters.experts == count.trained
    result = run_json(capsys, "--layers", "2")
    routing = parameters.router + parameters.pooler + parameters.activation
    assert result["router"] == routing
    listed = {row["kind"]: row["trained"] for row in result["kinds"]}
    assert listed[kind] == count.trained


def test_lora_mini_is_at_least_twenty_times_smaller():
    modules = llama_modules(**LLAMA_2_7B)
    lora, mini = (count_kind(name, modules, 32) for name in ("lora", "lora_mini"))
    assert lora.trained == 79_953_920 and mini.trained == 917_504
    assert mini.trained * 20 <= lora.trained and mini.saved == mini.trained


def test_the_default_shape_is_quick(capsys):
    started = time.perf_counter()
    result = run_json(capsys)
    assert time.perf_counter() - started < 20  # nothing of the model's size is made
    assert result["modules"] == 32 * 7 and len(result["kinds"]) == len(REGISTRY)


def test_the_docs_table():
    modules = llama_modules(**LLAMA_2_7B)
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \| `test_[^|]+\|$", DOCS.read_text(), re.M)
    stated = {kind: trained.strip() for kind, trained in rows if kind in REGISTRY}
    assert list(stated) == list(REGISTRY)
    for kind, trained in stated.items():
        count = count_kind(kind, modules, 32)
        if count.refused:
            rank = re.search(r"update of rank (\d+)", count.refused).group(1)
            assert trained == f"rank {rank}: refused"
        else:
            assert trained == f"{count.trained:,}", kind
    for name in re.findall(r"`(test_\w+\.py)`", DOCS.read_text()):
        assert (Path(__file__).parent / name).is_file(), name


def test_table_on_the_terminal(capsys):
    assert main(["methods"]) == 0
    printed = capsys.readouterr()
    lines = {line.split("│")[1].strip(): line for line in printed.out.splitlines() if "│" in line}
    for kind in REGISTRY:
        assert kind in lines
    assert "917,504" in lines["lora_mini"] and "1.15%" in lines["lora_mini"]
    assert "mora: at most rank 4 here" in printed.err
    assert "randlora: not on these modules" in printed.err
    assert "1,048,960" in printed.err


def test_of_a_model_in_a_folder(tmp_path, capsys):
    model = build("gpt2")
    model.config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "architectures": ["GPT2LMHeadModel"]})
    )
    result = run_json(capsys, "--model", str(tmp_path), "--rank", "4")
    counted = milora.count_parameters(milora.attach(model, MiLoRAConfig(rank=4)))
    by_kind = {row["kind"]: row for row in result["kinds"]}
    assert by_kind["lora"]["trained"] == counted.experts
    assert result["router"] == counted.trainable - counted.experts
    assert by_kind["randlora"]["served_rank"] == 32 and not by_kind["mora"]["refused"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rank", "300"], "--rank must be from 1 to 256"),
        (["--heads", "5"], "--heads must divide --hidden"),
        (["--layers", "0"], "sizes must be positive"),
        (["--model", "/nowhere/at/all"], "no model folder at"),
        (["--model", ".", "--hidden", "8"], "give --model or the sizes, not both"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert main(["methods", *argv]) == 2
    assert message in capsys.readouterr().err
