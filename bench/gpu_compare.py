"""Providers of one problem, checked and timed side by side: what G1 and G3 have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gpu_providers
import machine
import torch
from gpu_problem import Problem
from gpu_timing import Calls, calls, num_copies, per_call, rounds
from measure import Report, Run, Times, interleaved
from peers import PeerAbsent, reason


@dataclass
class Setting:
    args: argparse.Namespace
    report: Report
    bandwidth: float  # bytes a second of copying
    capability: int  # 90 on Hopper, 0 on a CPU

    @property
    def repeat(self) -> int:
        return self.args.repeat or (3 if self.args.quick else 50)

    def absent(self, case: str, provider: str, dtype: torch.dtype, why: BaseException) -> None:
        """A line that says why a provider has no time."""
        text = reason(why)
        self.report.add(case, provider, dtype, "absent", 0.0, "", reason=text)
        print(f"    because {text}", flush=True)


def build(
    s: Setting, case: str, name: str, problems: Sequence[Problem], *, base: bool
) -> tuple[list[gpu_providers.Provider], Calls]:
    """One provider's calls on as many copies of the adapters as no cache holds.

    Args:
        problems: groups of modules that one step runs one after another.
        base: whether a call includes the modules themselves.
    Raises: PeerAbsent, if it cannot run here or its calls do not fit into a CUDA graph.
    """
    try:
        providers = [gpu_providers.make(name, problem) for problem in problems]
        for provider, problem in zip(providers, problems, strict=True):
            call = step(provider, problem, base)
            gpu_providers.check(f"{case}: {name}", provider, call, base=base)
        nbytes = sum(problem.active_bytes() for problem in problems)
        if base:
            nbytes += sum(w.nbytes for problem in problems for w in problem.weights.w)
        held = sum(problem.weights.adapter_bytes() for problem in problems)
        copies = num_copies(max(1, nbytes), s.args.device, quick=s.args.quick, held=held)
        functions = []
        for number in range(copies):
            for provider, problem in zip(providers, problems, strict=True):
                functions.append(step(provider, problem, base, again=number > 0))
        if not base:
            functions *= rounds(copies)
        made = calls(functions, s.args.device, parts=len(problems))
    except PeerAbsent:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if name in ("base", "milora"):
            raise  # without these there is nothing to compare
        raise PeerAbsent(f"{type(error).__name__}: {reason(error)}") from error
    return providers, made


def step(
    provider: gpu_providers.Provider, problem: Problem, base: bool, *, again: bool = False
) -> Callable[[], None]:
    """The provider's call, behind the modules' own where `base`; `again`: with other weights."""
    weights = problem.weights.copy() if again else problem.weights
    update = provider.call(weights)
    before = provider.base_call() if base else lambda: None

    def run() -> None:
        before()
        update()

    return run


def compare(
    s: Setting,
    case: str,
    names: Sequence[str],
    problems: Sequence[Problem],
    dtype: torch.dtype,
    *,
    base: bool,
) -> dict[str, Times]:
    """Seconds of one step of each provider; those that cannot run are reported as absent."""
    providers, made = {}, {}
    for name in names:
        try:
            providers[name], made[name] = build(s, case, name, problems, base=base)
        except PeerAbsent as why:
            s.absent(case, name, dtype, why)
    times = per_call(made, s.args.device, s.repeat, s.args.seconds)
    for name, parts in providers.items():
        if isinstance(parts[0], gpu_providers.Engine):
            seconds = metadata_seconds(parts, s)
            s.report.add(case, name, dtype, "metadata", seconds * 1e6, "us")
    return times


def metadata_seconds(engines: Sequence[gpu_providers.Engine], s: Setting) -> float:
    """Of preparing the batch's metadata once a step, which an engine's layers share: by the clock,
    since much of it runs on the CPU or waits for the GPU."""

    def prepare() -> None:
        machine.synchronize(s.args.device)
        engines[0].prepare()
        machine.synchronize(s.args.device)

    return interleaved({"prepare": Run(prepare)}, "cpu", min(s.repeat, 20))["prepare"].best
