"""`ops.grouped_lora_` once more: everything settled but x and y.

A decode step makes a call per group of modules. On a CPU it does so between products that have
swept the caches: any op then takes some 40 us on its way through torch's dispatcher, which for a
small batch is as long as reading the weights does; a plain C function takes 5. On a GPU an eager
decode step waits for Python, so that what each call takes there is what the step takes longer.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from milora._build import load_library

_run = load_library().milora_grouped_lora_run
_prepare = torch.ops.milora.grouped_lora_prepare.default


class PreparedUpdate:
    """`ops.grouped_lora_` with these tables, for tensors shaped as these y and x, on their device.

    The tables are read at each call, so they may change in place. On a GPU the kernels go to
    torch's current stream, which may be capturing a graph. The call is no torch op: nothing that
    watches ops sees it, and it must not be made for tensors that autograd follows.

    Args: as `ops.grouped_lora_` takes them, without `rank_gates`.
    Raises: RuntimeError as `ops.grouped_lora_`.
    """

    __slots__ = ("_address", "_device", "_dtype", "_pack", "_sizes", "_tensors")

    def __init__(self, y: list[Tensor], x: Tensor, *tables_and_experts):
        params = _prepare(y, x, *tables_and_experts)
        self._tensors = (params, *tables_and_experts)  # whose memory it reads
        self._address = params.data_ptr()
        self._device = x.get_device()  # -1 for the CPU: an index costs less than a torch.device
        self._dtype = x.dtype
        self._sizes = (x.numel(), *(t.numel() for t in y))
        self._pack = struct.Struct(f"{len(self._sizes)}P").pack  # half the time of a ctypes array

    def __call__(self, y: list[Tensor], x: Tensor) -> bool:
        """Update y in place. Returns: False, with nothing done, if the tensors are of another kind
        than those that it was prepared for.

        Raises: RuntimeError if a route, adapter, rank or offset is out of range (on a CPU; a GPU
            does not look), or if a CUDA launch fails.
        """
        addresses = []
        for t, size in zip((x, *y), self._sizes, strict=True):
            if (
                type(t) is not Tensor
                or t.numel() != size
                or t.dtype is not self._dtype
                or t.get_device() != self._device
                or not t.is_contiguous()
            ):
                return False
            addresses.append(t.data_ptr())
        error = _run(self._address, self._pack(*addresses))
        if error is not None:
            raise RuntimeError(error.decode())
        return True
