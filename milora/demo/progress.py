"""Progress that reads well on a terminal (a bar) and in a log (a line per tenth)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from milora.cli import console


@contextlib.contextmanager
def bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far a loop of `total` steps is; call the result with the number of steps done."""
    with console.progress(description, total) as progress:
        on_terminal = progress.console.is_terminal

        def show(done: int) -> None:
            progress.update(progress.task_ids[0], completed=done)
            # `done * 10 // total` grows by one at each tenth
            if not on_terminal and done * 10 // total > (done - 1) * 10 // total:
                console.note(f"{description}: {done}/{total}")

        yield show
