"""What the report and plot scripts do with JSON lines: keep them, and find the newest of each."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# What tells two measurements apart; whoever agrees in all of it is the same one, measured again.
KEY = (
    "bench", "case", "dtype", "provider", "metric", "shape", "rank", "batch", "tenants",
    "popularity", "registered", "threads", "pool", "quick",
)  # fmt: skip


def read(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.strip()]


def collect(store: Path, paths: Iterable[Path]) -> list[dict]:
    """The records of `store`, to which those of `paths` are added."""
    records = read(store)
    new = [record for path in paths for record in read(path) if record not in records]
    if new:
        store.parent.mkdir(parents=True, exist_ok=True)
        with store.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in new)
    return records + new


def newest(records: list[dict]) -> list[dict]:
    """The last measurement of each, in the order of their first."""
    last: dict[tuple, dict] = {}
    for record in sorted(records, key=lambda r: r["date"]):
        last[tuple(record.get(name) for name in KEY)] = record
    return list(last.values())


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("jsonl", nargs="*", type=Path, help="more measurements, kept with the rest")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what is kept")
    return parser.parse_args()


def ratio(record: dict | None) -> str:
    return "" if record is None or record.get("ratio") is None else f"{record['ratio']:.3f}"


def floor(record: dict | None) -> str:
    return "" if record is None or record.get("floor") is None else f"{record['floor']:.3f}"


def table(head: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:], ""])


def everything(records: list[dict], *, hardware: bool) -> str:
    """All newest measurements that have a ratio or stand alone, one line each."""
    head = ("bench", "case", "dtype", "provider", "metric", "value", "ratio", "to", "floor")
    rows = []
    for r in records:
        case = r["case"]
        if r.get("registered"):
            case += f", {r['registered']} registered, {r['popularity']}"
        row = [r["bench"], case, r["dtype"], r["provider"], r["metric"]]
        row += [f"{r['value']:.4g} {r['unit']}", ratio(r), r.get("ratio_to") or "", floor(r)]
        rows.append(row + ([r["hardware"]] if hardware else []))
    return table((*head, "on") if hardware else head, rows)
