"""Modules of a block that read the very same tensor: q, k, v; gate, up.

Their updates go through one op call: it reads x once, and a decode step makes fewer calls. The
first of them that a forward calls computes the base outputs of all and updates them; the others
find theirs ready. Which modules these are is no table of model families: one forward shows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from milora.nn import MiLoRALinear


def may_watch() -> bool:
    """Whether tensors may be compared now: a compiled or captured graph must not wait for them."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


class SiblingWatch:
    """Sees the linear modules of one forward, in order, with their inputs."""

    def __init__(self) -> None:
        self._runs: list[list[MiLoRALinear]] = []
        self._x: Tensor | None = None
        self._copy: Tensor | None = None

    def saw(self, linear: MiLoRALinear, x: Tensor) -> None:
        run = self._runs[-1] if self._runs else [linear]
        # The same object with the same values: a tensor changed in place between two calls would
        # have given the second one other values.
        if x is self._x and run[0].block == linear.block and torch.equal(x, self._copy):
            if linear not in run:
                run.append(linear)
            return
        self._runs.append([linear])
        self._x, self._copy = x, x.detach().clone()

    def tell(self) -> None:
        """Set each first sibling's `siblings`: the modules of its run, itself first."""
        seen: dict[MiLoRALinear, tuple[MiLoRALinear, ...]] = {}
        unclear: set[MiLoRALinear] = set()
        for run in map(tuple, self._runs):
            for linear in run:  # a block that runs several times must show the same each time
                if seen.setdefault(linear, run) != run:
                    unclear.update(run, seen[linear])
        for linear, run in seen.items():
            is_first = run[0] is linear and len(run) > 1
            linear.siblings = run if is_first and unclear.isdisjoint(run) else ()
