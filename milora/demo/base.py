"""The frozen base of the demo: a small Llama, pre-trained on the training topics and cached."""

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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from milora.demo.corpus import Corpus
from milora.demo.tokenizer import train_tokenizer


@dataclass(frozen=True)
class BaseConfig:
    """Shape and pre-training of the base. Every field is part of the cache key.

    The shape was chosen by experiment: 216 CPU seconds took 256 hidden × 6 layers to a held-out
    loss of 1.55 nats per character, 169 CPU seconds took 128 × 4 to 1.31.
    """

    vocab_size: int = 1024
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 352
    steps: int = 1100
    batch_size: int = 12
    window: int = 96
    echo_share: float = 0.5
    learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class Base:
    """The model, its tokenizer, the folder both came from, and whether the cache had them."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    from_cache: bool


def load_or_pretrain(
    corpus: Corpus,
    config: BaseConfig,
    cache: Path,
    use_cache: bool,
    progress: Callable[[int], None],
) -> Base:
    """Take the base from `cache`, or pre-train it there. `progress` is called after each step.

    With `use_cache=False` the base is trained anew and replaces what the cache had.
    """
    folder = cache / f"demo-base-{_key(corpus, config)}"
    from_cache = use_cache and folder.is_dir()
    if not from_cache:
        _pretrain(corpus, config, folder, progress)
    # Read back also after training, so that a first run and a second one start from equal bits.
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return Base(model.eval().requires_grad_(False), tokenizer, folder, from_cache)


def build_model(config: BaseConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh, random Llama of the configured shape."""
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,  # the usual 0.02 suits wider models; here it learns more slowly
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(llama)


def _key(corpus: Corpus, config: BaseConfig) -> str:
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    digest.update(corpus.train_text().encode())
    return digest.hexdigest()[:16]


def _pretrain(
    corpus: Corpus, config: BaseConfig, folder: Path, progress: Callable[[int], None]
) -> None:
    lines = [text for paragraphs in corpus.train.values() for text in paragraphs]
    tokenizer = train_tokenizer(lines, config.vocab_size)
    stream = torch.tensor(tokenizer(corpus.train_text())["input_ids"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config, tokenizer)
    _train(model, stream, config, progress)

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved in one step: an interrupted run leaves no half a base.
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _train(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    config: BaseConfig,
    progress: Callable[[int], None],
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        fused=True,
    )
    warmup = max(1, config.steps // 16)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        ),
    )
    generator = torch.Generator().manual_seed(config.seed)
    model.train()
    for step in range(config.steps):
        batch = _windows(stream, config, generator)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step + 1)


def _windows(stream: torch.Tensor, config: BaseConfig, generator: torch.Generator) -> torch.Tensor:
    """A batch of random windows [batch_size, window] int64; a share of them repeats itself.

    Text of 290 kB repeats itself too little for so short a pre-training to learn to copy, and the
    tasks need a base that can: so an echo window says its first few tokens over and over. Their
    number differs from window to window, else looking a fixed way back would do.
    """
    starts = torch.randint(len(stream) - config.window, (config.batch_size, 1), generator=generator)
    batch = stream[starts + torch.arange(config.window)]
    for row in range(round(config.echo_share * config.batch_size)):
        period = int(torch.randint(8, config.window // 2 + 1, (), generator=generator))
        batch[row] = batch[row, torch.arange(config.window) % period]
    return batch
