"""`milora demo`: options, sizes, and where results go."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from milora.cli import console
from milora.demo.base import BaseConfig
from milora.demo.finetune import FinetuneConfig
from milora.demo.measure import DemoConfig, measure
from milora.demo.report import print_report
from milora.errors import UserError

# A smoke test: every stage runs, and no number means anything.
_QUICK = DemoConfig(
    base=BaseConfig(
        vocab_size=512, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=176, steps=20
    ),
    finetune=FinetuneConfig(steps=6, batch_size=8),
    rank=8,
    held_out_per_task=8,
    speed_tokens=8,
    speed_rounds=2,
)


def run(options: argparse.Namespace) -> int:
    """Run the demo with the options of `milora.demo.add_arguments`.

    Returns: the exit code; 1 if the reloaded adapter differs from the saved one.
    Raises:
        UserError: an option is out of range, or a folder or file cannot be written.
    """
    config = _config(options)
    out = _folder(Path(options.out))
    cache = _folder(cache_folder(options.cache))
    result = measure(config, out, cache, use_cache=not options.no_cache)
    # With `--json -` standard output is the JSON's alone.
    print_report(result, console.stderr() if options.json == "-" else console.stdout())
    console.write_json(options.json, result)
    return 0 if result["adapter"]["reload_equal"] else 1


def cache_folder(option: str | None) -> Path:
    """--cache, else $MILORA_CACHE, else the platform's own place for caches."""
    if option is not None:
        return Path(option)
    if named := os.environ.get("MILORA_CACHE"):
        return Path(named)
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "milora" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "milora"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "milora"


def _config(options: argparse.Namespace) -> DemoConfig:
    config = _QUICK if options.quick else DemoConfig()
    if options.seed < 0:
        raise UserError(f"--seed must be 0 or more, got {options.seed}")
    tuning = replace(config.finetune, seed=options.seed)
    if options.steps is not None:
        if options.steps < 1:
            raise UserError(f"--steps must be at least 1, got {options.steps}")
        tuning = replace(tuning, steps=options.steps)
    return replace(config, finetune=tuning)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None
    return path
