"""The demo's one table, and what may be said about it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from milora.demo.methods import BASE, METHODS, MILORA
from milora.demo.tasks import TASKS


def print_report(result: dict[str, Any], console: Console) -> None:
    """Print the table and its notes. `result` is the object that `--json` writes."""
    methods = result["methods"]
    table = Table(title="MiLoRA demo: measured on held-out topics", title_justify="left")
    table.add_column("")
    for name in METHODS:
        table.add_column(name, justify="right")

    def row(label: str, values: list[str]) -> None:
        table.add_row(label, *values)

    def each(label: str, key: str, form: str) -> None:
        row(label, [_cell(methods[name][key], form) for name in METHODS])

    each("trainable parameters", "trainable", ",d")
    each("activated parameters", "activated", ",d")
    table.add_section()
    for heading, key, form in (("loss", "loss", ".3f"), ("exact match", "exact_match", ".1%")):
        for task in TASKS:
            row(
                f"{heading}: {task.name}",
                [_cell(methods[name]["tasks"][task.name][key], form) for name in METHODS],
            )
        table.add_section()
    each("tokens/s, unmerged", "tokens_per_second", ".0f")
    each("÷ base", "speed_ratio", ".3f")
    console.print(table)
    for line in notes(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def notes(result: dict[str, Any]) -> list[str]:
    """What stands below the table, in full sentences."""
    routing, speed = result["routing"], result["speed"]
    lowest = [name for name, winner in _winners(result).items() if winner == MILORA]
    blocks = routing["num_blocks"]
    reloaded = "equal, bit for bit" if result["adapter"]["reload_equal"] else "NOT EQUAL"
    return [
        f"Held-out examples: {_sizes(result)}. The base was never taught to end an "
        "answer: what it says runs on, and its loss counts the end token too.",
        f"One answer for every prompt, the task's most common, would match: {_guesses(result)}. "
        f"{_below_the_floor(result)}",
        f"MiLoRA has the lowest held-out loss in {len(lowest)} of {len(TASKS)} tasks"
        f"{': ' + ', '.join(lowest) if lowest else ''}.",
        f"Speed: batch of {speed['batch_size']}, {speed['num_tokens']} new tokens, median of "
        f"{speed['rounds']} interleaved rounds, {result['environment']['threads']} thread.",
        f"Routing: {routing['routed_prompts']:,} routed prompts "
        f"({blocks} blocks × {routing['num_prompts']} prompts = "
        f"{blocks * routing['num_prompts']:,}) and {routing['router_launches']} router launches "
        f"({blocks} blocks × {routing['num_prefills']} prefills = "
        f"{blocks * routing['num_prefills']}) in {routing['num_forwards']} forwards.",
        f"Adapter saved to {result['adapter']['folder']}; reloaded: {reloaded}.",
        f"Routing heat map: {result['heatmap']}",
    ]


def _winners(result: dict[str, Any]) -> dict[str, str]:
    def loss(name: str, task: str) -> float:
        return result["methods"][name]["tasks"][task]["loss"]

    return {
        task.name: min(METHODS, key=lambda name, task=task.name: loss(name, task)) for task in TASKS
    }


def _sizes(result: dict[str, Any]) -> str:
    scores = result["methods"][BASE]["tasks"]
    return ", ".join(f"{name} {score['num_examples']}" for name, score in scores.items())


def _guesses(result: dict[str, Any]) -> str:
    guesses = result["best_constant_answer"]
    return ", ".join(f"{name} {share:.1%}" for name, share in guesses.items())


def _below_the_floor(result: dict[str, Any]) -> str:
    """Names the scores that show no use of the prompt; the reader should not have to find them."""
    below = []
    for name in METHODS[1:]:
        scores, floors = result["methods"][name]["tasks"], result["best_constant_answer"]
        tasks = [task for task, floor in floors.items() if scores[task]["exact_match"] <= floor]
        if tasks:
            below.append(f"{name} ({', '.join(tasks)})")
    return f"Not above it: {'; '.join(below)}." if below else "All adapters are above it."


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
