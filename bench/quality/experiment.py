"""One run from base to numbers; what runs have in common is prepared once per process."""

from __future__ import annotations

import copy
import functools
import time
from pathlib import Path
from typing import Any

from milora.data import CompletionCollator, Encoder, encode_examples
from milora.demo.evaluate import constant_answer
from quality import routing
from quality.base import MAX_LENGTH, load_or_pretrain
from quality.evaluate import Row, score
from quality.finetune import finetune
from quality.methods import BASE, Attached, attach
from quality.plan import ALL_TASKS, Run
from quality.presets import Preset
from quality.tasks import TASK_NAMES, examples, mixed, task_named

MEAN = "mean"
_EVALUATION_SEED = 10_000  # held-out examples are the same for all runs
_ACTIVATION_SEED = 20_000  # added to a run's seed
_ACTIVATION_BATCHES = 16


class Experiment:
    """Base model and data of one preset.

    Args:
        cache: folder of the base; pre-trained there if it is not.
        device: "cpu" or "cuda".
    """

    def __init__(self, preset: Preset, cache: Path, device: str, progress=lambda step, loss: None):
        self.preset, self.device = preset, device
        self.base = load_or_pretrain(preset.base, cache, device, progress)
        self.collate = CompletionCollator(self.base.tokenizer.pad_token_id)
        self.encoder = Encoder(self.base.tokenizer)

    # ---- data ---------------------------------------------------------------------------------

    def encode(self, made: list) -> list[Row]:
        return encode_examples(made, self.encoder, MAX_LENGTH).rows

    @functools.lru_cache(maxsize=64)  # noqa: B019  (one experiment a process)
    def held_out(self, split: str, task: str) -> list[Row]:
        preset = self.preset
        count = preset.dev_per_task if split == "dev" else preset.test_per_task
        return self.encode(examples(task_named(task), split, count, _EVALUATION_SEED))

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def training(self, trained_on: str, seed: int, steps: int) -> tuple[list[Row], list[Row]]:
        """Training rows in order of use, and those of the bi-level steps."""
        names = TASK_NAMES if trained_on == ALL_TASKS else (trained_on,)
        size = self.preset.batch_size
        count = min(_ACTIVATION_BATCHES, steps) * size
        return (
            self.encode(mixed(names, "train", steps * size, seed)),
            self.encode(mixed(names, "train", count, _ACTIVATION_SEED + seed)),
        )

    def steps_of(self, run: Run) -> int:
        if run.stage == "long":
            return self.preset.long_steps
        return self.preset.steps if run.trained_on == ALL_TASKS else self.preset.single_steps

    # ---- a run --------------------------------------------------------------------------------

    def execute(self, run: Run) -> list[dict[str, Any]]:
        """Train and evaluate.

        Returns: one record per metric and task. The last one is `seconds`: a run without it was
            interrupted while its lines were written.
        """
        started = time.perf_counter()
        preset = self.preset
        steps = self.steps_of(run)
        model = copy.deepcopy(self.base.model)
        watch, attached = None, Attached(model, 0, 0)
        if run.method != BASE:
            changes = {k: list(v) if isinstance(v, tuple) else v for k, v in run.changes}
            attached = attach(model, run.method, preset.rank, run.seed, steps, **changes)
            rows, activation_rows = self.training(run.trained_on, run.seed, steps)
            if run.stage == "routing":
                watch = routing.Watch(self, every=max(1, steps // 12))
            finetune(
                attached.model, run.method, rows, activation_rows, self.collate, steps=steps,
                batch_size=preset.batch_size, learning_rate=run.learning_rate, seed=run.seed,
                device=self.device, callbacks=[watch] if watch else [],
            )  # fmt: skip
        found = self._scores(attached.model, run)
        if run.method == BASE:
            found.append(_record(MEAN, "base_parameters", model.num_parameters()))
        if watch:
            found += watch.records + routing.evidence(self, attached.model)
        found.append(_record(MEAN, "seconds", time.perf_counter() - started))
        common = {
            "stage": run.stage, "method": run.method, "trained_on": run.trained_on,
            "setting": run.setting, "seed": run.seed, "learning_rate": run.learning_rate,
            "trainable": attached.trainable, "activated": attached.activated,
        }  # fmt: skip
        return [{**common, **record} for record in found]

    def _scores(self, model, run: Run) -> list[dict[str, Any]]:
        """Means over the tasks; in the main stage also each task's own held-out scores."""
        names = TASK_NAMES if run.trained_on == ALL_TASKS else (run.trained_on,)
        metrics: dict[str, list[float]] = {}
        for name in names:
            for split in ("dev", "test_seen", "test"):
                result = score(model, self.held_out(split, name), self.collate, self.device)
                metrics.setdefault(f"{split}/exact_match", []).append(result.exact_match)
                metrics.setdefault(f"{split}/loss", []).append(result.loss)
            if run.method == BASE:
                constant = constant_answer(self.held_out("test", name))
                metrics.setdefault("test/constant_answer", []).append(constant)
        records = [_record(MEAN, key, sum(v) / len(v)) for key, v in metrics.items()]
        if run.stage == "main":
            records += [
                _record(name, key, value)
                for key, values in metrics.items()
                if key.startswith("test/")
                for name, value in zip(names, values, strict=True)
            ]
        return records


def _record(task: str, metric: str, value: float) -> dict[str, Any]:
    return {"task": task, "metric": metric, "value": value}
