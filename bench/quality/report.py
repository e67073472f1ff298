"""Write bench/quality/README.md and its plots from the JSON lines in bench/quality/results/.

    python bench/quality/report.py

Never edit that file: every number in it comes from a line, and every verdict from a rule below.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from quality import sections, sections_milora  # noqa: E402
from quality.lines import read  # noqa: E402
from quality.measured import Measured  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of JSONL")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of README.md and plots/")
    args = parser.parse_args(arguments)
    records = read(sorted(args.results.glob("*.jsonl")))
    if not records:
        parser.error(f"no finished run in {args.results}")
    (args.out / "plots").mkdir(parents=True, exist_ok=True)
    text = sections.HEAD
    for preset in dict.fromkeys(r["preset"] for r in records):
        measured = Measured([r for r in records if r["preset"] == preset])
        text += write(preset, measured, args.out)
    (args.out / "README.md").write_text(text + sections.FOOT)
    print(args.out / "README.md")
    return 0


def write(preset: str, measured: Measured, out: Path) -> str:
    """One preset's part of the report; sections without measurements are left out."""
    parts = [sections.machine(preset, measured)]
    stages = {r["stage"] for r in measured.records}
    if "main" in stages:
        parts += [
            sections.verdicts(measured),
            sections.multi_task(measured, out / "plots" / f"{preset}-methods.png"),
            sections.per_task(measured),
            sections.single_task(measured),
        ]
    if stages & {"controls", "long"}:
        parts.append(sections_milora.controls(measured))
    if "grid" in stages:
        parts.append(sections.grid(measured))
    if {"main", "ablations"} <= stages:
        parts += [
            sections_milora.ablations(measured, out / "plots" / f"{preset}-ablations.png"),
            sections_milora.scales(measured),
            sections_milora.defaults(measured),
        ]
    if "routing" in stages:
        parts.append(sections_milora.routing(measured, out / "plots", preset))
    return "\n".join(part for part in parts if part)


if __name__ == "__main__":
    sys.exit(main())
