"""The README's Python code runs as it stands, in order, against a model folder on disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def model_folder(tmp_path):
    """A tiny random Llama with a byte-level tokenizer, saved as `my-model`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(tmp_path / "my-model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(vocab),
            pad_token_id=0,
            eos_token_id=1,
        )
    ).save_pretrained(tmp_path / "my-model")
    return tmp_path


def test_the_code_in_the_readme_runs(model_folder, monkeypatch, capsys):
    monkeypatch.chdir(model_folder)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    exec(compile("\n".join(blocks), str(README), "exec"), {"__name__": "readme"})
    assert "ParameterCount(trainable=" in capsys.readouterr().out
    for name in ("my-adapter", "plain-lora", "route.safetensors"):
        assert (model_folder / name).exists()
