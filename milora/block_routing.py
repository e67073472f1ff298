"""Route in front of one block: which tokens the routers read, whose routers, and what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from milora import ops
from milora.router import ROUTER_NAME, route
from milora.routing import Call, RoutingState

if TYPE_CHECKING:
    from milora.runtime import Runtime


def route_block(runtime: Runtime, call: Call, index: int, args: tuple, kwargs: dict) -> None:
    """Fill the call's state for block `index`, which is about to run with these arguments."""
    state, block = call.state, runtime.blocks[index]
    routed = [name for name in call.adapters if runtime.has_router(name, index)]
    if not routed:
        state.block_gates[index] = state.block_probabilities[index] = ones(runtime, state, index)
        state.note_active(index)
        return
    if block.source is not None:
        h = state.block_pooled[block.source]
        if h is None:
            raise RuntimeError(
                f"milora: {block.path} routes on the encoder, which has not run in this call"
            )
        starts = torch.arange(h.shape[0], dtype=torch.int32, device=h.device)
        spans = torch.stack([starts, starts + 1], 1)
    else:
        h, spans = _prompt_hidden(runtime, call, index, args, kwargs)
    if call.pooled:
        probabilities, gates, pooled = _route_pooled(call, index, routed, h, spans)
    else:
        modules = getattr(block.module, ROUTER_NAME)
        router_of = _lookup([routed.index(n) if n in routed else -1 for n in call.adapters], call)
        h = h.to(modules[routed[0]].w_r.device)  # the block before may stand on another GPU
        probabilities, gates, pooled = route(
            [modules[name] for name in routed],
            h,
            spans.to(h.device),
            router_of.to(h.device),
            train_theta=runtime.train_theta,
        )
    if routed != list(call.adapters) or not _is_full(runtime, routed, index):
        probabilities, gates = (
            _scatter(runtime, state, index, routed, t) for t in (probabilities, gates)
        )
    state.block_probabilities[index] = probabilities
    state.block_gates[index] = gates
    if runtime.is_encoder_decoder:
        state.block_pooled[index] = pooled
    state.note_active(index)
    call.routed_prompts += sum(name in routed for name in state.adapters)
    call.router_launches += 1


def ones(runtime: Runtime, state: RoutingState, index: int) -> Tensor:
    """Gates of the prompts whose adapters have no router: 1 for each of their experts."""
    gates = torch.zeros(state.num_prompts, len(runtime.blocks[index].experts))
    for row, name in enumerate(state.adapters):
        if name is not None and not runtime.config_of(name).router:
            gates[row, runtime.columns_of(name)[index]] = 1.0
    return gates.to(state.row_of.device)


def _route_pooled(
    call: Call, index: int, routed: list[str], h: Tensor, spans: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `route`, with the routers' parameters read from the adapter pool."""
    slots = call.weights.slots(call.adapters)
    table = [slot if n in routed else -1 for n, slot in zip(call.adapters, slots, strict=True)]
    tables = call.weights.block(index, h.dtype)
    return ops.prompt_router_pool(
        h if h.stride(-1) == 1 else h.contiguous(),
        spans,
        _lookup(table, call).to(h.device),
        tables.pool,
        tables.router_offsets,
        tables.router_codes,
        tables.ranks.shape[1],
    )


def _prompt_hidden(
    runtime: Runtime, call: Call, index: int, args: tuple, kwargs: dict
) -> tuple[Tensor, Tensor]:
    plan, path = call.plan, runtime.blocks[index].path
    if plan is None:
        raise RuntimeError(
            f"milora: no route for block {path}; the prefill that should have made it did not "
            "finish"
        )
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise RuntimeError(
            f"milora: block {path} must get its hidden states as the first positional argument or "
            f"as hidden_states, got keywords {sorted(kwargs)}"
        )
    h = hidden.reshape(-1, hidden.shape[-1])
    # XLNet's blocks see [T, B, d]: as many tokens, in another order.
    is_other_order = (
        plan.segment_of is None and hidden.dim() > 2 and hidden.shape[0] != call.state.num_rows
    )
    if h.shape[0] != plan.num_tokens or is_other_order:
        raise RuntimeError(
            f"milora: block {path} sees tokens {[*hidden.shape[:-1]]} where the model was given "
            f"{plan.num_tokens} in {call.state.num_rows} rows, so the prompt's place is unknown"
        )
    return (h if plan.take is None else h[plan.take]), plan.spans.to(h.device)


def _is_full(runtime: Runtime, routed: list[str], index: int) -> bool:
    everything = list(range(len(runtime.blocks[index].experts)))
    return all(runtime.columns_of(name)[index] == everything for name in routed)


def _scatter(
    runtime: Runtime, state: RoutingState, index: int, routed: list[str], values: Tensor
) -> Tensor:
    """Move each row's values to the columns of its adapter; router-less adapters get ones."""
    width = len(runtime.blocks[index].experts)
    table = torch.full((len(state.adapters), values.shape[1]), width, dtype=torch.int64)
    for row, name in enumerate(state.adapters):
        if name in routed:
            columns = runtime.columns_of(name)[index]
            table[row, : len(columns)] = torch.tensor(columns)
    full = values.new_zeros(len(state.adapters), width + 1)
    full = full.scatter(1, table.to(values.device), values)[:, :width]
    return full + ones(runtime, state, index).to(values.device)


def _lookup(table: list[int], call: Call) -> Tensor:
    """`table[adapter]` of each prompt; -1 for the bare model."""
    if table == list(range(len(call.adapters))):
        return call.adapter_of
    values = torch.tensor([*table, -1], dtype=torch.int32, device=call.adapter_of.device)
    return values[call.adapter_of.long()]
