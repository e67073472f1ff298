"""Training and dev files for the tables, made from lm-evaluation-harness's own task definitions.

    python bench/quality/paper/prepare.py --data DIR                     # from the local cache
    python bench/quality/paper/prepare.py --data DIR --download          # fetch data sets first
    python bench/quality/paper/prepare.py --data DIR --tasks mine --include-path ./my_tasks

Writes `<task>.train.jsonl` and `<task>.dev.jsonl` with a prompt and its right answer a line, in the
very form in which the harness later asks. The dev part is a seeded share of the *training* split,
since the harness scores on validation or test: no scored example is trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from tables import TASKS

DEV_SHARE, MOST_DEV = 0.05, 1000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="where files go")
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="A,B")
    parser.add_argument("--include-path", metavar="DIR", help="folder with task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N training examples a task")
    parser.add_argument("--seed", type=int, default=0, help="of the dev split")
    parser.add_argument("--download", action="store_true", help="let data sets be downloaded")
    args = parser.parse_args(arguments)
    if not args.download:
        from milora.cli.eval import _datasets_offline

        _datasets_offline()
    from lm_eval.tasks import TaskManager, get_task_dict

    names = args.tasks.split(",")
    args.data.mkdir(parents=True, exist_ok=True)
    for name, task in get_task_dict(names, TaskManager(include_path=args.include_path)).items():
        if not task.has_training_docs():
            parser.error(f"task {name} has no training split")
        rows = [example_of(task, document) for document in task.training_docs()]
        random.Random(args.seed).shuffle(rows)
        rows = rows[: args.limit]
        size = max(1, min(MOST_DEV, round(DEV_SHARE * len(rows))))
        write(args.data / f"{name}.dev.jsonl", rows[:size])
        write(args.data / f"{name}.train.jsonl", rows[size:])
        print(f"{name}: {len(rows) - size} to train on, {size} for dev")
    return 0


def example_of(task: Any, document: dict) -> dict[str, str]:
    """One document as the harness shows it, with the right answer.

    Three forms: a context with candidate answers (most), candidate contexts with one answer
    (WinoGrande), and a context with a written answer.
    """
    text, target = task.doc_to_text(document), task.doc_to_target(document)
    delimiter = task.config.target_delimiter
    if task.OUTPUT_TYPE != "multiple_choice":
        return {"prompt": text, "completion": f"{delimiter}{target}"}
    choices = task.doc_to_choice(document)
    if task.multiple_input:
        return {"prompt": choices[text], "completion": f"{delimiter}{target}"}
    right = choices.index(target) if isinstance(target, str) else target
    return {"prompt": text, "completion": f"{delimiter}{choices[right]}"}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
