"""How the benches measure and write: providers side by side in one run, the minimum of many.

Providers take turns in an order that changes every round, so that a slow spell of the machine hits
all of them and nobody always runs behind the same one. Each reports its fastest run, which is the
one least disturbed. Times are taken with events on a GPU.

A JSON line holds bench, case, provider, dtype, metric, value, unit, ratio, ratio_to, floor,
hardware, versions, commit, date, and what else describes the case (isa, threads, rank, batch, ...).
The `ratio` of a time is provider ÷ `ratio_to`, so lower is better; `floor` is the smallest ratio
that this machine's memory (or arithmetic) would allow.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import torch

POPULARITIES = ("distinct", "uniform", "zipf", "identical")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOW = 8.0  # a provider this many times slower than the fastest is timed twice and then left out
ZIPF = 1.5  # exponent, as in Punica's mixes


def parser(description: str, cases: Sequence[str]) -> argparse.ArgumentParser:
    """The options that all benches share."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="smaller and fewer runs")
    options.add_argument("--case", nargs="+", choices=cases, default=list(cases), metavar="CASE",
                         help=f"of {', '.join(cases)}")  # fmt: skip
    options.add_argument("--json", type=Path, metavar="FILE", help="append JSON lines to FILE")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options.add_argument("--popularity", nargs="+", choices=POPULARITIES, default=["distinct"],
                         help="which adapters the rows of a batch ask for")  # fmt: skip
    options.add_argument("--repeat", type=int, help="rounds, instead of the case's own number")
    return options


def popularity(kind: str, num_rows: int, num_adapters: int, seed: int = 0) -> list[int]:
    """The adapter of each row: all different, drawn evenly, drawn by Zipf's law, all the same."""
    draw = random.Random(seed)
    if kind == "distinct":
        return [row % num_adapters for row in range(num_rows)]
    if kind == "identical":
        return [0] * num_rows
    weights = [1.0 if kind == "uniform" else (i + 1) ** -ZIPF for i in range(num_adapters)]
    return draw.choices(range(num_adapters), weights, k=num_rows)


# ---- timing -----------------------------------------------------------------------------------


@dataclass
class Run:
    """What to time, and what to put right again after each run, outside of the time."""

    step: Callable[[], object]
    reset: Callable[[], object] = lambda: None


@dataclass
class Times:
    """Seconds of one provider's runs."""

    runs: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.runs)

    @property
    def median(self) -> float:
        return statistics.median(self.runs)


def interleaved(
    runs: dict[str, Run], device: str, repeat: int, seconds: float = float("inf")
) -> dict[str, Times]:
    """Time providers in turns, `repeat` rounds or (at least three) until `seconds` have passed."""
    times = {name: Times() for name in runs}
    for run in runs.values():
        time_once(run, device)
    names = list(runs)
    begin = time.perf_counter()
    for number in range(repeat):
        shift = number % len(names)
        order = names[shift:] + names[:shift]
        for name in reversed(order) if number % 2 else order:
            if number < 2 or times[name].best < SLOW * min(t.best for t in times.values()):
                times[name].runs.append(time_once(runs[name], device))
        if number >= 2 and time.perf_counter() - begin > seconds:
            break
    return times


def time_once(run: Run, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run.step()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
    else:
        begin = time.perf_counter()
        run.step()
        seconds = time.perf_counter() - begin
    run.reset()
    return seconds


# ---- writing ----------------------------------------------------------------------------------


class Report:
    """Prints a line per measurement and appends it to the JSON file."""

    def __init__(self, bench: str, args: argparse.Namespace):
        from milora import _build

        torch.set_num_threads(args.threads)
        self.path: Path | None = args.json
        self.common = {
            "bench": bench,
            "hardware": machine.hardware(args.device),
            "versions": machine.versions(),
            "isa": _build.cpu_isa() if args.device == "cpu" else "cuda",
            "threads": args.threads,
            "quick": args.quick,
            "commit": machine.commit(),
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
        *,
        ratio: float | None = None,
        ratio_to: str | None = None,
        floor: float | None = None,
        **extra: Any,
    ) -> None:
        name = str(dtype).removeprefix("torch.")
        text = f"{case:28} {provider:12} {name:9} {metric:16} {value:10.3f} {unit:8}"
        text += "" if ratio is None else f" ratio {ratio:6.3f} to {ratio_to}"
        text += "" if floor is None else f", floor {floor:.3f}"
        if "registered" in extra:
            text += f"  ({extra['registered']} registered, {extra['popularity']})"
        print(text.rstrip(), flush=True)
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
            "ratio_to": ratio_to,
            "floor": floor,
            **extra,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def time(
        self,
        case: str,
        provider: str,
        dtype: torch.dtype,
        metric: str,
        times: dict[str, Times],
        *,
        to: str = "base",
        unit: str = "ms",
        **extra: Any,
    ) -> None:
        """The fastest run of `provider`, with its ratio to the fastest run of `to`."""
        scale = {"ms": 1e3, "us": 1e6}[unit]
        mine = times[provider]
        self.add(case, provider, dtype, metric, mine.best * scale, unit,
                 ratio=mine.best / times[to].best, ratio_to=to,
                 median=mine.median * scale, repeats=len(mine.runs), **extra)  # fmt: skip
