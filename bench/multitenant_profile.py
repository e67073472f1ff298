"""Where the time goes that MiLoRA adds to a forward of the base (`--profile`).

    added = ops + python      ops: seconds inside milora's ops; python: all that is around them
    ops >= floor              what the case's floor adds to the base

Python is measured by leaving the ops out: the same forward with ops that do nothing, minus the
base. What the ops take is measured inside a forward, with a clock around each call.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import machine
from measure import Run, interleaved
from providers import INFERENCE_OPS, replaced_ops
from setting import Setting


class OpClock:
    """Calls of milora's ops and the seconds inside them, of the fastest forward."""

    def __init__(self, device: str):
        self.device = device
        self.best: tuple[float, int, float] = (float("inf"), 0, 0.0)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        self.seconds = dict.fromkeys(INFERENCE_OPS, 0.0)
        self.calls = 0
        makers = {name: lambda op, name=name: self._timed(name, op) for name in INFERENCE_OPS}
        with replaced_ops(makers):
            yield
        total = sum(self.seconds.values())
        self.best = min(self.best, (total, self.calls, total - self.seconds["grouped_lora_"]))

    def _timed(self, name: str, op: Callable) -> Callable:
        def run(*args, **kwargs):
            machine.synchronize(self.device)
            begin = time.perf_counter()
            result = op(*args, **kwargs)
            machine.synchronize(self.device)
            self.seconds[name] += time.perf_counter() - begin
            self.calls += 1
            return result

        return run


def run(s: Setting, case: str, base: Run, ours: Run, floor: float) -> None:
    """Print and record the parts.

    Args:
        base, ours: the runs that the case times.
        floor: seconds that the case's floor adds to the base.

    Raises: RuntimeError if no op was called: the model would have been measured without adapters.
    """
    clock = OpClock(s.args.device)

    def clocked() -> None:
        with clock.forward():
            ours.step()

    def without_updates() -> None:
        with replaced_ops({"grouped_lora_": lambda op: lambda *args, **kwargs: None}):
            ours.step()

    runs = {
        "base": base,
        "milora": ours,
        "clocked": Run(clocked, ours.reset),
        "without": Run(without_updates, ours.reset),
    }
    times = interleaved(runs, s.args.device, s.args.repeat or 60, s.args.seconds)
    ops, calls, routers = clock.best
    if not calls:
        raise RuntimeError(f"{case}: a forward of the MiLoRA model called none of milora's ops")
    bare = times["base"].best
    parts = {
        "profile_added": times["milora"].best - bare,
        "profile_ops": ops,
        "profile_python": times["without"].best - bare - routers,
        "profile_floor": floor,
    }
    for metric, seconds in parts.items():
        s.report.add(case, "milora", s.dtype, metric, seconds * 1e3, "ms",
                     ratio=seconds / bare, ratio_to="base", **s.extra)  # fmt: skip
    s.report.add(case, "milora", s.dtype, "profile_op_calls", calls, "calls", **s.extra)
