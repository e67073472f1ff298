"""The demo's text: the language reference that ships inside Python, split by topic.

`pydoc_data.topics` holds about 465 kB of English under 79 topic names ("for", "string-methods").
Topics quote one another at length: "compound" repeats nearly all of "for", "while" and "try". So a
split by topic name alone would leak. Here every paragraph belongs to one topic only, the smallest
that has it, and a held-out paragraph that shares a run of words with the training text is dropped.
"""

import random
import re
from dataclasses import dataclass
from pydoc_data.topics import topics as _PYDOC_TOPICS

# A run of this many words in both splits counts as a leak: shorter ones are set phrases
# ("the value of the object is") that any two pages of a manual share.
SHINGLE_WORDS = 12
_HELD_OUT_SHARE = 0.15
_LARGEST_HELD_OUT = 0.05  # of all text: a bigger topic would be the held-out set by itself
_SPLIT_SEED = 20240  # fixed, apart from --seed: the cached base must never have seen these topics

_RULE = re.compile(r"^\s*([*=\-~^])\1{2,}\s*$", re.MULTILINE)  # the line under a heading
_BLANK_LINES = re.compile(r"\n\s*\n")
_NON_WORD = re.compile(r"\W+")


@dataclass(frozen=True)
class Corpus:
    """Paragraphs by topic; every paragraph is one line of single-spaced text, in page order."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]

    def train_text(self) -> str:
        return "\n\n".join("\n".join(paragraphs) for paragraphs in self.train.values())


def load_corpus() -> Corpus:
    """Read, deduplicate and split the topics. Deterministic for one Python version."""
    owned = _unique_paragraphs(_PYDOC_TOPICS)
    held_out_names = _choose_held_out(owned)
    train = {name: owned[name] for name in sorted(owned) if name not in held_out_names}
    seen = {run for paragraphs in train.values() for text in paragraphs for run in shingles(text)}
    held_out = {
        name: kept
        for name in sorted(held_out_names)
        if (kept := [text for text in owned[name] if seen.isdisjoint(shingles(text))])
    }
    return Corpus(train, held_out)


def shingles(text: str) -> set[tuple[str, ...]]:
    """Every run of `SHINGLE_WORDS` words in `text`, lower case and without punctuation."""
    words = _NON_WORD.sub(" ", text).lower().split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def _unique_paragraphs(topics: dict[str, str]) -> dict[str, list[str]]:
    owned: dict[str, list[str]] = {}
    taken: set[str] = set()
    # Smallest first: "for" keeps its own paragraphs, "compound" keeps what nobody else has.
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        paragraphs = []
        for raw in _BLANK_LINES.split(_RULE.sub("", topics[name])):
            text = " ".join(raw.split())
            key = _NON_WORD.sub(" ", text).strip().lower()
            if key and key not in taken:
                taken.add(key)
                paragraphs.append(text)
        if paragraphs:
            owned[name] = paragraphs
    return owned


def _choose_held_out(owned: dict[str, list[str]]) -> set[str]:
    sizes = {name: sum(map(len, paragraphs)) for name, paragraphs in owned.items()}
    total = sum(sizes.values())
    names = sorted(name for name in owned if sizes[name] <= _LARGEST_HELD_OUT * total)
    random.Random(_SPLIT_SEED).shuffle(names)
    chosen: set[str] = set()
    for name in names:
        if sum(sizes[other] for other in chosen) >= _HELD_OUT_SHARE * total:
            break
        chosen.add(name)
    return chosen
