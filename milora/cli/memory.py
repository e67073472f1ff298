"""Does it fit? A refusal before loading beats a process that the system kills half-way."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from milora.errors import UserError

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
# AdamW in float32: the parameter, its gradient and two moments.
BYTES_PER_TRAINED_PARAMETER = 16


def free_bytes(device: str) -> int:
    """Memory that new tensors could take on `device`: of the GPU, the machine or the container."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    # Without a container, or where its limit is "max", the machine's own number holds.
    with contextlib.suppress(OSError, ValueError):
        free = min(free, int(CGROUP_LIMIT.read_text()) - int(CGROUP_USED.read_text()))
    return free


def check_memory(needed: int, device: str, what: str) -> None:
    """Refuse what cannot fit.

    Args:
        needed: bytes, a lower bound: activations come on top.
        what: names the thing in the message.

    Raises:
        UserError: less than `needed` is free.
    """
    free = free_bytes(device)
    if needed > free:
        raise UserError(
            f"too little memory: {what} needs at least {gibibytes(needed)} on {device}, "
            f"{gibibytes(free)} are free",
            hint="use a smaller model, --dtype bfloat16, or a machine with more memory",
        )


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 // 10 else f"{count / 2**20:.1f} MiB"


def out_of_disk(error: BaseException) -> bool:
    """Whether a file could not be written for want of space."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors says it in words; torch.save only that its file is shorter than what it wrote.
    words = os.strerror(errno.ENOSPC), "inline_container.cc"
    return any(part in str(error) for part in words)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or on a GPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's CPU allocator has no exception class of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
