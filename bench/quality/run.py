"""Run the quality experiments and append what they measure to a file of JSON lines.

    python bench/quality/run.py --preset cpu-small --json bench/quality/results/cpu-small.jsonl --jobs 2
    python bench/quality/report.py

A run whose lines are in the file already is not repeated, so an interrupted experiment goes on
where it stopped. Each job is a process with one torch thread.
"""  # noqa: E501

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCH)]  # worker processes import this file anew, and need it too

import machine  # noqa: E402
import torch  # noqa: E402

from milora.demo.command import cache_folder  # noqa: E402
from quality import plan  # noqa: E402
from quality.base import load_or_pretrain  # noqa: E402
from quality.experiment import MEAN, Experiment  # noqa: E402
from quality.lines import Record, Writer, read  # noqa: E402
from quality.methods import METHODS  # noqa: E402
from quality.plan import STAGES, Run  # noqa: E402
from quality.presets import PRESETS, Preset  # noqa: E402

_experiment: Experiment | None = None  # of a worker process


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    preset, cache = PRESETS[args.preset], cache_folder(args.cache)
    torch.set_num_threads(args.jobs)
    base = load_or_pretrain(preset.base, cache, args.device, _show_pretraining)
    print(f"base: {base.model.num_parameters():,} parameters, in {base.folder}", flush=True)
    torch.set_num_threads(1)
    common = {
        "preset": args.preset,
        "hardware": machine.hardware(args.device),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    writer = Writer(args.json, common)
    setup = (args.preset, cache, args.device)
    with workers(args.jobs, setup) as execute_all:
        for stage in (stage for stage in STAGES if stage in args.stage):
            run_stage(stage, preset, args, writer, execute_all)
    return 0


@contextlib.contextmanager
def workers(jobs: int, setup: tuple) -> Iterator[Callable]:
    """A function that executes runs and yields their records as they are done."""
    if jobs == 1:
        _start_worker(*setup)
        yield lambda runs: map(_execute, runs)
        return
    # spawn: a fork after torch has started its threads may hang
    with multiprocessing.get_context("spawn").Pool(jobs, _start_worker, setup) as pool:
        yield lambda runs: pool.imap_unordered(_execute, runs)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu-small")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="append to FILE")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cache", metavar="DIR", help="folder of the base (default: the user's)")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    return args


def run_stage(stage: str, preset: Preset, args, writer: Writer, execute_all) -> None:
    """Run what is missing of one stage; a line on stdout per finished run."""
    records = [r for r in read([args.json]) if r["preset"] == args.preset]
    done = {(r["stage"], r["method"], r["trained_on"], r["setting"], r["seed"]) for r in records}
    runs = [run for run in runs_of(stage, preset, records) if run.key() not in done]
    print(f"{stage}: {len(runs)} runs", flush=True)
    started = time.perf_counter()
    for number, found in enumerate(execute_all(runs), start=1):
        writer.add(found)
        print(_line(found), f"[{number}/{len(runs)}, {time.perf_counter() - started:.0f} s]",
              flush=True)  # fmt: skip


def runs_of(stage: str, preset: Preset, records: list[Record]) -> Iterator[Run]:
    """The runs of a stage; all but the grid need the grid's records for their learning rates."""
    if stage == "grid":
        return plan.grid_runs(preset)
    best = best_rates(records)
    if stage in ("controls", "long"):
        return plan.control_runs(stage, preset, best)
    make = {"main": plan.main_runs, "ablations": plan.ablation_runs, "routing": plan.routing_runs}
    return make[stage](preset, best)


def best_rates(records: list[Record]) -> dict[str, float]:
    """Each method's learning rate with the lowest loss on dev values.

    Raises:
        ValueError: the grid has not been run for every method.
    """
    found: dict[str, dict[float, float]] = {}
    for r in records:
        if r["stage"] == "grid" and r["metric"] == "dev/loss" and r["task"] == MEAN:
            found.setdefault(r["method"], {})[r["learning_rate"]] = r["value"]
    if missing := [method for method in METHODS if method not in found]:
        raise ValueError(f"quality: run --stage grid first; it is missing for {', '.join(missing)}")
    return {method: min(losses, key=losses.__getitem__) for method, losses in found.items()}


def _start_worker(preset: str, cache: Path, device: str) -> None:
    global _experiment
    torch.set_num_threads(1)
    _experiment = Experiment(PRESETS[preset], cache, device)


def _execute(run: Run) -> list[Record]:
    return _experiment.execute(run)


def _line(found: list[Record]) -> str:
    first = found[0]
    values = {r["metric"]: r["value"] for r in found if r["task"] == MEAN}
    return (
        f"{first['method']:10} {first['trained_on']:6} {first['setting']:26} seed {first['seed']} "
        f"exact {values['test/exact_match']:.3f} loss {values['test/loss']:.3f} "
        f"{values['seconds']:.1f} s"
    )


def _show_pretraining(step: int, loss: float) -> None:
    if step % 100 == 0:
        print(f"pre-training: step {step}, loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
