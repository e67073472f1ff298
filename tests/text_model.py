"""A tiny random Llama, a tokenizer, data and a trainer, so that tests download nothing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import milora
from milora.data import CompletionCollator
from milora.train import MiLoRATrainer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_llama(num_layers: int = 2, hidden: int = 32, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 7 linear modules a block, float32, with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, and <pad>, <s>, </s>, <unk> as ids 0 to 3."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    wrapped.chat_template = chat_template
    return wrapped


def save_tiny_model(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> str:
    """Write the model and the tokenizer as a user's local model folder; returns its path."""
    tiny_llama().save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def sums(count: int) -> list[dict]:
    """Small prompts with answers."""
    return [{"prompt": f"{i}+{i % 7}=", "completion": f"{i + i % 7}"} for i in range(count)]


# ---- training ------------------------------------------------------------------------------------


def examples(count: int = 24, seed: int = 1) -> list[dict]:
    """Random token rows of mixed lengths, each with a prompt and an answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(4, 300, (6 + i % 5,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return rows


def make_trainer(
    output, model=None, config=None, arguments=None, trainer_class=MiLoRATrainer, **options
):
    """A bi-level trainer of six short steps on a tiny model; `arguments` are TrainingArguments."""
    if model is None:
        model = tiny_llama()
        milora.attach(model, config or milora.MiLoRAConfig(rank=4, dropout=0.1))
    arguments = {
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **(arguments or {}),
    }
    options = {"activation_lr": 1e-2, "train_dataset": examples(), **options}
    return trainer_class(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        data_collator=CompletionCollator(),
        **options,
    )
