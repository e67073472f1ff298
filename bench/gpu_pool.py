"""The adapter pool's copies: an adapter loaded from pinned host memory, and runs moved together.

`base` is one copy of as many bytes: from pinned memory for a load, within the device for a move.
A load goes to as many places as the model has blocks; a move closes a gap of one block's size.
"""

from __future__ import annotations

import torch
from gpu_compare import Setting
from measure import Run, interleaved
from tenants import MODULES

from milora.pool.copies import CpuCopies, CudaCopies

GAP = 256  # bytes between the places of two blocks


def run(s: Setting, dtype: torch.dtype) -> None:
    device, shape = s.args.device, s.args.shape
    block = [s.args.rank * d * dtype.itemsize for m in MODULES for d in shape.sizes(m)]
    load, size = [], sum(block)
    for layer in range(shape.layers):
        start, place = layer * size, size + layer * (size + GAP)
        for run_bytes in block:
            load.append((start, place, run_bytes))
            start, place = start + run_bytes, place + run_bytes
    total = size * shape.layers
    moves = [(place, place - size, run_bytes) for _, place, run_bytes in load]
    blob = torch.ones(total, dtype=torch.uint8, pin_memory=device == "cuda")
    pool = torch.zeros(load[-1][1] + size, dtype=torch.uint8, device=device)
    copies = CudaCopies(pool) if device == "cuda" else CpuCopies(pool)

    def changed(change) -> None:
        copies.fence()  # the side stream begins behind what the clock has started
        with copies.writing():
            change()
        copies.wait(copies.event())

    other = torch.empty(total, dtype=torch.uint8, device=device)
    measure(s, dtype, "pool load", total, {
        "base": lambda: other.copy_(blob, non_blocking=True),
        "milora": lambda: changed(lambda: copies.load(blob, load)),
    })  # fmt: skip
    measure(s, dtype, "pool move", total, {
        "base": lambda: other.copy_(pool[:total]),
        "milora": lambda: changed(lambda: copies.move(moves)),
    })  # fmt: skip


def measure(s: Setting, dtype: torch.dtype, case: str, nbytes: int, steps: dict) -> None:
    runs = {name: Run(step) for name, step in steps.items()}
    times = interleaved(runs, s.args.device, s.repeat, s.args.seconds)
    floor = times["base"].best
    for name, found in times.items():
        s.report.time(case, name, dtype, "time", times, unit="us", floor=1.0,
                      floor_us=floor * 1e6, share=floor / found.best, kernel="pool_copies",
                      rank=s.args.rank, shape=str(s.args.shape), bytes=nbytes)  # fmt: skip
