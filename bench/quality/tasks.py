"""Eight tasks to adapt to, made by rule: arithmetic, strings, lists, dates, units, brackets, tables
and two-hop questions.

An example is a template filled with values. What decides the split:
- values: a hash of a task's values says whether they belong to training, dev or test;
- templates: the last two of a task are never seen in training.
`test` is the number that counts: unseen values in unseen templates. `test_seen` has the unseen
values in training's templates, `dev` (for choosing learning rates) has values of its own.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from milora.data import Example
from quality import rules
from quality.rules import Values

NUM_HELD_OUT = 2
_DEV, _TEST = 0.1, 0.2  # shares of all values
_DRAWS = 50  # per example: more draws than that without a new one mean that there are no more
SPLITS = ("train", "dev", "test_seen", "test")


@dataclass(frozen=True)
class Task:
    """`draw(rng)` makes values; the last `NUM_HELD_OUT` templates are held out."""

    name: str
    draw: Callable[[random.Random], Values]
    templates: tuple[str, ...]

    def templates_of(self, split: str) -> tuple[str, ...]:
        held_out = self.templates[-NUM_HELD_OUT:]
        return held_out if split == "test" else self.templates[:-NUM_HELD_OUT]

    def draw_from(self, split: str, rng: random.Random) -> Values:
        """Values that belong to `split`."""
        wanted = "test" if split == "test_seen" else split
        while True:
            values = self.draw(rng)
            if self.split_of(values) == wanted:
                return values

    def split_of(self, values: Values) -> str:
        digest = hashlib.sha256(f"{self.name}/{values.key}".encode()).digest()
        place = int.from_bytes(digest[:4], "big") / 2**32
        return "dev" if place < _DEV else "test" if place < _DEV + _TEST else "train"


TASKS = (
    Task("arithmetic", rules.last_digit, (
        "last digit of {a} plus {b}", "{a} plus {b} , last digit",
        "add {a} and {b} , give the last digit",
        "what is the last digit of the sum of {a} and {b}",
        "sum of {a} and {b} , keep the last digit",
        "what is {a} plus {b} , keep the last digit",
        "give the last digit of the sum of {a} and {b}",
    )),
    Task("string", rules.rotate, (
        "rotate {s}", "rotate the string {s}", "move the first letter of {s} to the end",
        "put the first letter of {s} at the end", "shift {s} by one",
        "shift the string {s} by one", "move the first letter of the string {s} to the end",
    )),
    Task("list", rules.sort_down, (
        "sort {s} down", "sort the list {s} from high to low", "give {s} from high to low",
        "order {s} , high first", "put {s} in order from high to low",
        "order the list {s} from high to low", "sort {s} , high first",
    )),
    Task("date", rules.days_later, (
        "{month} {day} plus {n} days", "{n} days after {month} {day}",
        "add {n} days to {month} {day}",
        "what date is {n} days after {month} {day}", "from {month} {day} go on {n} days",
        "what date is {month} {day} plus {n} days", "go on {n} days from {month} {day}",
    )),
    Task("unit", rules.convert, (
        "{x} {u} in {v}", "convert {x} {u} to {v}", "how many {v} are {x} {u}",
        "change {x} {u} into {v}", "{x} {u} is how many {v}",
        "convert {x} {u} into {v}", "what is {x} {u} in {v}",
    )),
    Task("brackets", rules.close, (
        "close {s}", "close the brackets {s}", "complete {s}", "what closes {s}",
        "finish the code {s}",
        "complete the brackets {s}", "what closes the code {s}",
    )),
    Task("table", rules.row_of, (
        "{rows} ; color of {n}", "{rows} ; what color has {n}",
        "given {rows} , give the color of {n}", "in the table {rows} , color for {n}",
        "find the color of {n} in {rows}",
        "given {rows} , what color has {n}", "{rows} ; find the color for {n}",
    )),
    Task("hops", rules.two_hops, (
        "{facts} ; two steps from {a}", "given {facts} , go two steps from {a}",
        "start at {a} and go two steps in {facts}", "{facts} ; the friend of the friend of {a}",
        "given {facts} , start at {a} and go two steps",
        "{facts} ; start at {a} and go two steps",
        "given {facts} , the friend of the friend of {a}",
    )),
)  # fmt: skip
TASK_NAMES = tuple(task.name for task in TASKS)


def task_named(name: str) -> Task:
    return TASKS[TASK_NAMES.index(name)]


def fill(task: str, template: str, values: Values) -> Example:
    return Example(f"{template.format(**values.fields)} :", values.answer, task)


def examples(task: Task, split: str, count: int, seed: int) -> list[Example]:
    """`count` examples of one split. Held-out splits never repeat values.

    Raises:
        ValueError: `split` is none of `SPLITS`, or has fewer values than `count`.
    """
    if split not in SPLITS:
        raise ValueError(f"examples: split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"{task.name}/{split}/{seed}")
    templates, made, seen = task.templates_of(split), [], set()
    for _ in range(_DRAWS * count):
        values = task.draw_from(split, rng)
        if split == "train" or values.key not in seen:
            seen.add(values.key)
            made.append(fill(task.name, rng.choice(templates), values))
            if len(made) == count:
                return made
    raise ValueError(f"examples: {task.name} has only {len(made)} values for {split}, got {count}")


def mixed(names: tuple[str, ...], split: str, count: int, seed: int) -> list[Example]:
    """`count` examples of several tasks, an equal share of each, shuffled together."""
    each = -(-count // len(names))
    made = [e for name in names for e in examples(task_named(name), split, each, seed)]
    random.Random(f"{split}/{seed}").shuffle(made)
    return made[:count]
