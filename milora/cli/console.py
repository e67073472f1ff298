"""What a command prints: progress and notes on stderr, results on stdout, JSON where asked."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from milora.errors import UserError


def stderr() -> Console:
    """Made anew on each use, since tests and callers swap `sys.stderr`."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def stdout() -> Console:
    return Console(highlight=False, soft_wrap=True)


def note(text: str) -> None:
    stderr().print(text, markup=False)


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Progress]:
    """A bar on a terminal. Elsewhere one plain line at the start: logs are not for bars."""
    console = stderr()
    if not console.is_terminal:
        note(f"{description} ({total})")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        bar.add_task(description, total=total, status="")
        yield bar


def add_json_option(parser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON to FILE; - is standard output"
    )


def write_json(target: str | None, result: dict[str, Any]) -> None:
    """Write `result` where `--json` says.

    Raises:
        UserError: the file cannot be written.
    """
    if target is None:
        return
    text = json.dumps(result, indent=2)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None


def print_table(
    title: str,
    rows: list[tuple[str, ...]],
    columns: tuple[str, ...],
    *,
    show_header: bool = True,
) -> None:
    """A table on stdout; numbers on the right, names on the left."""
    table = Table(title=title, title_justify="left", show_header=show_header)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    stdout().print(table)


@contextlib.contextmanager
def writable_folder(path: Path) -> Iterator[None]:
    """Make the folder now: an hour of training must not end at a folder that cannot be made.

    An error inside removes the folders that this made, as far as nothing was written to them.

    Raises:
        UserError: it cannot be made or written.
    """
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".milora-write-test"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"cannot write to folder {path}: {error.strerror}") from None
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_writable_file(path: Path) -> None:
    """Open the file now: an hour of work must not end at a file that cannot be written.

    One that is there keeps its content, and a new one is removed again.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        if not path.absolute().parent.is_dir():
            raise UserError(f"cannot write {path}: there is no such folder")
        if path.exists() and not path.is_file() and not path.is_dir():
            return  # opening a pipe would wait for its reader
        new = not os.path.lexists(path)
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
