"""Four tasks made from the corpus: continue, chapter, blank, identifiers.

Each example is an instruction, a window of about 24 words of one topic, and a short answer that
can be checked by exact match. The answer follows on text like what precedes it in the passage: so
small a base continues text, and would not carry a word across an unrelated line.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from milora.data import Example
from milora.demo.chapters import CHAPTER_OF

_WINDOW_WORDS = 24
_SHORTEST_WINDOW = 16
_MOST_IDENTIFIERS = 2
_BLANK = "____"
_WORDS_BEFORE_BLANK = 3

_QUOTED = re.compile(r'"([A-Za-z_][A-Za-z0-9_.]*(?:\(\))?)"')
_PLAIN_WORD = re.compile(r"[A-Za-z]{4,}")


@dataclass(frozen=True)
class Window:
    """A run of words of one topic."""

    topic: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True)
class Task:
    """`make(window, rng)` gives (prompt less the instruction, answer), or None if unsuitable."""

    name: str
    instruction: str
    make: Callable[[Window, random.Random], tuple[str, str] | None]

    def example(self, window: Window, rng: random.Random) -> Example | None:
        made = self.make(window, rng)
        if made is None:
            return None
        text, answer = made
        prompt = f"{self.instruction}\n{text}"
        return Example(prompt=prompt, completion=f" {answer}", where=window.topic)


def _continue(window: Window, rng: random.Random) -> tuple[str, str] | None:
    return " ".join(window.words[:-1]), window.words[-1]


def _chapter(window: Window, rng: random.Random) -> tuple[str, str] | None:
    chapter = CHAPTER_OF.get(window.topic)
    return None if chapter is None else (f"{window.text}\nChapter:", chapter)


def _blank(window: Window, rng: random.Random) -> tuple[str, str] | None:
    """Blank a word that the passage uses elsewhere too, so that a reader can find it.

    The prompt ends with the words before the blank, and the answer is the word that goes there.
    """
    plain = [word.strip(".,;:()") for word in window.words]
    places = [
        i
        for i, word in enumerate(plain)
        if _PLAIN_WORD.fullmatch(word) and plain.count(word) > 1 and i >= _WORDS_BEFORE_BLANK
    ]
    if not places:
        return None
    place = rng.choice(places)
    words = list(window.words)
    words[place] = words[place].replace(plain[place], _BLANK)
    before = " ".join(words[place - _WORDS_BEFORE_BLANK : place])
    return f"{' '.join(words)}\nBlank: {before}", plain[place]


def _identifiers(window: Window, rng: random.Random) -> tuple[str, str] | None:
    found = list(dict.fromkeys(_QUOTED.findall(window.text)))
    if not 1 <= len(found) <= _MOST_IDENTIFIERS:
        return None
    return f"{window.text}\nIdentifiers:", ", ".join(f'"{name}"' for name in found)


TASKS = (
    Task("continue", "Give the next word of the passage.", _continue),
    Task("chapter", "Name the chapter of the passage.", _chapter),
    Task("blank", "Fill in the blank.", _blank),
    Task("identifiers", "List the code identifiers.", _identifiers),
)


def training_examples(
    paragraphs: dict[str, list[str]], per_task: int, seed: int
) -> list[tuple[str, Example]]:
    """`per_task` examples of every task from windows at random places, shuffled together.

    Returns: (task name, example) pairs.
    """
    rng = random.Random(seed)
    words = _words_by_topic(paragraphs)
    topics = tuple(words)
    sizes = [len(words[topic]) for topic in topics]
    examples = []
    for task in TASKS:
        made = 0
        while made < per_task:
            topic = rng.choices(topics, sizes)[0]
            start = rng.randrange(max(1, len(words[topic]) - _WINDOW_WORDS + 1))
            window = Window(topic, words[topic][start : start + _WINDOW_WORDS])
            if (example := task.example(window, rng)) is not None:
                examples.append((task.name, example))
                made += 1
    rng.shuffle(examples)
    return examples


def held_out_examples(
    paragraphs: dict[str, list[str]], per_task: int, seed: int
) -> list[tuple[str, Example]]:
    """Up to `per_task` examples of every task from windows that do not overlap.

    Returns: (task name, example) pairs, task by task.
    """
    words = _words_by_topic(paragraphs)
    windows = [
        Window(topic, words[topic][start : start + _WINDOW_WORDS])
        for topic in words
        for start in range(0, len(words[topic]) - _SHORTEST_WINDOW + 1, _WINDOW_WORDS)
    ]
    examples = []
    for number, task in enumerate(TASKS):
        rng = random.Random(f"{seed}/{number}")
        made = [task.example(window, rng) for window in rng.sample(windows, len(windows))]
        suitable = [example for example in made if example is not None]
        examples += [(task.name, example) for example in suitable[:per_task]]
    return examples


def _words_by_topic(paragraphs: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """The words of each topic that has at least one window, without grammar rules and tables."""
    words = {
        topic: tuple(" ".join(t for t in texts if "::=" not in t and "+--" not in t).split())
        for topic, texts in paragraphs.items()
    }
    return {topic: run for topic, run in words.items() if len(run) >= _SHORTEST_WINDOW}
