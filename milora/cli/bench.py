"""`milora bench`: run the benches of a checkout and print what they measured as tables."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import milora
from milora.cli.console import note
from milora.errors import UserError, suggestion

# bench -> its cases; each is bench/bench_<name>.py of the source checkout
BENCHES = {
    "grouped_lora": ("decode", "prefill", "train"),
    "prompt_router": ("forward", "pool", "backward"),
    "multitenant": ("c1", "c2", "c3", "c4", "t1"),
}
RIVALS = ("stacked", "peft", "reference")

EPILOG = """examples:
  milora bench --quick
  milora bench multitenant --case c1 c2 --json results.jsonl
  milora bench multitenant --pass --profile --rank 8 64

The benches are part of milora's source checkout, not of the installed package.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "benches",
        nargs="*",
        metavar="BENCH",
        help=f"{', '.join(BENCHES)} (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="smaller and fewer runs")
    parser.add_argument("--case", nargs="+", metavar="CASE", help="only these cases")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's own choice")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--json", metavar="FILE", help="append JSON lines to FILE; - prints them")
    parser.add_argument(
        "--pass",
        dest="own",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="...",
        help="all that follows goes to the bench (its own options: python bench/bench_*.py --help)",
    )


def run(namespace: argparse.Namespace) -> int:
    chosen = choose(namespace.benches, namespace.case)
    folder = checkout()
    with tempfile.TemporaryDirectory() as temporary:
        lines = Path(temporary) / "bench.jsonl"
        for name, cases in chosen.items():
            note(f"== {name}")
            options = [*shared(namespace), "--case", *cases, *namespace.own]
            run_bench(folder / f"bench_{name}.py", ["--json", str(lines), *options])
        text = lines.read_text() if lines.exists() else ""
    if namespace.json == "-":
        print(text, end="")
        return 0
    if namespace.json:
        with open(namespace.json, "a", encoding="utf-8") as file:
            file.write(text)
    print_tables([json.loads(line) for line in text.splitlines()])
    return 0


def checkout() -> Path:
    """The folder of the benches.

    Raises:
        UserError: this milora was installed without its sources.
    """
    folder = Path(milora.__file__).resolve().parents[1] / "bench"
    if not (folder / "bench_multitenant.py").is_file():
        raise UserError(
            f"milora bench needs a source checkout: there are no benches at {folder}",
            hint="install the checkout with `pip install --no-build-isolation -e .`",
        )
    return folder


def choose(names: list[str], cases: list[str] | None) -> dict[str, list[str]]:
    """The benches to run, each with its cases.

    Raises:
        UserError: a bench or a case that does not exist.
    """
    for name in names:
        if name not in BENCHES:
            raise UserError(
                f"milora bench: unknown bench {name!r}.{suggestion(name, BENCHES)}",
                hint=f"the benches are {', '.join(BENCHES)}",
            )
    wanted = {name: BENCHES[name] for name in names or BENCHES}
    if cases is None:
        return {name: list(known) for name, known in wanted.items()}
    every = [case for known in wanted.values() for case in known]
    for case in cases:
        if case not in every:
            raise UserError(f"--case: {case!r} must be one of {', '.join(every)}")
    chosen = {name: [case for case in cases if case in known] for name, known in wanted.items()}
    return {name: found for name, found in chosen.items() if found}


def shared(namespace: argparse.Namespace) -> list[str]:
    """The options that all benches know, as words."""
    words = ["--quick"] if namespace.quick else []
    for name in ("threads", "device"):
        if (value := getattr(namespace, name)) is not None:
            words += [f"--{name}", str(value)]
    return words + (["--dtype", *namespace.dtype] if namespace.dtype else [])


def run_bench(script: Path, options: list[str]) -> None:
    """Run one bench; what it prints meanwhile goes to stderr.

    Raises:
        UserError: it failed; why stands above.
    """
    paths = [str(script.parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(script), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout:
            note(line.rstrip())
    if process.returncode:
        raise UserError(f"{script.name} ended with exit code {process.returncode}; see above")


def print_tables(records: list[dict[str, Any]]) -> None:
    """Per bench and dtype a table: milora's value, everybody's ratio, and milora's floor.

    Plain text as wide as it must be: a terminal's width would cut the numbers off.
    """
    tables: dict[tuple, dict[tuple, dict[str, dict]]] = {}
    for record in records:
        case = record["case"]
        if "registered" in record:
            case += f", {record['registered']} registered, {record['popularity']}"
        row = (case, record["metric"], record["ratio_to"] or "")
        table = tables.setdefault((record["bench"], record["dtype"]), {})
        table.setdefault(row, {})[record["provider"]] = record
    for (bench, dtype), rows in tables.items():
        lines = [("case", "metric", "milora", "ratio", *RIVALS, "to", "floor")]
        for (case, metric, to), of in rows.items():
            ours = of.get("milora")
            if ours is None:
                continue  # the yardstick alone: memory's bandwidth, the base of c4
            ratios = [_number(of.get(name), "ratio") for name in ("milora", *RIVALS)]
            value = f"{ours['value']:.4g} {ours['unit']}"
            lines.append((case, metric, value, *ratios, to, _number(ours, "floor")))
        print(f"\n{bench}, {dtype}")
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = [
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            print("  ".join(cells).rstrip())


def _number(record: dict | None, field: str) -> str:
    value = None if record is None else record[field]
    return "" if value is None else f"{value:.3f}"
