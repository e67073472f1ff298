"""Write down which kernels the GPU tests have just seen correct, for GPU.md.

    python -m pytest -m cuda --junitxml=build/gpu/test_cores.xml tests/test_cores.py
    python bench/gpu_correct.py build/gpu/test_*.xml --json build/gpu/gpu.jsonl

One line a kernel that runs on this GPU: how many of its tests passed and failed. A kernel is
correct if some passed and none failed; one whose tests were all skipped gets no line. Of a file
whose process ended without a report all tests failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import gpu_timing
import machine
from gpu_cases import KERNELS

TESTS = Path(__file__).parents[1] / "tests"


def outcomes(report: Path) -> Iterator[tuple[str, str]]:
    """(module::test[parameters], passed | failed) of each test that was not skipped.

    Raises: FileNotFoundError, if neither the report nor a test file of its name is there.
    """
    if not report.exists():
        yield from ((name, "failed") for name in collected(report.stem))
        return
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        if case.find("skipped") is None:
            bad = case.find("failure") is not None or case.find("error") is not None
            yield name, "failed" if bad else "passed"


def collected(module: str) -> list[str]:
    file = TESTS / f"{module}.py"
    if not file.exists():
        raise FileNotFoundError(f"there is no report on {module}, and no {file}")
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "--collect-only", file]
    found = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, check=True)
    return [
        f"{module}{test}"
        for test in re.findall(rf"^tests/{module}\.py(::.*)$", found.stdout, re.MULTILINE)
    ]


def count(reports: list[Path], capability: int) -> dict[str, dict[str, int]]:
    """Kernel -> how many of its tests passed and failed."""
    seen = [outcome for report in reports for outcome in outcomes(report)]
    counts = {}
    for name, kernel in KERNELS.items():
        mine = [how for test, how in seen if re.search(kernel.tests, test)]
        if mine and kernel.runs_on(capability):
            counts[name] = {how: mine.count(how) for how in ("passed", "failed")}
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", metavar="report",
                        help="pytest's --junitxml")  # fmt: skip
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    capability = gpu_timing.capability("cuda")
    common = {
        "bench": "correct", "hardware": machine.hardware("cuda"), "capability": capability,
        "versions": machine.versions(), "commit": machine.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    with args.json.open("a") as file:
        for kernel, counts in count(args.reports, capability).items():
            file.write(json.dumps({**common, "case": kernel, "kernel": kernel, **counts}) + "\n")
            print(f"{kernel}: {counts['passed']} passed, {counts['failed']} failed")


if __name__ == "__main__":
    main()
