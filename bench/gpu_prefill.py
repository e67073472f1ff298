"""G3: the linear modules of one block over the prompts of several tenants.

A step is the block's seven products and whatever a provider adds to them; `base` adds nothing. Two
cases: all modules on, and three of seven per tenant (`top_k 3`), as a router would choose. Engines
cannot route, so there a module is a call of its own in which tenants without it have no adapter.
Floor: the base's time, plus the larger of the adapters' arithmetic at the base's own rate and the
bytes that the update cannot avoid.
"""

from __future__ import annotations

import random

import gpu_providers
import torch
from gpu_cases import GROUPS
from gpu_compare import Setting, compare
from gpu_problem import Problem
from tenants import MODULES

NAMES = ("base", "milora", "wgmma", "fused", *gpu_providers.RIVALS)
KERNELS = {"milora": "prefill", "wgmma": "prefill_wgmma", "fused": "fused_lora"}


def run(s: Setting, dtype: torch.dtype) -> None:
    for case, on in (("g3 all", len(MODULES)), ("g3 top_k 3", 3)):
        measure(s, case, on, dtype)


def problems_of(s: Setting, on: int, dtype: torch.dtype) -> list[Problem]:
    """One per group of modules that share x."""
    shape, tenants = s.args.shape, s.args.tenants
    draw = random.Random(0)
    chosen = [draw.sample(range(len(MODULES)), on) for _ in range(tenants)]
    gates = torch.zeros(tenants, len(MODULES))
    for row, columns in enumerate(chosen):
        gates[row, columns] = 1
    made = []
    for modules in GROUPS.values():
        sizes = [shape.sizes(module) for module in modules]
        columns = [MODULES.index(module) for module in modules]
        made.append(
            Problem.random(
                sizes[0][0], tuple(d_out for _, d_out in sizes), list(range(tenants)),
                [s.args.rank] * tenants, dtype, s.args.device, tokens=s.args.tokens // tenants,
                gates=gates[:, columns].contiguous().to(s.args.device),
            )
        )  # fmt: skip
    return made


def measure(s: Setting, case: str, on: int, dtype: torch.dtype) -> None:
    problems = problems_of(s, on, dtype)
    times = compare(s, case, NAMES, problems, dtype, base=True)
    base = times["base"].best
    tokens = len(problems[0].x)
    rate = 2 * tokens * sum(w.numel() for p in problems for w in p.weights.w) / base
    flops = sum(p.active_flops() for p in problems)
    nbytes = sum(p.active_bytes() for p in problems)
    floor = base + max(flops / rate, nbytes / s.bandwidth)
    extra = {
        "rank": s.args.rank, "tenants": s.args.tenants, "batch": s.args.tenants,
        "shape": f"{tokens} tokens, {s.args.shape}", "bytes": nbytes, "flops": flops,
    }  # fmt: skip
    for name, found in times.items():
        more = {**extra, "kernel": KERNELS.get(name, ""), "share": floor / found.best}
        s.report.time(case, name, dtype, "time", times, unit="us", floor=floor / base,
                      floor_us=floor * 1e6, **more)  # fmt: skip
        if name in KERNELS:
            s.report.add(case, name, dtype, "time_over_base", found.best / base, "", **more)
            s.report.add(case, name, dtype, "time_over_floor", found.best / floor, "", **more)
