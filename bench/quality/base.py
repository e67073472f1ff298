"""The frozen base: a small Llama, pre-trained on the simple forms only, and cached by a key."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from milora.data import CompletionCollator, Encoder, encode_examples
from milora.demo.base import Base, build_model
from quality.simple_forms import FORMS, all_templates, pretraining_examples
from quality.words import make_tokenizer

MAX_LENGTH = 64  # tokens; the longest prompt has about 40


@dataclass(frozen=True)
class BaseConfig:
    """Shape and pre-training of a base. Every field is part of the cache key."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    steps: int
    batch_size: int
    num_examples: int
    learning_rate: float
    seed: int = 0


def load_or_pretrain(
    config: BaseConfig, cache: Path, device: str, progress: Callable[[int, float], None]
) -> Base:
    """Take the base from `cache`, or pre-train it there; `progress` gets each step and its loss."""
    folder = cache / f"quality-base-{_key(config)}"
    from_cache = folder.is_dir()
    if not from_cache:
        _pretrain(config, folder, device, progress)
    # Read back also after training, so that a first run and a second one start from equal bits.
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True).to(device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return Base(model.eval().requires_grad_(False), tokenizer, folder, from_cache)


def _key(config: BaseConfig) -> str:
    """Changes with the shape, with the steps, and with what the base is taught."""
    sample = [(e.prompt, e.completion) for e in pretraining_examples(20 * len(FORMS), config.seed)]
    text = json.dumps([asdict(config), sample, all_templates()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _pretrain(
    config: BaseConfig, folder: Path, device: str, progress: Callable[[int, float], None]
) -> None:
    tokenizer = make_tokenizer(all_templates())
    examples = pretraining_examples(config.num_examples, config.seed)
    rows = encode_examples(examples, Encoder(tokenizer), MAX_LENGTH).rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config, tokenizer).to(device)
    _train(model, rows, CompletionCollator(tokenizer.pad_token_id), config, device, progress)

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved in one step: an interrupted run leaves no half a base.
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _train(
    model: nn.Module,
    rows: list[dict[str, list[int]]],
    collate: CompletionCollator,
    config: BaseConfig,
    device: str,
    progress: Callable[[int, float], None],
) -> None:
    """Only answers have labels: the values of a prompt are random, and no capacity goes there."""
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    warmup = max(1, config.steps // 20)

    def shape(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / config.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    generator = torch.Generator().manual_seed(config.seed)
    model.train()
    for step in range(config.steps):
        picked = torch.randint(len(rows), (config.batch_size,), generator=generator).tolist()
        batch = {k: v.to(device) for k, v in collate([rows[i] for i in picked]).items()}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step + 1, loss.item())
