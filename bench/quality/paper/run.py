"""Repeat one of the paper's tables: train with `milora train`, score with `milora eval`.

    python bench/quality/paper/run.py --table 1 --model ./Llama-2-7b-hf --data DIR --output DIR

Needs the weights in a local folder, the files of prepare.py in --data, and lm_eval. It goes on
where it stopped: a finished adapter is not trained again, a finished score not repeated. Results
are JSON lines in OUTPUT/results.jsonl and medians in OUTPUT/table<N>.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tables import METHODS, PAPER, SEEDS, TABLES, TASKS

ALL = "all"


@dataclass(frozen=True)
class Job:
    """One adapter: what it is trained on, and what it is scored on."""

    method: str
    seed: int
    trained_on: str
    tasks: tuple[str, ...]

    @property
    def folder(self) -> str:
        return f"{self.method}-{self.trained_on}-seed{self.seed}"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    records = []
    for job in jobs(args):
        adapter = args.output / job.folder
        if not (adapter / "adapter_config.json").exists():
            milora(train_command(args, job, adapter))
        scores = adapter / "scores.json"
        if not scores.exists():
            milora(eval_command(args, job, adapter, scores))
        found = json.loads(scores.read_text("utf-8"))["results"]
        for task in job.tasks:
            records.append({
                "table": args.table, "method": job.method, "trained_on": job.trained_on,
                "seed": job.seed, "task": task, "metric": "acc", "value": found[task]["acc"],
            })  # fmt: skip
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (args.output / "results.jsonl").write_text(lines, "utf-8")
    text = summary(args, records)
    (args.output / f"table{args.table}.md").write_text(text, "utf-8")
    print(text)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=int, choices=TABLES, required=True)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the weights")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="of prepare.py")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="A,B")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--include-path", metavar="DIR", help="folder with task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="score N documents of each task")
    parser.add_argument("--download", action="store_true", help="let tasks download data sets")
    parser.add_argument("--train", default="", metavar="OPTIONS",
                        help="more options of `milora train`, for what the paper does not say: "
                             "'--batch-size 16 --epochs 10 --gradient-checkpointing'")  # fmt: skip
    args = parser.parse_args(arguments)
    args.tasks = tuple(args.tasks.split(","))
    for task in args.tasks:
        if not (args.data / f"{task}.train.jsonl").is_file():
            parser.error(f"no {task}.train.jsonl in {args.data}: run prepare.py")
    return args


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    groups = [(ALL, args.tasks)] if TABLES[args.table].together else [
        (task, (task,)) for task in args.tasks
    ]  # fmt: skip
    for seed in args.seeds:
        for trained_on, tasks in groups:
            for method in args.methods:
                yield Job(method, seed, trained_on, tasks)


def train_command(args: argparse.Namespace, job: Job, adapter: Path) -> list[str]:
    if any(adapter.glob("checkpoint-*")):
        return ["train", "--resume", "--output", str(adapter)]
    options = [word for pair in PAPER.items() for word in pair] + METHODS[job.method]
    return [
        "train", "--model", args.model, "--output", str(adapter), "--seed", str(job.seed),
        "--data", data_file(args, job, "train"), "--dev-data", data_file(args, job, "dev"),
        *options, *args.train.split(),
    ]  # fmt: skip


def data_file(args: argparse.Namespace, job: Job, part: str) -> str:
    """The task's file; for all tasks together one that holds them all."""
    path = args.data / f"{job.trained_on}.{part}.jsonl"
    if job.trained_on == ALL:
        texts = [(args.data / f"{task}.{part}.jsonl").read_text("utf-8") for task in job.tasks]
        path = args.output / f"all.{part}.jsonl"
        path.write_text("".join(texts), "utf-8")
    return str(path)


def eval_command(args: argparse.Namespace, job: Job, adapter: Path, scores: Path) -> list[str]:
    command = ["eval", "--model", args.model, "--adapter", str(adapter), "--json", str(scores)]
    command += ["--tasks", ",".join(job.tasks)]
    command += ["--include-path", args.include_path] if args.include_path else []
    command += ["--limit", str(args.limit)] if args.limit else []
    return command + (["--download"] if args.download else [])


def milora(command: list[str]) -> None:
    """Run one `milora` command in a process of its own, which gives all its memory back.

    Raises:
        SystemExit: it failed; what it printed says why.
    """
    print("milora", *command, flush=True)
    code = subprocess.run([sys.executable, "-m", "milora", *command], check=False).returncode
    if code:
        raise SystemExit(code)


def summary(args: argparse.Namespace, records: list[dict]) -> str:
    """Median accuracy over the seeds, by method and task, and the mean over the tasks."""
    table = TABLES[args.table]
    kind = "one adapter for all tasks" if table.together else "one adapter a task"
    lines = [
        f"Table {args.table} ({table.backbone}; {kind}): median accuracy over {len(args.seeds)} "
        f"seeds, model {args.model}", "",
        "| | " + " | ".join([*args.tasks, "mean"]) + " |", "|---" * (len(args.tasks) + 2) + "|",
    ]  # fmt: skip
    for method in args.methods:
        medians = [
            statistics.median(
                r["value"] for r in records if (r["method"], r["task"]) == (method, task)
            )
            for task in args.tasks
        ]
        cells = [*medians, statistics.fmean(medians)]
        lines.append(f"| {method} | " + " | ".join(f"{100 * v:.1f}" for v in cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
