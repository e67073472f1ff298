"""MiLoRA's own numbers in the logs: the balance loss, and how often each expert leads."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import milora

METRICS_FILE = "metrics.jsonl"
FORMAT = "milora_metrics"
VERSION = 1


class MiLoRACallback(TrainerCallback):
    """Adds `balance_loss` and the experts' shares to the logs, and writes `metrics.jsonl`.

    The Trainer's logs get `balance_loss` and one `share/<expert>` per expert name, its share of
    the prompts as a mean over blocks: a number per expert *and* block would drown them. The file
    has them all, as `"shares": [[...], ...]`, a list per block in the order of `"experts"`, which
    stands in the first line with shares.

    Args:
        path: the metrics file; None is `metrics.jsonl` in the Trainer's output folder.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = None if path is None else Path(path)
        self._named = False

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        if self.path is None:
            self.path = Path(args.output_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if state.global_step:  # after a resume, the lines past the checkpoint will come again
            kept = [
                line for line in read_metrics(self.path)[1] if line["step"] <= state.global_step
            ]
        self._named = any("experts" in line for line in kept)
        self._write([{"format": FORMAT, "version": VERSION}, *kept], mode="w")

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if not logs or model is None or not state.is_world_process_zero or self.path is None:
            return
        line: dict[str, Any] = {"step": state.global_step, **logs}
        report = milora.balance_report(model)
        if "loss" in logs and report["share"]:
            summary = {"balance_loss": round(report["balance_loss"], 6), **mean_shares(report)}
            logs.update(summary)
            if state.log_history:  # Trainer copied the logs before it called back
                state.log_history[-1].update(summary)
            line["balance_loss"] = summary["balance_loss"]
            blocks = report["share"].values()
            line["shares"] = [[round(s, 4) for s in experts.values()] for experts in blocks]
            if not self._named:
                line["experts"] = [list(experts) for experts in blocks]
                self._named = True
        self._write([line], mode="a")

    def _write(self, lines: list[dict], mode: str) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def mean_shares(report: dict[str, Any]) -> dict[str, float]:
    """`share/<expert>`: its share of the prompts, as a mean over the blocks that have it."""
    shares: dict[str, list[float]] = defaultdict(list)
    for experts in report["share"].values():
        for path, share in experts.items():
            shares[f"share/{short_names(experts)[path]}"].append(share)
    return {name: round(sum(values) / len(values), 4) for name, values in shares.items()}


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """The last part of each path, or all of it where two would be equal (GPT-2's c_proj)."""
    last = {path: path.rpartition(".")[2] for path in paths}
    count = Counter(last.values())
    return {path: name if count[name] == 1 else path for path, name in last.items()}


def read_metrics(path: str | os.PathLike) -> tuple[list[list[str]], list[dict]]:
    """Read a metrics file: the experts' names per block, and its lines; empty if there is none.

    Raises:
        ValueError: the file does not begin with this format and version.
    """
    path = Path(path)
    if not path.is_file():
        return [], []
    header, *lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] or [{}]
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ValueError(
            f"read_metrics: {path} must begin with format {FORMAT} version {VERSION}, got "
            f"{header.get('format')} version {header.get('version')}"
        )
    return next((line["experts"] for line in lines if "experts" in line), []), lines
