"""What the base is pre-trained on: copying and the simple forms of the tasks, in other words.

It meets every word and the skills that the tasks are built of (adding, sorting upwards, one step,
looking up by name), and none of the tasks themselves: a test holds the two apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from milora.data import Example
from quality import rules
from quality.rules import Values
from quality.tasks import TASKS, fill
from quality.words import KEYWORDS, MONTHS, PAIRS, UNITS


def _text(rng: random.Random) -> str:
    number = str(rng.randint(1, 9999))
    return rng.choice([rules.letters(rng), rules.digits(rng), number])


def _copy(rng: random.Random) -> Values:
    text = _text(rng)
    return Values({"s": text}, text, text)


def _reverse(rng: random.Random) -> Values:
    text = _text(rng)
    return Values({"s": text}, text[::-1], text)


def _first(rng: random.Random) -> Values:
    text = rules.letters(rng)
    return Values({"s": text}, text[0], text)


def _last(rng: random.Random) -> Values:
    text = _text(rng)
    return Values({"s": text}, text[-1], text)


def _rest(rng: random.Random) -> Values:
    text = rules.letters(rng)
    return Values({"s": text}, text[1:], text)


def _sort_up(rng: random.Random) -> Values:
    text = rules.digits(rng)
    return Values({"s": text}, "".join(sorted(text)), text)


def _highest(rng: random.Random) -> Values:
    text = rules.digits(rng)
    return Values({"s": text}, max(text), text)


def _add(rng: random.Random) -> Values:
    a, b = rng.randint(1, 99), rng.randint(1, 9)
    if rng.random() < 0.5:
        a, b = b, a
    return Values({"a": str(a), "b": str(b)}, str(a + b), f"{a} {b}")


def _next_day(rng: random.Random) -> Values:
    month, day = rng.choice(MONTHS), rng.randint(1, 27)
    return Values({"month": month, "day": str(day)}, f"{month} {day + 1}", f"{month} {day}")


def _next_month(rng: random.Random) -> Values:
    place = rng.randrange(12)
    return Values({"month": MONTHS[place]}, MONTHS[(place + 1) % 12], MONTHS[place])


def _zeros(rng: random.Random) -> Values:
    x, n = rng.randint(1, 999), rng.randint(1, 3)
    return Values({"x": str(x), "n": str(n)}, str(x) + "0" * n, f"{x} {n}")


def _one_unit(rng: random.Random) -> Values:
    (large, small), power = rng.choice(list(UNITS.items()))
    return Values({"u": large, "v": small}, str(10**power), large)


def _match(rng: random.Random) -> Values:
    if rng.random() < 0.25:
        word = rng.choice(list(KEYWORDS))
        return Values({"s": word}, KEYWORDS[word], word)
    waiting = [rng.choice(list(PAIRS)) for _ in range(rng.randint(1, 4))]
    text = " ".join(waiting)
    return Values({"s": text}, " ".join(PAIRS[w] for w in reversed(waiting)), text)


def _number_of(rng: random.Random) -> Values:
    rows = rules.table(rng)
    name, number, _ = rng.choice(rows)
    return Values({"rows": rules.as_text(rows), "a": name}, number, "")


def _color_of(rng: random.Random) -> Values:
    rows = rules.table(rng)
    name, _, color = rng.choice(rows)
    return Values({"rows": rules.as_text(rows), "a": name}, color, "")


def _one_hop(rng: random.Random) -> Values:
    chain, text = rules.chain_of_facts(rng)
    start = rng.randrange(len(chain) - 1)
    return Values({"facts": text, "a": chain[start]}, chain[start + 1], "")


def _after(rng: random.Random) -> Values:
    text = rules.letters(rng, 4, 6)
    place = rng.randrange(len(text) - 1)
    return Values({"s": text, "a": text[place]}, text[place + 1], text)


# How to draw, in which words, and how often. Looking something up in the prompt and adding are what
# a small model learns last; at an equal share it would need several times the steps.
Form = tuple[Callable[[random.Random], Values], tuple[str, ...], int]
FORMS: tuple[Form, ...] = (
    (_copy, ("copy {s}", "give {s}", "keep the string {s}", "what is {s}"), 1),
    (_reverse, ("reverse {s}", "give the string {s} from the end", "change the order of {s}"), 2),
    (_first, ("first letter of {s}", "what is the first letter of {s}",
              "find the first of {s}"), 1),
    (_last, ("last digit or letter of {s}", "what is at the end of {s}", "the last of {s}"), 1),
    (_rest, ("{s} after the first letter", "shift the first letter out of {s}"), 1),
    (_sort_up, ("sort {s} up", "order the list {s} from low to high",
                "{s} in order , low first"), 1),
    (_highest, ("what is high in {s}", "find the high digit in the list {s}"), 1),
    (_add, ("{a} plus {b}", "add {a} and {b}", "what is the sum of {a} and {b}",
            "{a} and {b} more"), 4),
    (_next_day, ("the day after {month} {day}", "what date has the day after {month} {day}",
                 "go on one day from {month} {day}"), 1),
    (_next_month, ("month after {month}", "go on one month from {month}"), 1),
    (_zeros, ("put {n} zeros after {x}", "{x} and {n} zeros"), 1),
    (_one_unit, ("one of {u} in {v}", "how many {v} has one {u}", "convert one {u} to {v}"), 1),
    (_match, ("match {s}", "match the brackets {s}", "code {s} , match"), 1),
    (_number_of, ("{rows} ; number of {a}", "given {rows} , what number has {a}",
                  "find the number of {a} in the table {rows}"), 4),
    (_color_of, ("{rows} ; color of {a}", "given {rows} , what color has {a}",
                 "find the color for {a} in {rows}"), 4),
    (_one_hop, ("{facts} ; one step from {a}", "given {facts} , the friend of {a}",
                "start at {a} and go one step in {facts}"), 4),
    (_after, ("the letter after {a} in {s}", "{s} , go one after {a}"), 2),
)  # fmt: skip


def all_templates() -> list[str]:
    """Every template, of pre-training and of the tasks: what the tokenizer must know."""
    return [t + " :" for _, templates, _ in FORMS for t in templates] + [
        template for task in TASKS for template in task.templates
    ]


def pretraining_examples(count: int, seed: int) -> list[Example]:
    """`count` examples of all forms, in random order."""
    rng = random.Random(f"pretraining/{seed}")
    made = []
    for draw, templates, _ in rng.choices(FORMS, [often for *_, often in FORMS], k=count):
        made.append(fill(draw.__name__.strip("_"), rng.choice(templates), draw(rng)))
    return made
