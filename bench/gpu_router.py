"""G4: the prompt router beside one read of the hidden states: the faster of a sum over them, which
is the base here, and of their bytes at the measured copy bandwidth."""

from __future__ import annotations

import itertools

import torch
from bench_prompt_router import Case, Problem, check, make_runs
from gpu_compare import Setting
from gpu_timing import calls, num_copies, per_call, rounds

NAMES = ("base", "milora", "stacked")
PROMPTS = (1, 8, 64)


def run(s: Setting, dtype: torch.dtype) -> None:
    cases = [Case("pool", n, s.args.tokens // n, s.args.shape.hidden) for n in PROMPTS]
    cases.append(Case("backward", 8, s.args.tokens // 8, s.args.shape.hidden))
    for case in cases[1::2] if s.args.quick else cases:
        measure(s, case, dtype)


def measure(s: Setting, case: Case, dtype: torch.dtype) -> None:
    name = f"g4 {case.kind} {case.batch}x{case.tokens}"
    p = Problem(case, dtype, s.args.device)
    h = p.t["h"]
    copies = num_copies(h.nbytes, s.args.device, quick=s.args.quick)
    p.turns = itertools.cycle([h, *(h.clone() for _ in range(copies - 1))])
    functions = make_runs(p)
    with torch.set_grad_enabled(case.kind == "backward"):
        check(p, functions, dtype)
        made = {n: calls([functions[n]] * (copies * rounds(copies)), s.args.device) for n in NAMES}
        times = per_call(made, s.args.device, s.repeat, s.args.seconds)
    # Backward reads H twice, once for either direction, and writes a gradient of its size.
    nbytes = h.nbytes * (3 if case.kind == "backward" else 1)
    floor = nbytes / s.bandwidth
    extra = {
        "kernel": "router_backward" if case.kind == "backward" else "router_forward",
        "batch": case.batch, "shape": f"{case.batch}x{case.tokens} tokens, d {case.d}",
        "bytes": nbytes,
    }  # fmt: skip
    for provider, found in times.items():
        s.report.time(name, provider, dtype, "time", times, unit="us",
                      floor=floor / times["base"].best, floor_us=floor * 1e6,
                      share=floor / found.best, **extra)  # fmt: skip
    read = min(times["base"].best, floor)
    s.report.add(name, "milora", dtype, "time_over_read", times["milora"].best / read, "", **extra)
