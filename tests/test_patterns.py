"""Patterns that name modules: what they match, and which ones are refused."""

from __future__ import annotations

import time

import pytest

from milora import MiLoRAConfig
from milora.patterns import MAX_LENGTH, MAX_REPEATS, matches, problem_of

PATH = "self_attn.q_proj"
BLOCK = "model.layers.11"


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "self_attn.q_proj",
        "layers.11.self_attn.q_proj",
        "model.layers.11.self_attn.q_proj",
        ".*q_proj",
        r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj",
        r"model\.layers\.(?:1[0-5]|\d)\..*(q|v)_proj",
        r"(self_attn\.)?[kq]_proj",
        r"(?!mlp).*\.q_proj",
        r"self_attn\.\w{1,3}proj",
    ],
)
def test_matches(pattern):
    assert problem_of(pattern) is None
    assert matches(pattern, BLOCK, PATH)
    assert not matches(pattern, BLOCK, "mlp.up_proj")


@pytest.mark.parametrize("pattern", ["proj", "attn.q_proj", "layers.1.self_attn.q_proj", "Q_PROJ"])
def test_does_not_match(pattern):
    assert not matches(pattern, BLOCK, PATH)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is not a pattern"),
        ("a{99999999999999}", "is not a pattern"),
        (7, "is not a string"),
        ("a" * (MAX_LENGTH + 1), "longer than"),
        ("(a+)+$", "repeat inside|inside a repeat"),
        ("(a|aa)+$", "inside a repeat"),
        ("((a?b?)*)*c", "inside a repeat"),
        ("(?:x(?=(a*))){2,9}", "inside a repeat"),
        (r"(a)(\1|b)*x", "inside a repeat"),
        (".*" * (MAX_REPEATS + 1) + "x", "open repeats"),
    ],
)
def test_refused(pattern, message):
    problem = problem_of(pattern)
    assert problem is not None
    assert any(part in problem for part in message.split("|"))
    with pytest.raises(ValueError, match="target_modules"):
        MiLoRAConfig(target_modules=[pattern])


def test_what_is_allowed_ends_soon():
    """The slowest shape that passes, on a path as long as they come."""
    begin = time.process_time()
    assert not matches(".*" * MAX_REPEATS + "!", "model.layers.100", "self_attn.q_proj" * 3)
    assert time.process_time() - begin < 5
