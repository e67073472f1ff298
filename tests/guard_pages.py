"""Run the CPU kernels on tensors that touch a page nobody may read; `test_sanitizers.py` starts it.

AddressSanitizer does not see what masked vector loads and stores do; the processor does. Each
tensor ends where a forbidden page begins, and in a second round begins where one ends: a byte too
far kills the process. Prints how many calls it made.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys

import torch
from test_cores import RANKS, with_cores
from test_grouped_lora import pool_inputs, train_inputs
from test_op_edges import DTYPES, POOL, ROUTER, TRAIN, WIDTHS, Case
from test_prompt_router import in_pool, router_inputs
from torch import Tensor

from milora import _build, ops

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded(t: Tensor, at_end: bool) -> Tensor:
    """A contiguous copy of `t` between two forbidden pages, next to the one or to the other."""
    size = t.numel() * t.itemsize
    if size == 0:
        return t.contiguous()
    page = mmap.PAGESIZE
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    start = page + (inner - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start).view(t.shape)
    copy.copy_(t)
    base = copy.data_ptr() - start
    for forbidden in (base, base + page + inner):
        if _libc.mprotect(forbidden, page, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return copy


def guard(value, at_end: bool):
    if isinstance(value, Tensor):
        return guarded(value, at_end)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [guarded(t, at_end) for t in value]
    return value


def widths(rows: int, d_outs: int) -> list[Case]:
    """Every remainder of a vector register, in and out."""
    cases = []
    for i, d_in in enumerate(WIDTHS):
        d_out = tuple(WIDTHS[(i + s) % len(WIDTHS)] for s in range(d_outs))
        cases.append(Case(f"{d_in}", rows, (3, 17), d_in, d_out, (0, 1), (0, 1)))
    return cases


def lora_pool(at_end: bool) -> int:
    cases = [*POOL, RANKS, *widths(1, 3), *widths(5, 2), *widths(40, 1)]
    for case in cases:
        for dtype in DTYPES:
            plain = pool_inputs(case, dtype)
            for inputs in (plain, with_cores(plain)):  # the pool then ends with a core
                ops.grouped_lora_(**{name: guard(value, at_end) for name, value in inputs.items()})
    return 2 * len(cases) * len(DTYPES)


def lora_training(at_end: bool) -> int:
    cases = [*TRAIN, *widths(1, 1), *widths(6, 1), *widths(40, 1)]
    for case in cases:
        for dtype in DTYPES:
            leaves, (scales, route_of, adapter_of) = train_inputs(case, dtype)
            y, x, gates, *weights = (guarded(t, at_end) for t in leaves)
            half = len(weights) // 2
            tables = guarded(route_of, at_end), guarded(adapter_of, at_end)
            ops.grouped_lora(y, x, weights[:half], weights[half:], scales, gates, *tables)
            dout = guarded(torch.randn(y.shape).to(dtype), at_end)
            update = x, weights[:half], weights[half:], scales, gates, *tables
            dx, dgates, *grads = (guarded(torch.zeros_like(t), at_end) for t in leaves[1:])
            ops._grouped_lora_backward_(dout, *update, dx, grads[:half], grads[half:], dgates)
            ops._grouped_lora_add_(guarded(leaves[0].contiguous(), at_end), *update)
    return 3 * len(cases) * len(DTYPES)


def router(at_end: bool) -> int:
    cases = [*ROUTER.values(), *({"d": d} for d in WIDTHS)]
    for options in cases:
        for dtype in DTYPES:
            inputs = router_inputs(dtype, **options)
            for function, arguments in (
                (ops.prompt_router, inputs),
                (ops.prompt_router_pool, in_pool(inputs)),
            ):
                safe = {name: guard(value, at_end) for name, value in arguments.items()}
                outputs = function(**safe)
                if function is ops.prompt_router:
                    probs, _, pooled = (guarded(t, at_end) for t in outputs)
                    grads = [guarded(torch.randn(t.shape), at_end) for t in outputs]
                    ops._prompt_router_backward(*grads, *safe.values(), probs, pooled)
    return 3 * len(cases) * len(DTYPES)


def main() -> None:
    faulthandler.enable()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    calls = 0
    for isa in _build.cpu_isas():
        _build.set_cpu_isa(isa)
        for at_end in (True, False):
            for run in (lora_pool, lora_training, router):
                calls += run(at_end)
    print(calls)


if __name__ == "__main__":
    if sys.argv[1:] == ["--fault"]:  # what the guards are for
        faulthandler.enable()
        t = guarded(torch.zeros(5), True)
        ctypes.memset(t.data_ptr() + 20, 0, 1)
    else:
        main()
