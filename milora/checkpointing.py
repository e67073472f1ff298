"""Exact gradients under activation checkpointing.

A checkpointed block runs again in the backward pass, when other forwards may have come in between
(DPO, bi-level steps). The gates that its linear modules read must then be those of its own
forward. Where a block's hooks run differs between versions of transformers:

- outside the recomputed region (5.23): the router has run when the checkpoint begins, so the gates
  are known (as they are where a route is pinned, or an adapter has no router). They are passed
  through the checkpoint as one more positional tensor, so that their gradient reaches the router
  with and without reentrant autograd.
- inside it (5.17): the router is part of the region and runs again on recompute, from the same
  prompt spans. Its probabilities, which the load-balance loss needs, leave the region as further
  outputs; an encoder's pooled vectors, which a decoder block reads, enter as an input.

Both hand the block a `Call` of its own, which holds no autograd graph of the whole forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from milora.routing import Call
    from milora.runtime import Runtime

FUNCTION = "_gradient_checkpointing_func"


class CheckpointedBlock:
    """Stands in for a block's checkpoint function."""

    def __init__(self, runtime: Runtime, index: int, inner: Any):
        self.runtime = runtime
        self.index = index
        self.inner = inner

    @classmethod
    def install(cls, runtime: Runtime) -> None:
        """Wrap what `gradient_checkpointing_enable` has set, as a training forward begins."""
        for index, block in enumerate(runtime.blocks):
            inner = block.module.__dict__.get(FUNCTION)
            if inner is not None and not isinstance(inner, cls):
                setattr(block.module, FUNCTION, cls(runtime, index, inner))

    @classmethod
    def remove(cls, runtime: Runtime) -> None:
        for block in runtime.blocks:
            wrapped = block.module.__dict__.get(FUNCTION)
            if isinstance(wrapped, cls):
                setattr(block.module, FUNCTION, wrapped.inner)

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        call = self.runtime.local.call
        if call is None:
            return self.inner(function, *args, **kwargs)
        if call.state.block_gates[self.index] is not None:
            return self._gates_known(call, function, args, kwargs)
        return self._gates_unknown(call, function, args, kwargs)

    def _gates_known(self, call: Call, function: Any, args: tuple, kwargs: dict) -> Any:
        template, active = call.for_replay(), call.state.block_active[self.index]

        def run(gates: torch.Tensor, *args: Any) -> Any:
            mine = template.for_replay()
            mine.state.block_gates[self.index] = gates
            mine.state.block_active[self.index] = active
            with _current(self.runtime, mine):
                return function(*args)

        return self.inner(run, call.state.block_gates[self.index], *args, **kwargs)

    def _gates_unknown(self, call: Call, function: Any, args: tuple, kwargs: dict) -> Any:
        template = call.for_replay()
        source = self.runtime.blocks[self.index].source
        if source is None:
            # Reentrant autograd records the region only if an input requires a gradient.
            entering = torch.zeros((), requires_grad=True)
        else:
            entering = call.state.block_pooled[source]
        seen: dict[str, Any] = {}  # by the last run; the closure must not hold `call` and its graph

        def run(entering: torch.Tensor, *args: Any) -> tuple:
            mine = template.for_replay()
            if source is not None:
                mine.state.block_pooled[source] = entering
            with _current(self.runtime, mine):
                output = function(*args)
            state = mine.state
            routed = [state.block_probabilities[self.index], state.block_gates[self.index]]
            if self.runtime.is_encoder_decoder:
                routed.append(state.block_pooled[self.index])
            seen["counts"] = mine.routed_prompts, mine.router_launches
            seen["tuple"] = isinstance(output, tuple)
            outputs = output if seen["tuple"] else (output,)
            return (*routed, *outputs)

        results = self.inner(run, entering, *args, **kwargs)
        call.routed_prompts += seen["counts"][0]
        call.router_launches += seen["counts"][1]
        state = call.state
        state.block_probabilities[self.index], state.block_gates[self.index] = results[:2]
        num_routed = 2
        if self.runtime.is_encoder_decoder:
            state.block_pooled[self.index] = results[2]
            num_routed = 3
        state.note_active(self.index)
        outputs = results[num_routed:]
        return tuple(outputs) if seen["tuple"] else outputs[0]


class _current:
    """Make `call` the current one in the thread that runs a (re)computation."""

    def __init__(self, runtime: Runtime, call: Call):
        self.runtime = runtime
        self.call = call

    def __enter__(self) -> None:
        self.previous = self.runtime.local.call
        self.runtime.local.call = self.call

    def __exit__(self, *exc: Any) -> None:
        self.runtime.local.call = self.previous
