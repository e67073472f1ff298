"""What MiLoRA's routers do: which experts each task keeps, and what moves a route.

Overlap of two routes: kept experts in both ÷ kept experts in either, mean over blocks (Jaccard).
"""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import milora
from quality.tasks import TASKS, fill

if TYPE_CHECKING:
    from quality.experiment import Experiment

PROMPTS = 24  # per task
_PADDING = 17  # columns that no prompt needs
Routes = tuple[Tensor, Tensor]  # probabilities, gates: [num_blocks, num_prompts, num_experts]


def routes_of(experiment: Experiment, model: nn.Module, rows: list, padding: int = 0) -> Routes:
    """Route every row's prompt; `padding` more columns on the right."""
    batch = experiment.collate(rows)
    fill_with = {"input_ids": experiment.collate.pad_token_id, "attention_mask": 0, "labels": -100}
    batch = {
        name: nn.functional.pad(tensor, (0, padding), value=fill_with[name]).to(experiment.device)
        for name, tensor in batch.items()
    }
    with torch.no_grad(), milora.record_routing(model) as states:
        model(**batch, use_cache=False)
    return states[0].probabilities.float().cpu(), states[0].gates.float().cpu()


def entropy(probabilities: Tensor) -> float:
    """Mean over blocks and prompts of -Σ p log p, in nats; log N when the router is indifferent."""
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1).mean().item()


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean overlap of two sets of gates [num_blocks, num_prompts, num_experts]."""
    a, b = a > 0, b > 0
    return ((a & b).sum(-1) / (a | b).sum(-1)).mean().item()


class Watch(TrainerCallback):
    """Notes the mean entropy of the routes of held-out prompts now and then during training."""

    def __init__(self, experiment: Experiment, every: int):
        self.experiment, self.every = experiment, every
        self.rows = [row for task in TASKS for row in experiment.held_out("test", task.name)[:8]]
        self.records: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._note(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self._note(model, state.global_step)

    def _note(self, model: nn.Module, step: int) -> None:
        model.eval()
        probabilities, _ = routes_of(self.experiment, model, self.rows)
        model.train()
        self.records.append(_record("mean", f"entropy/step{step}", entropy(probabilities)))


def evidence(experiment: Experiment, model: nn.Module) -> list[dict[str, Any]]:
    """Expert shares per block and task, and overlaps of routes between comparable prompts."""
    rng = random.Random("routing")
    gates, paraphrased, records = {}, [], []
    for task in TASKS:
        seen, unseen = task.templates_of("train"), task.templates_of("test")
        values = [task.draw_from("test", rng) for _ in range(PROMPTS)]

        def route(templates: list[str], task=task, values=values) -> tuple[list, Routes]:
            pairs = zip(templates, values, strict=True)
            rows = experiment.encode([fill(task.name, t, v) for t, v in pairs])
            return rows, routes_of(experiment, model, rows)

        first = [rng.choice(seen) for _ in values]
        rows, (probabilities, kept) = route(first)
        gates[task.name] = kept
        records.append(_record(task.name, "entropy/end", entropy(probabilities)))
        others = [rng.choice([t for t in seen if t != one]) for one in first]
        for kind, templates in (("seen", others), ("unseen", [rng.choice(unseen) for _ in values])):
            other = route(templates)[1][1]
            paraphrased.append((kind, overlap(kept, other)))
            records.append(_record(task.name, f"overlap/paraphrase_{kind}", paraphrased[-1][1]))
        padded, padded_gates = routes_of(experiment, model, rows, _PADDING)
        records += [
            _record(task.name, "overlap/padding", overlap(kept, padded_gates)),
            _record(
                task.name, "probability_change/padding", (padded - probabilities).abs().max().item()
            ),
            _record(task.name, "overlap/same_task", overlap(kept, kept.roll(1, dims=1))),
        ]
        for block, share in enumerate((kept > 0).float().mean(dim=1).tolist()):
            records += [
                _record(task.name, f"share/{block}/{name}", value)
                for name, value in zip(expert_names(model), share, strict=True)
            ]
    between = [overlap(gates[a], gates[b]) for a, b in itertools.combinations(gates, 2)]
    records.append(_record("mean", "overlap/other_task", sum(between) / len(between)))
    return records


def expert_names(model: nn.Module) -> list[str]:
    """Module names in the order of the gates' columns; all blocks of a Llama are alike."""
    block = next(iter(milora.balance_report(model)["share"].values()))
    return [path.rpartition(".")[2] for path in block]


def _record(task: str, metric: str, value: float) -> dict[str, Any]:
    return {"task": task, "metric": metric, "value": value}
