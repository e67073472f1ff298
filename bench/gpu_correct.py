"""Write down which kernels the GPU tests have just seen correct, for GPU.md.

    python -m pytest -m cuda --junitxml=tests.xml tests/test_grouped_lora.py ...
    python bench/gpu_correct.py tests.xml --json build/gpu/gpu.jsonl

One line a kernel that runs on this GPU: how many of its tests passed and failed. A kernel is
correct if some passed and none failed; one whose tests were all skipped gets no line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import gpu_timing
import machine
from gpu_cases import KERNELS


def outcomes(report: Path) -> Iterator[tuple[str, str]]:
    """(module::test[parameters], passed | failed) of each test that was not skipped."""
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        if case.find("skipped") is None:
            bad = case.find("failure") is not None or case.find("error") is not None
            yield name, "failed" if bad else "passed"


def count(report: Path, capability: int) -> dict[str, dict[str, int]]:
    """Kernel -> how many of its tests passed and failed."""
    seen = list(outcomes(report))
    counts = {}
    for name, kernel in KERNELS.items():
        mine = [how for test, how in seen if re.search(kernel.tests, test)]
        if mine and kernel.runs_on(capability):
            counts[name] = {how: mine.count(how) for how in ("passed", "failed")}
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="pytest's --junitxml")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    capability = gpu_timing.capability("cuda")
    common = {
        "bench": "correct", "hardware": machine.hardware("cuda"), "capability": capability,
        "versions": machine.versions(), "commit": machine.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    with args.json.open("a") as file:
        for kernel, counts in count(args.report, capability).items():
            file.write(json.dumps({**common, "case": kernel, "kernel": kernel, **counts}) + "\n")
            print(f"{kernel}: {counts['passed']} passed, {counts['failed']} failed")


if __name__ == "__main__":
    main()
