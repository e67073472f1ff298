"""How values are drawn and answers computed, one function a task. Nothing here knows of models."""

from __future__ import annotations

import itertools
import random
import string
from dataclasses import dataclass

from quality.words import COLORS, KEYWORDS, LIKES, MONTHS, NAMES, PAIRS, UNITS


@dataclass(frozen=True)
class Values:
    """What fills a template, the answer, and the key by which the split is decided.

    Two draws that are the same question (2 + 3 and 3 + 2) have the same key.
    """

    fields: dict[str, str]
    answer: str
    key: str


def letters(rng: random.Random, low: int = 3, high: int = 6) -> str:
    return "".join(rng.sample(string.ascii_uppercase, rng.randint(low, high)))


def digits(rng: random.Random, low: int = 3, high: int = 5) -> str:
    return "".join(rng.sample(string.digits, rng.randint(low, high)))


# ---- what is adapted to -----------------------------------------------------------------------


def last_digit(rng: random.Random) -> Values:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return Values({"a": str(a), "b": str(b)}, str((a + b) % 10), f"{min(a, b)} {max(a, b)}")


def rotate(rng: random.Random) -> Values:
    text = letters(rng)
    return Values({"s": text}, text[1:] + text[0], text)


def sort_down(rng: random.Random) -> Values:
    text = digits(rng)
    return Values({"s": text}, "".join(sorted(text, reverse=True)), text)


def days_later(rng: random.Random) -> Values:
    """No month is left: a carry into the next one would be a task of its own."""
    month, n = rng.choice(MONTHS), rng.randint(2, 9)
    day = rng.randint(1, 28 - n)
    fields = {"month": month, "day": str(day), "n": str(n)}
    return Values(fields, f"{month} {day + n}", f"{month} {day} {n}")


def convert(rng: random.Random) -> Values:
    """Into a smaller unit or a larger one; the number never ends in zero in the larger unit."""
    (large, small), power = rng.choice(list(UNITS.items()))
    number = rng.randint(1, 99) * 10 + rng.randint(1, 9)  # 11 to 999
    few, many = str(number), str(number * 10**power)
    down = rng.random() < 0.5
    x, u, v, answer = (few, large, small, many) if down else (many, small, large, few)
    return Values({"x": x, "u": u, "v": v}, answer, f"{x} {u} {v}")


def close(rng: random.Random) -> Values:
    """Brackets and shell keywords, some of them closed already."""
    closer = {**PAIRS, **KEYWORDS}
    written, waiting = [], []
    for _ in range(rng.randint(4, 8)):
        if waiting and rng.random() < 0.35:
            written.append(closer[waiting.pop()])
        else:
            waiting.append(rng.choice(list(closer)))
            written.append(waiting[-1])
    if not waiting:
        return close(rng)
    text = " ".join(written)
    return Values({"s": text}, " ".join(closer[w] for w in reversed(waiting)), text)


def row_of(rng: random.Random) -> Values:
    rows = table(rng)
    _, number, color = rng.choice(rows)
    text = as_text(rows)
    return Values({"rows": text, "n": number}, color, f"{text} {number}")


def two_hops(rng: random.Random) -> Values:
    chain, text = chain_of_facts(rng)
    start = rng.randrange(len(chain) - 2)
    return Values({"facts": text, "a": chain[start]}, chain[start + 2], f"{text} {chain[start]}")


# ---- shared with the base's pre-training ------------------------------------------------------


def table(rng: random.Random) -> list[tuple[str, str, str]]:
    """Rows of name, number and color; no value appears twice."""
    size = rng.randint(3, 4)
    columns = rng.sample(NAMES, size), rng.sample(string.digits, size), rng.sample(COLORS, size)
    return list(zip(*columns, strict=True))


def as_text(rows: list[tuple[str, str, str]]) -> str:
    return " ; ".join(" ".join(row) for row in rows)


def chain_of_facts(rng: random.Random) -> tuple[list[str], str]:
    """People each of whom likes the next one, and the facts in random order."""
    chain = rng.sample(NAMES, rng.randint(4, 5))
    facts = [f"{a} {LIKES} {b}" for a, b in itertools.pairwise(chain)]
    rng.shuffle(facts)
    return chain, " ; ".join(facts)
