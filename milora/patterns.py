"""Patterns that name modules: a dotted suffix or a regex. They come out of files, so they are
checked before anything is matched: one that backtracks without end would hang whoever loads it."""

from __future__ import annotations

import re
import sys
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as _sre
    from re import _parser
else:  # the same two modules under their old names
    import sre_constants as _sre
    import sre_parse as _parser

MAX_LENGTH = 1000
MAX_REPEATS = 4  # that can take more than one length: matching takes their number-th power of time
_REPEATS = {getattr(_sre, n) for n in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
            if hasattr(_sre, n)}  # fmt: skip
_BRANCHES = (_sre.BRANCH, _sre.GROUPREF, _sre.GROUPREF_EXISTS)


def matches(pattern: str, block: str, path: str) -> bool:
    """Whether `pattern` names the module at `path` inside the block at path `block`.

    It does as a dotted suffix of the whole path, or as a regex that matches all of `path` or all
    of the whole path.
    """
    whole = f"{block}.{path}"
    if whole == pattern or whole.endswith("." + pattern):
        return True
    return any(re.fullmatch(pattern, text) for text in (path, whole))


def problem_of(pattern: Any) -> str | None:
    """Why `pattern` cannot be used, or None if it can.

    Refused are what is no regex, and what may backtrack without end: a repeat or an alternative
    inside a repeat, as in `(a+)+` and `(a|aa)+`, and more than `MAX_REPEATS` open repeats in a row.
    """
    if not isinstance(pattern, str):
        return "is not a string"
    if len(pattern) > MAX_LENGTH:
        return f"is longer than {MAX_LENGTH} characters"
    try:
        re.compile(pattern)
        parsed = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is not a pattern: {error}"
    nested, repeats = _scan(parsed, False)
    if nested:
        return "has a repeat or an alternative inside a repeat, which can take forever to match"
    if repeats > MAX_REPEATS:
        return f"has {repeats} open repeats, which can take forever to match; at most {MAX_REPEATS}"
    return None


def _scan(parsed: Any, repeated: bool) -> tuple[bool, int]:
    """Whether what stands in a repeat can match in several ways; the number of open repeats."""
    nested, repeats = False, 0
    for operation, argument in parsed:
        inside = repeated
        if operation in _REPEATS:
            low, high, _ = argument
            is_open = low != high and high > 1
            nested |= repeated and low != high
            repeats += is_open
            inside = repeated or high > 1
        nested |= repeated and operation in _BRANCHES
        for part in _parts(argument):
            inner = _scan(part, inside)
            nested, repeats = nested or inner[0], repeats + inner[1]
    return nested, repeats


def _parts(argument: Any) -> list[Any]:
    """The parsed patterns inside an operation's argument."""
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    if isinstance(argument, tuple | list):
        return [part for item in argument for part in _parts(item)]
    return []
