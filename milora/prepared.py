"""`ops.grouped_lora_` on a CPU once more: everything settled but x and y.

A decode step makes a call per group of modules, between products that have swept the caches. Any op
then takes some 40 us on its way through torch's dispatcher, which for a small batch is as long as
reading the weights does; a plain C function takes 5.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from milora._build import load_library

_run = load_library().milora_grouped_lora_run
_prepare = torch.ops.milora.grouped_lora_prepare.default


class PreparedUpdate:
    """`ops.grouped_lora_` with these tables, for tensors shaped as these y and x.

    The tables are read at each call, so they may change in place. The call is no torch op: nothing
    that watches ops sees it, and it must not be made for tensors that autograd follows.

    Args: as `ops.grouped_lora_` takes them, on the CPU.
    Raises: RuntimeError as `ops.grouped_lora_`.
    """

    __slots__ = ("_address", "_dtype", "_pointers", "_sizes", "_tensors")

    def __init__(self, y: list[Tensor], x: Tensor, *tables_and_experts):
        params = _prepare(y, x, *tables_and_experts)
        self._tensors = (params, *tables_and_experts)  # whose memory it reads
        self._address = params.data_ptr()
        self._dtype = x.dtype
        self._sizes = (x.numel(), *(t.numel() for t in y))
        self._pointers = ctypes.c_void_p * len(y)

    def __call__(self, y: list[Tensor], x: Tensor) -> bool:
        """Update y in place. Returns: False, with nothing done, if the tensors are of another kind
        than those that it was prepared for.

        Raises: RuntimeError if a route, adapter, rank or offset is out of range.
        """
        for t, size in zip((x, *y), self._sizes, strict=True):
            if (
                type(t) is not Tensor
                or t.numel() != size
                or t.dtype is not self._dtype
                or not (t.is_cpu and t.is_contiguous())
            ):
                return False
        error = _run(self._address, x.data_ptr(), self._pointers(*[t.data_ptr() for t in y]))
        if error is not None:
            raise RuntimeError(error.decode())
        return True
