"""The report's sections on MiLoRA itself: ablations, defaults, routes."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch
from results import table

from milora.demo.heatmap import draw_heatmap
from quality.compare import spread
from quality.measured import EXACT, LOSS, MEAN, BySeed, Measured, difference
from quality.methods import MILORA
from quality.pictures import draw_ablations, draw_entropy, shrink
from quality.plan import settings
from quality.presets import PRESETS
from quality.tasks import TASK_NAMES

# ablation -> the default's own value, which the main stage measured
DEFAULTS = {"top_k": "3", "balance": "0.01", "pooler": "self_attention", "activation": "rational",
            "bilevel": "on", "router_norm": "none", "rank": "budget"}  # fmt: skip
_DRAWN = {"top_k": "experts kept (top_k)", "balance": "weight of the balance loss", "rank": "rank"}
_ENOUGH_SEEDS = 3  # fewer are no evidence
_SCALED = ("gate=renormalized", "gate=hard", "alpha=7r")


def default_of(measured: Measured, metric: str) -> BySeed:
    return measured.seeds("main", MILORA, metric)


def plain_settings(measured: Measured) -> list[str]:
    """In the order of the plan: lines come in the order in which runs ended."""
    found = set(measured.settings("ablations"))
    planned = settings(PRESETS[measured.records[0]["preset"]])
    return [name for name in planned if name in found]


def _cells(mine: BySeed, reference: BySeed, metric: str) -> list[str]:
    """Spread, mean paired difference to the reference, and in how many seeds it is better."""
    found = difference(mine, reference)
    if found is None:
        return [spread(mine), "", ""]
    better = found.down if metric == LOSS else found.up
    return [spread(mine), f"{found.mean:+.3f}", f"{better} of {found.num_seeds}"]


def ablations(measured: Measured, picture: Path) -> str:
    """One setting changed, at the learning rate that the grid chose for the default."""
    panels: dict[str, dict[str, BySeed]] = {}
    for setting in plain_settings(measured):
        name, _, value = setting.partition("=")
        if name in _DRAWN:
            panels.setdefault(name, {})[value] = measured.ablation(setting, LOSS)
    for name, points in panels.items():
        if name != "rank":  # the default's ranks follow from the budget and are no point here
            points[DEFAULTS[name]] = default_of(measured, LOSS)
    panels = {_DRAWN[name]: dict(sorted(p.items(), key=lambda i: float(i[0])))
              for name, p in panels.items()}  # fmt: skip
    draw_ablations(panels, default_of(measured, LOSS), picture)

    rows = [["default", spread(default_of(measured, EXACT)), "", "",
             spread(default_of(measured, LOSS)), "", ""]]  # fmt: skip
    for setting in plain_settings(measured):
        cells = [setting]
        for metric in (EXACT, LOSS):
            cells += _cells(
                measured.ablation(setting, metric), default_of(measured, metric), metric
            )
        rows.append(cells)
    head = ("MiLoRA with", "exact match", "difference", "better in", "loss", "difference",
            "better in")  # fmt: skip
    return (
        "\n### Ablations of MiLoRA\n\nOne thing changed, all tasks together, at the default's "
        "learning rate; differences are paired by seed. Other ranks are other budgets.\n\n"
        f"{table(head, rows)}\n![ablations](plots/{picture.name})\n"
    )


def scales(measured: Measured) -> str:
    """Gate and alpha change the size of an update, so each has the whole grid of learning rates."""
    rows = []
    for name in ("default", *_SCALED, "LoRA alpha=7r"):
        if not (rates := measured.rates(name)):
            continue
        best = measured.best_rate(name)
        setting = rates[best]
        reference = measured.rates("default")[measured.best_rate("default")]
        cells = [name, f"{best:g}"]
        for metric in (EXACT, LOSS):
            against = measured.ablation(reference, metric)
            found = _cells(measured.ablation(setting, metric), against, metric)
            cells += [found[0], "", ""] if name == "default" else found
        rows.append(cells)
    head = ("", "best lr", "exact match", "difference", "better in", "loss", "difference",
            "better in")  # fmt: skip
    return (
        "\n### Gate and alpha, each at its own best learning rate\n\nThe literal gate multiplies "
        "an update by a probability, about 1/7 at first; alpha = 7r undoes that. The last row "
        f"gives plain LoRA the same alpha, as a control.\n\n{table(head, rows)}"
    )


def defaults(measured: Measured) -> str:
    """Which settings beat the default in every seed, by held-out loss."""
    better, worse = [], []
    reference = default_of(measured, LOSS)
    seeds = PRESETS[measured.records[0]["preset"]].ablation_seeds
    for setting in plain_settings(measured):
        if not setting.startswith("rank="):
            _sort(setting, measured.ablation(setting, LOSS), reference, better, worse)
    if rates := measured.rates("default"):
        reference = measured.ablation(rates[measured.best_rate("default")], LOSS)
        for name in _SCALED:
            if found := measured.rates(name):
                mine = measured.ablation(found[measured.best_rate(name)], LOSS)
                _sort(f"{name} (own lr)", mine, reference, better, worse)
    lines = [
        f"- Lower held-out loss than the default in every seed: {_named(better)}.",
        f"- Higher in every seed: {_named(worse)}.",
        "- All other settings are not told apart from the default.",
        "",
        f"Of settings that change nothing, one in {2 ** (seeds - 1)} agrees by chance in all "
        f"{seeds} seeds, so a small difference here is a hint and no result.",
        "",
        "No default of the library was changed for these results: top_k, the only large effect, is "
        "also what a prompt costs, and the choice is the user's; all else are hints. The reasons "
        "stand in `docs/decisions.md`.",
    ]
    return "\n### Which defaults these results support\n\n" + "\n".join(lines) + "\n"


def _sort(name: str, mine: BySeed, reference: BySeed, better: list, worse: list) -> None:
    found = difference(mine, reference)
    if found is not None and found.direction and found.num_seeds >= _ENOUGH_SEEDS:
        (better if found.direction < 0 else worse).append(f"{name} ({found.mean:+.3f})")


def _named(names: list[str]) -> str:
    return ", ".join(names) or "none"


# ---- controls ---------------------------------------------------------------------------------


def controls(measured: Measured) -> str:
    """From LoRA to MiLoRA in steps, each compared with the LoRA of the same stage and seeds."""
    text = (
        "\n### Where the difference to LoRA comes from\n\nFrom LoRA to MiLoRA in steps, at the "
        "learning rates of the grid; differences to LoRA are paired by seed. With a hard gate (1 "
        "instead of the probability) and all seven experts the router decides nothing and MiLoRA "
        "is a LoRA. An untrained router keeps the choices that its seed made.\n"
    )
    sizes = PRESETS[measured.records[0]["preset"]]
    for stage, steps in (("controls", sizes.steps), ("long", sizes.long_steps)):
        if rows := _control_rows(measured, stage):
            head = (f"{steps} steps", "trainable", "activated", "exact match", "difference",
                    "better in", "loss", "difference", "better in")  # fmt: skip
            text += f"\n{table(head, rows)}"
    return text


def _control_rows(measured: Measured, stage: str) -> list[list[str]]:
    rows, reference = [], {m: measured.seeds(stage, "LoRA", m, setting="LoRA")
                           for m in (EXACT, LOSS)}  # fmt: skip
    for setting in measured.settings(stage):
        first = next(r for r in measured.records if (r["stage"], r["setting"]) == (stage, setting))
        cells = [setting, f"{first['trainable']:,}", f"{first['activated']:,}"]
        for metric in (EXACT, LOSS):
            mine = measured.seeds(stage, first["method"], metric, setting=setting)
            found = _cells(mine, reference[metric], metric)
            cells += [found[0], "", ""] if setting == "LoRA" else found
        rows.append(cells)
    return rows


# ---- routes -----------------------------------------------------------------------------------


def routing(measured: Measured, plots: Path, preset: str) -> str:
    records = [r for r in measured.records if r["stage"] == "routing"]
    tasks = list(TASK_NAMES)
    num_experts = _draw_shares(records, tasks, plots / f"{preset}-experts.png")
    by_step = {}
    for r in records:
        if r["metric"].startswith("entropy/step"):
            step = int(r["metric"].removeprefix("entropy/step"))
            by_step.setdefault(step, {})[r["seed"]] = r["value"]
    draw_entropy(by_step, math.log(num_experts), plots / f"{preset}-entropy.png")

    kinds = {"paraphrase_seen": "other wording, seen",
             "paraphrase_unseen": "other wording, unseen",
             "same_task": "other values, same task", "padding": "17 columns padded"}  # fmt: skip
    rows = []
    for task in tasks:
        cells = [task]
        for kind in kinds:
            cells.append(spread(_values(records, task, f"overlap/{kind}"), ".2f"))
        cells.append(spread(_values(records, task, "entropy/end"), ".2f"))
        rows.append(cells)
    other = spread(_values(records, MEAN, "overlap/other_task"), ".2f")
    chance = 3 / (2 * num_experts - 3)
    change = max(r["value"] for r in records if r["metric"] == "probability_change/padding")
    first, last = (statistics.median(by_step[s].values()) for s in (min(by_step), max(by_step)))
    return (
        "\n### What the routers do\n\nOverlap of the kept experts with those of the same prompt in "
        "another form: kept by both ÷ kept by either, mean over blocks. Between prompts of "
        f"different tasks it is {other}; two random choices of 3 of {num_experts} would have about "
        f"{chance:.2f}. Padding changes a probability by {change:.1e} at most.\n\n"
        f"{table(('', *kinds.values(), 'entropy'), rows)}\n"
        f"Entropy of the probabilities goes from {first:.2f} to {last:.2f} nats during training "
        f"(indifferent: {math.log(num_experts):.2f}).\n\n"
        f"![entropy](plots/{preset}-entropy.png)\n\n![experts](plots/{preset}-experts.png)\n\n"
        f"The heat maps are of seed {min(r['seed'] for r in records)}.\n"
    )


def _values(records: list[dict], task: str, metric: str) -> BySeed:
    return {r["seed"]: r["value"] for r in records if (r["task"], r["metric"]) == (task, metric)}


def _draw_shares(records: list[dict], tasks: list[str], path: Path) -> int:
    """Draw the first seed's shares of kept experts.

    Returns: number of experts of a block.
    """
    seed = min(r["seed"] for r in records)
    found = [r for r in records if r["seed"] == seed and r["metric"].startswith("share/")]
    names = list(dict.fromkeys(r["metric"].split("/")[2] for r in found))
    blocks = 1 + max(int(r["metric"].split("/")[1]) for r in found)
    value = {(r["task"], r["metric"]): r["value"] for r in found}
    shares = {
        task: torch.tensor(
            [[value[task, f"share/{b}/{name}"] for name in names] for b in range(blocks)]
        )
        for task in tasks
    }
    draw_heatmap(shares, names, path)
    shrink(path)
    return len(names)
