"""How the benches measure and write: providers side by side in one run, the minimum of many.

Providers take turns, so that a slow spell of the machine hits all of them; each reports its fastest
run, which is the one least disturbed. On a GPU a run is timed with events around it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    parser.add_argument("--json", type=Path, help="append JSON lines to this file")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def fastest(runs: dict[str, Callable[[], object]], device: str, repeat: int) -> dict[str, float]:
    """Seconds of each provider's fastest run, interleaved."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(repeat):
        for name, run in runs.items():
            best[name] = min(best[name], time_once(run, device))
    return best


def time_once(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return found.stdout.strip() or "unknown"


class Report:
    """Prints a line per measurement and appends it to the JSON file."""

    def __init__(self, bench: str, args: argparse.Namespace):
        from milora import __version__, _build

        self.path = args.json
        self.common = {
            "bench": bench,
            "hardware": hardware(args.device),
            "versions": {"torch": torch.__version__, "milora": __version__},
            "isa": _build.cpu_isa() if args.device == "cpu" else "cuda",
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }

    def add(
        self,
        case: str,
        provider: str,
        dtype: torch.dtype,
        metric: str,
        value: float,
        unit: str,
        ratio: float | None = None,
    ) -> None:
        """ratio: this provider's value over that of the case's yardstick, where there is one."""
        name = str(dtype).removeprefix("torch.")
        suffix = "" if ratio is None else f"  ratio {ratio:.3f}"
        print(f"{case:34} {provider:12} {name:9} {metric:10} {value:10.2f} {unit}{suffix}")
        if self.path is None:
            return
        record = {
            **self.common,
            "case": case,
            "provider": provider,
            "dtype": name,
            "metric": metric,
            "value": value,
            "unit": unit,
            "ratio": ratio,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
