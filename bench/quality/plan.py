"""Which runs an experiment is made of: stages, settings and seeds.

grid       every method × learning rate, seed 0, judged on dev values
main       every method at its best learning rate: all tasks together, and single tasks
ablations  MiLoRA with one thing changed. What changes the size of its update (gate, alpha) is
           run over the whole grid of learning rates, all else at the default's best
routing    MiLoRA again, with its routes watched
controls   what separates MiLoRA from LoRA, undone step by step
long       the controls again, trained for longer
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quality.methods import BASE, METHODS, MILORA
from quality.presets import Preset

ALL_TASKS = "all"
STAGES = ("grid", "main", "ablations", "routing", "controls", "long")
DEFAULT = "default"
# alpha ÷ rank at which a gate of about 1/7 (seven experts, literal eq. 3) gives LoRA's own scale
LARGE_ALPHA = 7.0


@dataclass(frozen=True)
class Run:
    """One fine-tuning and its evaluation. `changes` are arguments of `methods.attach`."""

    stage: str
    method: str
    trained_on: str
    setting: str
    seed: int
    learning_rate: float
    changes: tuple[tuple[str, Any], ...] = ()

    def key(self) -> tuple:
        """What tells two runs of one preset apart."""
        return (self.stage, self.method, self.trained_on, self.setting, self.seed)


def grid_runs(preset: Preset) -> Iterator[Run]:
    for method in METHODS:
        for rate in preset.learning_rates:
            yield Run("grid", method, ALL_TASKS, f"lr={rate:g}", 0, rate)


def main_runs(preset: Preset, best: dict[str, float]) -> Iterator[Run]:
    """`best`: learning rate by method, from the grid."""
    yield Run("main", BASE, ALL_TASKS, DEFAULT, 0, 0.0)
    for seed in range(preset.main_seeds):
        for method in METHODS:
            yield Run("main", method, ALL_TASKS, DEFAULT, seed, best[method])
    for task in preset.single_tasks:
        for seed in range(preset.single_seeds):
            for method in METHODS:
                yield Run("main", method, task, DEFAULT, seed, best[method])


def settings(preset: Preset) -> dict[str, dict[str, Any]]:
    """The ablated settings of MiLoRA at the default's learning rate; the default is in `main`."""
    layers = preset.base.num_layers
    by_depth = ["relu" if layer < layers // 2 else "gelu" for layer in range(layers)]
    found: dict[str, dict[str, Any]] = {}
    for k in (1, 2, 4, 5, 6, 7):
        found[f"top_k={k}"] = {"top_k": k}
    found["router_norm=rms"] = {"router_norm": "rms"}
    found["bilevel=off"] = {"bilevel": False}
    for activation in ("gelu", "relu"):
        found[f"activation={activation}"] = {"activation": activation}
    found["activation=relu then gelu"] = {"activation": by_depth}
    for pooler in ("mean", "max", "last"):
        found[f"pooler={pooler}"] = {"pooler": pooler}
    for coefficient in (0.0, 1e-3, 0.1, 1.0):
        found[f"balance={coefficient:g}"] = {"balance_coef": coefficient}
    for rank in preset.ranks:
        found[f"rank={rank}"] = {"fixed_rank": rank}
    return found


def scale_settings() -> dict[str, tuple[str, dict[str, Any]]]:
    """Settings that change the size of an update: each is run at every learning rate."""
    return {
        "default": (MILORA, {}),
        "gate=renormalized": (MILORA, {"gate": "renormalized"}),
        "gate=hard": (MILORA, {"gate": "hard"}),
        "alpha=7r": (MILORA, {"alpha_factor": LARGE_ALPHA}),
        "LoRA alpha=7r": ("LoRA", {"alpha_factor": LARGE_ALPHA}),
    }


def ablation_runs(preset: Preset, best: dict[str, float]) -> Iterator[Run]:
    """Setting by setting, so that an interrupted experiment lacks settings and no seeds."""
    seeds = range(preset.ablation_seeds)
    for name, (method, changes) in scale_settings().items():
        for rate in preset.learning_rates:
            for seed in seeds:
                setting = f"{name} lr={rate:g}"
                yield Run("ablations", method, ALL_TASKS, setting, seed, rate, _frozen(changes))
    for name, changes in settings(preset).items():
        for seed in seeds:
            yield Run("ablations", MILORA, ALL_TASKS, name, seed, best[MILORA], _frozen(changes))


def routing_runs(preset: Preset, best: dict[str, float]) -> Iterator[Run]:
    for seed in range(preset.routing_seeds):
        yield Run("routing", MILORA, ALL_TASKS, DEFAULT, seed, best[MILORA])


def controls() -> dict[str, tuple[str, dict[str, Any]]]:
    """From LoRA to MiLoRA: fewer parameters per prompt, fewer experts, a learned choice, its gate.

    With a hard gate and all experts MiLoRA is a LoRA whose router decides nothing.
    """
    hard = {"gate": "hard"}
    return {
        "LoRA": ("LoRA", {}),
        "LoRA, as many as MiLoRA activates": ("LoRA", {"activated_only": True}),
        "MiLoRA, hard gate, top_k 7": (MILORA, {**hard, "top_k": 7}),
        "MiLoRA, hard gate, top_k 5": (MILORA, {**hard, "top_k": 5}),
        "MiLoRA, hard gate": (MILORA, hard),
        "MiLoRA, hard gate, router untrained": (MILORA, {**hard, "trains_router": False}),
        "MiLoRA": (MILORA, {}),
    }


def control_runs(stage: str, preset: Preset, best: dict[str, float]) -> Iterator[Run]:
    """`stage`: "controls" or "long", which differ in the number of steps alone."""
    for seed in range(preset.main_seeds):
        for name, (method, changes) in controls().items():
            yield Run(stage, method, ALL_TASKS, name, seed, best[method], _frozen(changes))


def _frozen(changes: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in changes.items())
