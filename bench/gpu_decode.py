"""G1: the decode op beside the engines' kernels.

Floor: the adapters in use once, x once, y read and written, at the measured copy bandwidth. `share`
is floor ÷ time. Rows are one decode token each; the base's product is timed for comparison only.
"""

from __future__ import annotations

import gpu_providers
import torch
from gpu_cases import DecodeCase, decode_cases, decode_kernel
from gpu_compare import Setting, compare
from gpu_problem import Problem
from measure import popularity

NAMES = ("milora", *gpu_providers.RIVALS)


def run(s: Setting, dtype: torch.dtype) -> None:
    for case in decode_cases(s.args.popularity, quick=s.args.quick):
        measure(s, case, dtype)


def measure(s: Setting, case: DecodeCase, dtype: torch.dtype) -> None:
    adapters = popularity(case.popularity, case.rows, case.adapters)
    ranks = case.ranks_of_adapters()
    problem = Problem.random(case.d_in, case.d_out, adapters, ranks, dtype, s.args.device)
    times = compare(s, case.name, NAMES, [problem], dtype, base=False)
    nbytes = problem.active_bytes() + problem.x.nbytes + 2 * problem.y.nbytes
    floor = nbytes / s.bandwidth
    extra = {
        "kernel": decode_kernel(s.capability), "rank": case.rank_name, "batch": case.rows,
        "popularity": case.popularity, "shape": f"{case.d_in}-{'+'.join(map(str, case.d_out))}",
        "tenants": len(set(adapters)), "bytes": nbytes,
    }  # fmt: skip
    for name, found in times.items():
        s.report.time(case.name, name, dtype, "time", times, to="milora", unit="us",
                      floor=floor / times["milora"].best, floor_us=floor * 1e6,
                      share=floor / found.best, **extra)  # fmt: skip
    ours = times["milora"].best
    s.report.add(case.name, "milora", dtype, "share", floor / ours, "", **extra)
    rivals = [times[name].best for name in times if name != "milora"]
    if rivals:
        s.report.add(case.name, "milora", dtype, "over_best_peer", min(rivals) / ours, "", **extra)
