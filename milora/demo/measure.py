"""The demo's run from text to numbers; `command.py` prints what it returns."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import milora
from milora.cli import console
from milora.data import CompletionCollator, EncodedDataset, Encoder, encode_examples
from milora.demo.base import Base, BaseConfig, load_or_pretrain
from milora.demo.corpus import Corpus, load_corpus
from milora.demo.evaluate import Row, constant_answer, prompt_of, score
from milora.demo.finetune import FinetuneConfig, finetune
from milora.demo.heatmap import draw_heatmap
from milora.demo.methods import BASE, METHODS, MILORA, Budgets, attach, count, equal_budgets
from milora.demo.progress import bar
from milora.demo.routes import observe_routes
from milora.demo.speed import tokens_per_second
from milora.demo.tasks import TASKS, held_out_examples, training_examples

_MAX_LENGTH = 512  # the base's own limit; no window of 24 words comes near it
_ROUTE_TOKENS = 8


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of one run."""

    base: BaseConfig = field(default_factory=BaseConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    rank: int = 32  # the paper's
    held_out_per_task: int = 96
    speed_batch: int = 8
    speed_tokens: int = 32
    speed_rounds: int = 9


@dataclass(frozen=True)
class DemoData:
    """Encoded examples. `train` and `activation` come from the same topics, by other seeds."""

    train: EncodedDataset
    activation: EncodedDataset
    held_out: dict[str, list[Row]]


def measure(config: DemoConfig, out: Path, cache: Path, use_cache: bool) -> dict[str, Any]:
    """Run the demo and write the adapter and the heat map into `out`.

    Returns: what `--json` writes; JSON types only.
    """
    with _one_thread():
        return _measure(config, out, cache, use_cache)


def _measure(config: DemoConfig, out: Path, cache: Path, use_cache: bool) -> dict[str, Any]:
    started = time.perf_counter()
    corpus = load_corpus()
    with bar("Pre-training the base", config.base.steps) as progress:
        base = load_or_pretrain(corpus, config.base, cache, use_cache, progress)
    if base.from_cache:
        console.note(f"The base comes from the cache: {base.folder}")
    data = make_data(corpus, base, config)
    budgets = equal_budgets(base.model, config.rank, config.finetune.seed)

    models, results = {}, {}
    for method in METHODS:
        models[method] = model = attach(copy.deepcopy(base.model), method, budgets)
        results[method] = asdict(count(model, method))
        results[method]["train_seconds"] = _train(model, method, base, data, config)
        results[method]["tasks"] = _score(model, method, base, data)
    results = _with_speed(results, models, base, data, config)

    routes = observe_routes(models[MILORA], data.held_out, base.tokenizer, _ROUTE_TOKENS)
    draw_heatmap(routes.shares, routes.experts, out / "routing.png")
    reload_equal = _save_and_compare(models[MILORA], base, data, out / "adapter")
    return {
        "seconds": time.perf_counter() - started,
        "environment": _environment(),
        "config": asdict(config),
        "base": {
            "parameters": base.model.num_parameters(),
            "folder": str(base.folder),
            "from_cache": base.from_cache,
        },
        "corpus": {
            "train_topics": len(corpus.train),
            "held_out_topics": sorted(corpus.held_out),
            "train_characters": len(corpus.train_text()),
        },
        "best_constant_answer": {
            task: constant_answer(rows) for task, rows in data.held_out.items()
        },
        "budgets": _describe(budgets),
        "methods": results,
        "speed": {
            "batch_size": config.speed_batch,
            "num_tokens": config.speed_tokens,
            "rounds": config.speed_rounds,
        },
        "routing": {
            **asdict(routes.counts),
            "experts": routes.experts,
            "shares": {task: share.tolist() for task, share in routes.shares.items()},
        },
        "adapter": {"folder": str(out / "adapter"), "reload_equal": reload_equal},
        "heatmap": str(out / "routing.png"),
    }


def make_data(corpus: Corpus, base: Base, config: DemoConfig) -> DemoData:
    """Training, activation and held-out examples, encoded once for all methods."""
    encoder = Encoder(base.tokenizer)
    # One pass: enough examples that no method sees one twice.
    per_task = -(-config.finetune.steps * config.finetune.batch_size // len(TASKS))
    seed = config.finetune.seed

    def encode(pairs: list) -> EncodedDataset:
        return encode_examples([example for _, example in pairs], encoder, _MAX_LENGTH)

    held_out = held_out_examples(corpus.held_out, config.held_out_per_task, seed)
    return DemoData(
        train=encode(training_examples(corpus.train, per_task, 2 * seed)),
        activation=encode(training_examples(corpus.train, per_task, 2 * seed + 1)),
        held_out={
            task.name: encode([pair for pair in held_out if pair[0] == task.name]).rows
            for task in TASKS
        },
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run the demo on one CPU thread.

    Matrices of width 128 gain little from a second thread, and on a busy machine threads that wait
    for one another cost far more: 0.95 to 2.4 s a pre-training step with two, 0.12 to 0.19 s with
    one, measured in turns on two shared cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    model: nn.Module, method: str, base: Base, data: DemoData, config: DemoConfig
) -> float | None:
    if method == BASE:
        return None
    collator = CompletionCollator(base.tokenizer.pad_token_id)
    with (
        tempfile.TemporaryDirectory() as scratch,
        bar(f"Fine-tuning {method}", config.finetune.steps) as progress,
    ):
        return finetune(
            model,
            method,
            config.finetune,
            data.train,
            data.activation,
            collator,
            Path(scratch),
            progress,
        )


def _score(model: nn.Module, method: str, base: Base, data: DemoData) -> dict[str, Any]:
    scores = {}
    with bar(f"Scoring {method}", len(data.held_out)) as progress:
        for task, rows in data.held_out.items():
            scores[task] = asdict(score(model, rows, base.tokenizer))
            progress(len(scores))
    return scores


def _with_speed(
    results: dict[str, Any],
    models: dict[str, nn.Module],
    base: Base,
    data: DemoData,
    config: DemoConfig,
) -> dict[str, Any]:
    rows = [row for group in zip(*data.held_out.values(), strict=False) for row in group]
    prompts = [prompt_of(row) for row in rows[: config.speed_batch]]
    with bar("Timing generation", config.speed_rounds) as progress:
        speeds = tokens_per_second(
            models, base.tokenizer, prompts, config.speed_tokens, config.speed_rounds, progress
        )
    return {
        name: {
            **result,
            "tokens_per_second": speeds[name],
            "speed_ratio": speeds[name] / speeds[BASE],
        }
        for name, result in results.items()
    }


def _save_and_compare(model: nn.Module, base: Base, data: DemoData, folder: Path) -> bool:
    """Save the adapter, load it onto a bare base, and compare logits and routes bit for bit."""
    milora.save(model, folder)
    reloaded = milora.load(copy.deepcopy(base.model), folder)
    collator = CompletionCollator(base.tokenizer.pad_token_id)
    batch = collator([rows[0] for rows in data.held_out.values()])
    logits, states = [], []
    for one in (model, reloaded.eval()):
        with torch.inference_mode(), milora.record_routing(one) as recorded:
            logits.append(one(**batch, use_cache=False).logits)
        states.extend(recorded)
    return torch.equal(*logits) and states[0].same_route(states[1])


def _describe(budgets: Budgets) -> dict[str, Any]:
    return {
        "lora_rank": budgets.lora.rank,
        "milora_rank": budgets.milora.rank,
        "milora_top_k": budgets.milora.top_k,
        "mixture": asdict(budgets.mixture),
    }


def _environment() -> dict[str, Any]:
    return {
        "milora": milora.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
