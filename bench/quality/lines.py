"""The JSON lines of the experiments: what is there already, and how new ones are added.

Fields: preset, stage, method, trained_on ("all" or a task), setting, seed, task (evaluated, or
"mean" over the tasks trained on), metric, value, learning_rate, trainable, activated, hardware,
versions, commit, date. Metrics are `<split>/<name>`; a run's last line has the metric `seconds`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
LAST_METRIC = "seconds"
_RUN = ("preset", "stage", "method", "trained_on", "setting", "seed")


def run_key(record: Record) -> tuple:
    return tuple(record[name] for name in _RUN)


def read(paths: Iterable[Path]) -> list[Record]:
    """The records of whole runs; of a run that was repeated, the newest line of each metric.

    A last line that an interruption cut off is skipped. Any other broken line is an error.

    Raises:
        ValueError: a line is not JSON; it is named.
    """
    records: dict[tuple, Record] = {}
    for path in paths:
        lines = path.read_text("utf-8").split("\n") if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):  # a whole line ends with a line break
                    continue
                raise ValueError(f"{path}:{number}: not valid JSON: {error.msg}") from None
            records[(*run_key(record), record["task"], record["metric"])] = record
    finished = {run_key(r) for r in records.values() if r["metric"] == LAST_METRIC}
    return [r for r in records.values() if run_key(r) in finished]


class Writer:
    """Appends the lines of one run after the other. There is one writer, in the parent process."""

    def __init__(self, path: Path, common: Record):
        self.path, self.common = path, common
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        if text and not text.endswith(b"\n"):  # a line that an interruption cut off
            path.write_bytes(text[: text.rfind(b"\n") + 1])

    def add(self, records: list[Record]) -> None:
        text = "".join(json.dumps({**self.common, **record}) + "\n" for record in records)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
