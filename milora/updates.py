"""What inference adds to the outputs of linear modules that read one x."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from milora import ops
from milora.prepared import PreparedUpdate
from milora.rank_gates import RankGates

if TYPE_CHECKING:
    from milora.nn import MiLoRALinear
    from milora.routing import Call


class Update:
    """The op calls of some modules of a block, ready but for x and y.

    From one new token to the next nothing else changes: a `RoutingState` keeps its updates, so that
    a decode step spends little time in Python.

    Args:
        linears: modules of one block that read the same x.
        x: what they read.
        outputs: what their base layers made of it.
    """

    __slots__ = ("block", "calls", "dtype", "linears", "prepared", "shape", "slot_of")

    def __init__(
        self,
        call: Call,
        linears: tuple[MiLoRALinear, ...],
        x: Tensor,
        outputs: list[Tensor],
    ):
        self.linears = linears
        self.block = linears[0].block
        self.shape = x.shape
        self.dtype = outputs[0].dtype
        num_tokens = x.numel() // linears[0].d_in
        device = x.device  # the batch's own tensors may lie on another GPU than this block
        self.slot_of = call.slot_of  # an adapter that is new to inference gets its slot here
        active = call.state.block_active[self.block]
        if torch.compiler.is_compiling():
            active = None  # a graph must not depend on the routes
        members: dict[torch.dtype, list[int]] = {}
        for i, linear in enumerate(linears):
            if active is None or active[linear.column]:
                dtype = call.weights.dtype(self.block, linear.column, outputs[i].dtype)
                members.setdefault(dtype, []).append(i)
        self.calls = []
        for dtype, indices in members.items():
            tables = call.weights.block(self.block, dtype)
            arguments = (
                tables.pool,
                tables.offsets,
                tables.ranks,
                tables.scales,
                call.state.block_gates[self.block].to(device),
                call.route_of(num_tokens).to(device),
                self.slot_of.to(device),
                [linears[i].column for i in indices],
                call.path_of(num_tokens),
            )
            gates = RankGates.needed(call, [linears[i] for i in indices], num_tokens)
            self.calls.append((dtype, indices, tables, arguments, gates))
        self.prepared: list[PreparedUpdate | None] = [None] * len(self.calls)

    def repeat(
        self, call: Call, linears: tuple[MiLoRALinear, ...], x: Tensor, outputs: list[Tensor]
    ) -> bool:
        """Update `outputs` as before if that is what must be added to them: same modules, shape,
        slots and tables, and outputs of the same dtype. Returns: False, with nothing done, if not.
        """
        if (
            self.shape != x.shape
            or self.dtype is not outputs[0].dtype
            or self.slot_of is not call.slot_of
            or self.linears != linears
        ):
            return False
        for one in self.calls:
            if call.weights.block(self.block, one[0]) is not one[2]:
                return False
        # What mostly comes: one op call, ready to run, which refuses tensors of another kind.
        run = self.prepared[0] if len(self.prepared) == 1 else None
        if run is not None and run([outputs[k] for k in self.calls[0][1]], x):
            return True
        self.add(x, outputs, again=True)
        return True

    def add(self, x: Tensor, outputs: list[Tensor], again: bool) -> None:
        """Update `outputs`; those that the op cannot change in place are replaced.

        Args:
            again: whether there will be more calls with other values of the same shapes.
        """
        for i, (dtype, indices, _, arguments, gates) in enumerate(self.calls):
            ys = [_ready(outputs[k], dtype) for k in indices]
            x_ready = _ready(x, dtype)
            prepared = self.prepared[i]
            if prepared is None or not prepared(ys, x_ready):
                rank_gates = None if gates is None else gates.of(x_ready)
                ops.grouped_lora_(ys, x_ready, *arguments, rank_gates)
                if again and prepared is None and gates is None:
                    self.prepared[i] = PreparedUpdate(ys, x_ready, *arguments)
            for k, y in zip(indices, ys, strict=True):
                if y is not outputs[k]:
                    outputs[k] = y.to(outputs[k].dtype)


def _ready(t: Tensor, dtype: torch.dtype) -> Tensor:
    return (t if t.dtype is dtype else t.to(dtype)).contiguous()
