"""The report's sections on how the methods compare: text and tables made from measured lines."""

from __future__ import annotations

import statistics
from pathlib import Path

from results import table

from quality.compare import Comparison, spread
from quality.measured import EXACT, LOSS, Measured, difference
from quality.methods import BASE, METHODS, MILORA
from quality.pictures import draw_methods
from quality.presets import PRESETS
from quality.tasks import TASK_NAMES

HEAD = """# What MiLoRA buys: measured quality

Written by `bench/quality/report.py` from the JSON lines in `bench/quality/results/`; never edited.

A small Llama is pre-trained on simple forms (copying, adding, sorting upwards, one-step look-ups)
and then adapted to eight tasks that it was not taught. `tasks.py` and `rules.py` make them:
arithmetic, strings, lists, dates, units, brackets, tables, two-hop questions. All methods get the
same trainable parameters, the same training examples in the same order, the same number of steps,
and the same few learning rates, of which the one with the lowest loss on dev values is taken.
Scores are on values *and* wordings that no training example had ("held out"); "seen wordings" means
unseen values in training's wordings. Exact match is what greedy decoding would say, end included.
Numbers are the median over the seeds [lowest, highest]; a seed decides initial values and training
examples, and is shared by all methods, so differences are paired by seed.

**Wins** and **loses** mean that all seeds agree on who is better; anything else is **not told
apart**. `p` is the sign test's (two-sided; n seeds that agree give 2^(1 − n), so 5 seeds cannot
reach 0.05), the interval is a bootstrap over seeds (95 %).
"""
# Exact match above base and constant answer that is taken for nothing learned.
_NOTHING = 0.05
FOOT = """
## Run it again

```
python bench/quality/run.py --preset cpu-small --jobs 2 \\
    --json bench/quality/results/cpu-small.jsonl
python bench/quality/report.py
```

Runs whose lines are there already are not repeated; name another file to start anew. `--preset gpu
--device cuda` is the same experiment with a larger base; it has not been run yet. What the paper's
own tables need is in `paper/`.
"""


def machine(preset: str, measured: Measured) -> str:
    records = measured.records
    last = max(records, key=lambda r: r["date"])
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    commits = ", ".join(sorted({r["commit"] for r in records}))
    hardware = "; ".join(dict.fromkeys(r["hardware"] for r in records))
    runs = [r["value"] for r in records if r["metric"] == "seconds"]
    size = measured.seeds("main", BASE, "base_parameters").get(0)
    base = "" if size is None else f" The base has {size:,.0f} parameters."
    sizes = PRESETS[preset]
    base += (
        f" A multi-task fine-tuning takes {sizes.steps} steps of {sizes.batch_size} examples, a "
        f"single-task one {sizes.single_steps}."
    )
    return (
        f"\n## Preset {preset}\n\n{len(runs)} runs, {sum(runs) / 60:.0f} minutes of one process in "
        f"all, on {hardware}; {versions}; commit {commits}; last on {last['date'][:10]}.{base}\n"
    )


# ---- MiLoRA against the others ----------------------------------------------------------------


def verdict(comparison: Comparison, *, lower_is_better: bool) -> str:
    """wins, loses or not told apart, from the first one's side."""
    sign = -comparison.direction if lower_is_better else comparison.direction
    return {1: "wins", -1: "loses", 0: "not told apart"}[sign]


def _row(measured: Measured, other: str, metric: str, trained_on: str) -> tuple[str, list[str]]:
    """(verdict, cells) of MiLoRA minus `other`."""
    mine = measured.seeds("main", MILORA, metric, trained_on=trained_on)
    found = difference(mine, measured.seeds("main", other, metric, trained_on=trained_on))
    if found is None:
        return "", ["", "", "", ""]
    word = verdict(found, lower_is_better=metric.endswith("loss"))
    interval = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    better = found.down if metric.endswith("loss") else found.up
    return word, [interval, f"{better} of {found.num_seeds}", f"{found.sign_p:.3f}", word]


def verdicts(measured: Measured) -> str:
    """MiLoRA minus each other method, in plain words and in a table."""
    text, others = "\n### Where MiLoRA wins, ties and loses\n\n", measured.methods()
    others = [name for name in others if name not in (BASE, MILORA)]
    for metric, name in ((EXACT, "exact match"), (LOSS, "loss")):
        words = {other: _row(measured, other, metric, "all")[0] for other in others}
        text += f"Held-out {name}, eight tasks together: {_sentence(words)}\n"
    rows = []
    for other in others:
        for metric, name in ((EXACT, "exact match"), (LOSS, "loss")):
            rows.append([other, name, *_row(measured, other, metric, "all")[1]])
    head = ("MiLoRA minus", "held out", "mean [95 %]", "MiLoRA better in", "p", "MiLoRA")
    return text + "\n" + table(head, rows)


def _sentence(words: dict[str, str]) -> str:
    parts = []
    for word, form in (
        ("wins", "wins against {}"),
        ("not told apart", "is not told apart from {}"),
        ("loses", "loses to {}"),
    ):
        names = [name for name, found in words.items() if found == word]
        if names:
            parts.append(form.format(", ".join(names)))
    return f"MiLoRA {'; '.join(parts)}."


# ---- tables -----------------------------------------------------------------------------------


def multi_task(measured: Measured, picture: Path) -> str:
    methods = [name for name in measured.methods() if name != BASE]
    draw_methods(
        {
            title: {name: measured.seeds("main", name, metric) for name in methods}
            for title, metric in (("held-out exact match", EXACT), ("held-out loss", LOSS))
        },
        picture,
    )
    rows = []
    for name in measured.methods():
        first = measured.first("main", name)
        cells = [name, f"{first['trainable']:,}", f"{first['activated']:,}"]
        cells.append("" if name == BASE else f"{first['learning_rate']:g}")
        for metric in (EXACT, LOSS, "test_seen/exact_match", "test_seen/loss"):
            cells.append(spread(measured.seeds("main", name, metric)))
        seconds = measured.seeds("main", name, "seconds")
        rows.append([*cells, f"{statistics.median(seconds.values()):.1f}"])
    seeds = len(measured.seeds("main", MILORA, EXACT))
    head = ("", "trainable", "activated", "lr", "exact match", "loss", "exact, seen wordings",
            "loss, seen wordings", "s a run")  # fmt: skip
    return (
        f"\n### All tasks together, {seeds} seeds\n\n{table(head, rows)}\n"
        "Activated: what one prompt (MOELoRA: one token) uses; AdaLoRA: what is left after "
        "pruning. MiLoRA and MiDoRA take a second, bi-level step after each step. Seconds are "
        "those of training and scoring on a machine that others may have used too: they compare "
        "no speeds.\n\n"
        f"![methods](plots/{picture.name})\n"
    )


def per_task(measured: Measured) -> str:
    methods = measured.methods()
    rows, unlearned = [], []
    for task in TASK_NAMES:
        constant = measured.seeds("main", BASE, "test/constant_answer", task=task)
        cells = [task, f"{constant[0]:.3f}" if constant else ""]
        medians = {
            name: statistics.median(measured.seeds("main", name, EXACT, task=task).values())
            for name in methods
        }
        cells += [_bold(v, max(medians.values())) for v in medians.values()]
        rows.append(cells)
        floor = max([medians.pop(BASE, 0.0), *constant.values()])
        if max(medians.values()) < floor + _NOTHING:
            unlearned.append(task)
    head = ("exact match", "best constant answer", *methods)
    text = f"\n### By task, trained on all together\n\n{table(head, rows)}"
    if unlearned:
        text += f"\nNo method gets {_NOTHING} above base and guess in: {', '.join(unlearned)}.\n"
    return text


def _bold(value: float, best: float) -> str:
    return f"**{value:.3f}**" if value == best else f"{value:.3f}"


def single_task(measured: Measured) -> str:
    """One adapter a task, at the learning rates that the multi-task grid chose."""
    text = ""
    for task in measured.trained_on():
        rows = []
        for name in measured.methods(task):
            cells = [name]
            for metric in (EXACT, LOSS, "test_seen/exact_match"):
                cells.append(spread(measured.seeds("main", name, metric, trained_on=task)))
            for metric in (EXACT, LOSS):
                cells.append("" if name == MILORA else _row(measured, name, metric, task)[1][3])
            rows.append(cells)
        seeds = len(measured.seeds("main", MILORA, EXACT, trained_on=task))
        head = (f"{task}, {seeds} seeds", "exact match", "loss", "exact, seen wordings",
                "MiLoRA, exact match", "MiLoRA, loss")  # fmt: skip
        text += "\n" + table(head, rows)
    if not text:
        return ""
    return f"\n### One adapter for one task\n\nLearning rates are those of the grid above.\n{text}"


def grid(measured: Measured) -> str:
    """The loss on dev values that chose the learning rates."""
    rates = sorted({r["learning_rate"] for r in measured.records if r["stage"] == "grid"})
    settings = [f"lr={rate:g}" for rate in rates]
    rows, on_edge = [], []
    for name in METHODS:
        losses = [
            measured.seeds("grid", name, "dev/loss", setting=s).get(0, float("nan"))
            for s in settings
        ]
        best = min(losses)
        rows.append([name, *(_bold(loss, best) for loss in losses)])
        if losses.index(best) in (0, len(losses) - 1):
            on_edge.append(name)
    note = "The best is at an end of the grid, so a better one may lie beyond: "
    note = f"{note}{', '.join(on_edge)}.\n" if on_edge else ""
    losses = table(("", *settings), rows)
    return f"\n### Learning rates\n\nLoss on dev values, seed 0.\n\n{losses}\n{note}"
