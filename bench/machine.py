"""What the numbers were measured on: processor, versions, commit, and how fast memory is read."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # "32768K"
DEFAULT_L3 = 64 << 20  # where the system does not say


def hardware(device: str) -> str:
    """The processor's name, with the number of threads in use on a CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of the package and of everything that a provider is made of."""
    from milora import __version__

    found = {"milora": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # not installed: no provider of this run comes from it
    return found


def commit() -> str:
    """The checkout's commit, `-dirty` where files differ from it.

    MILORA_COMMIT comes first, for files that were carried here without their repository.
    """
    if given := os.environ.get("MILORA_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except OSError:  # no git on this machine
        return "unknown"
    return found.stdout.strip() or "unknown"


def l3_bytes() -> int:
    text = L3.read_text().strip() if L3.exists() else ""
    return int(text[:-1]) << 10 if text.endswith("K") else DEFAULT_L3


def cache_bytes(device: str) -> int:
    """Of the last cache level in front of memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    return l3_bytes()


def read_bandwidth(device: str, rounds: int = 8) -> float:
    """Bytes a second of reading memory that no cache holds, with the threads now in use.

    The best of several sums over a buffer of five times the last cache level: what a kernel that
    reads weights once cannot beat.
    """
    size = 1 << 30 if device == "cuda" else max(5 * l3_bytes(), 128 << 20)
    buffer = torch.ones(size // 4, device=device)
    best = float("inf")
    for _ in range(rounds + 1):  # the first run is a warm-up that cannot win
        synchronize(device)
        begin = time.perf_counter()
        buffer.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return buffer.nbytes / best


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
