"""How the GPU benches time: CUDA graphs of many calls on weights that no cache holds.

A provider's calls, one per copy of its weights, become one CUDA graph; providers' replays take
turns (`measure.interleaved`), and a call's time is the replay's divided by the number of calls.
Without a GPU the same calls run in a loop, so that every path can be tried on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import machine
import torch
from measure import Run, Times, interleaved

CACHES = 4  # copies hold so many times the last cache: none is there when its turn comes
LEAST_CACHES = 2  # where COPY_BYTES allows no more
MAX_COPIES = 512
COPY_BYTES = 8 << 30  # of all copies of one provider; G1 has seven of them
GRAPH_CALLS = 32  # at least, of short calls: a graph's launch takes microseconds of its own


@dataclass
class Calls:
    """One provider's calls as one run, and how many there are."""

    run: Run
    number: int


def num_copies(nbytes: int, device: str, *, quick: bool, held: int | None = None) -> int:
    """How many copies of its weights a provider needs to find none of them in a cache.

    Args:
        nbytes: that a call reads of one.
        held: that one takes in memory, where a call reads a part of it.
    """
    least, wanted = (
        math.ceil(caches * machine.cache_bytes(device) / nbytes)
        for caches in (LEAST_CACHES, CACHES)
    )
    fitting = max(least, COPY_BYTES // (held or nbytes))
    return max(1, min(wanted, fitting, 2 if quick else MAX_COPIES))


def rounds(copies: int) -> int:
    """How often a graph of short calls goes round their copies."""
    return math.ceil(GRAPH_CALLS / copies)


def calls(functions: list[Callable[[], object]], device: str, parts: int = 1) -> Calls:
    """The functions one after another: a graph on a GPU, a loop elsewhere.

    Args:
        parts: so many functions make up one call.
    """

    def step() -> None:
        for function in functions:
            function()

    run = Run(captured(step).replay if device == "cuda" else step)
    return Calls(run, len(functions) // parts)


def captured(
    step: Callable[[], object], before: Callable[[], object] = lambda: None
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of step(), which runs three times before: caches fill, Triton compiles.

    Warm-up and capture are on one stream, since some engines keep workspaces by stream. `before`
    puts right what a step changes.
    Raises: RuntimeError, if step() does what a graph cannot hold; from then on torch's default
        generator may refuse to draw on the device.
    """
    outer = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        for _ in range(3):
            before()
            step()
        before()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            step()
    finally:
        torch.cuda.set_stream(outer)  # where ending the capture fails, torch leaves the graph's set
    torch.cuda.synchronize()
    return graph


def per_call(
    providers: dict[str, Calls], device: str, repeat: int, seconds: float
) -> dict[str, Times]:
    """Seconds of one call of each provider."""
    runs = {name: provider.run for name, provider in providers.items()}
    times = interleaved(runs, device, repeat, seconds)
    return {
        name: Times([run / providers[name].number for run in measured.runs])
        for name, measured in times.items()
    }


def copy_bandwidth(device: str, *, quick: bool = False) -> float:
    """Bytes a second, read and written, of copying memory that no cache holds: the ceiling."""
    size = 16 << 20 if quick else 1 << 30
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = calls([lambda: target.copy_(source)] * 4, device)
    times = per_call({"copy": copy}, device, 4 if quick else 20, 5.0)
    return 2 * size / times["copy"].best


def capability(device: str) -> int:
    """90 for Hopper; 0 on a CPU."""
    if device != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
