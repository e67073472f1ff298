"""The error of a user's mistake: the command line prints it alone, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right: a missing file, a bad line, an unknown name.

    Args:
        message: what is wrong, with the value that was given.
        hint: what to do about it, printed on a line of its own.
    """

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


def suggestion(name: str, known: Iterable[str], limit: int = 3) -> str:
    """' Did you mean ...?' with the closest of `known`, or '' if none is close."""
    close = difflib.get_close_matches(name, sorted(set(known)), n=limit, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


class AdapterError(UserError, ValueError):
    """An adapter's files are damaged, or do not fit the model; the model was not touched."""


class PoolError(UserError, RuntimeError):
    """An adapter pool cannot do what was asked for now: too few bytes or slots, in use, closed."""
