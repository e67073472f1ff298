"""Open a forward of the model: find the route that it follows, or the prompts it must route.

In order: a pinned route; the one that lives with the key-value cache (or with the running
`generate` where there is no cache); adapters without a router, which need none; else the prompts,
as `milora.prompts` finds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from milora import prompts
from milora.block_routing import ones
from milora.route_cache import ROUTE, held_by
from milora.routing import Call, RoutingState

if TYPE_CHECKING:
    from milora.runtime import Runtime


def open_call(
    runtime: Runtime, module: nn.Module, inputs: dict[str, Any], names: list | None
) -> Call:
    """The `Call` of a forward of `module` (the model, or what owns its blocks) with `inputs`.

    Raises:
        ValueError: nothing says where the prompt ends, or the route and the batch do not fit.
    """
    if inputs.get("cache") is not None and inputs.get("past_key_values") is None:
        raise NotImplementedError(
            "milora: continuous batching packs several requests into one row of a paged cache, "
            "whose routes milora cannot tell apart; use generate() with a padded batch"
        )
    x = inputs.get("input_ids")
    x = inputs.get("inputs_embeds") if x is None else x
    if runtime.is_encoder_decoder:
        return _open_encoder_decoder(runtime, module, inputs, x, names)
    if x is None:
        raise ValueError("milora: the forward got neither input_ids nor inputs_embeds")
    rows, num_columns = x.shape[:2]
    cache = inputs.get("past_key_values")
    generation = runtime.local.generation
    slot = None  # where a generate() without a cache keeps its route
    if generation is not None and cache is None:
        slot = generation.slot(inputs.get("input_ids"))

    state = known_state(runtime, cache, slot, rows, x.device)
    if state is not None:
        check_same_adapters(runtime, state, names)
        return Call(state)
    if not _has_routers(runtime, names):
        call = Call(_ungated_state(runtime, rows, names, x.device))
        call.fresh = not torch.is_grad_enabled()  # the cache keeps the gates, as it does routes
        call.cache = cache
        return call
    if cache is not None and (length := int(cache.get_seq_length())) > 0:
        raise ValueError(
            f"milora: past_key_values holds {length} tokens but no route. A prompt's route "
            "needs the whole prompt in one forward: chunked prefill and key-value caches made "
            "without this adapter cannot be continued. Prefill the whole prompt at once, or "
            "pin a route with milora.pin_route(model, state)"
        )
    source = prompts.Source(
        rows=rows,
        num_columns=num_columns,
        device=x.device,
        mask=prompts.attended(inputs.get("attention_mask"), rows, num_columns),
        labels=inputs.get("labels") if module is runtime.model and not runtime.whole else None,
        lengths=runtime.local.prompt_lengths,
        position_ids=inputs.get("position_ids"),
        cu_seq_lens=inputs.get("cu_seq_lens_q"),
        pending=_pending(cache, slot),
        prefill=cache is not None or slot is not None or inputs.get("use_cache") is True,
        whole=runtime.whole,
    )
    call = _route_anew(runtime, source, inputs, names)
    if slot is not None:
        slot.state = call.state
    return call


def known_state(
    runtime: Runtime, cache: Any, slot: Any, rows: int, device: torch.device
) -> RoutingState | None:
    """The route that is pinned, or that `cache` or `slot` holds; checked against the batch."""
    if runtime.local.pinned is not None:
        state = runtime.local.pinned
        if state.num_rows != rows:
            state = state.with_rows(prompts.rows_of(state.num_prompts, rows, device))
        check_layout(runtime, state)
        return state
    state = held_by(cache) if cache is not None else getattr(slot, "state", None)
    if state is None:
        return None
    if state.num_rows != rows:
        raise ValueError(
            f"milora: the route that lives with past_key_values has {state.num_rows} rows, the "
            f"forward has {rows}; select or repeat the cache's rows with its own methods"
        )
    check_layout(runtime, state)
    return state


def check_layout(runtime: Runtime, state: RoutingState) -> None:
    """Refuse a route of another model, or of an adapter that is gone."""
    distinct, _ = state.adapter_table()
    if missing := sorted(name for name in distinct if not runtime.knows(name)):
        raise ValueError(f"milora: this route belongs to adapter {missing}, not on the model")
    if state.names != runtime.names:
        raise ValueError("milora: this route was made for other modules than the model has now")


def check_same_adapters(runtime: Runtime, state: RoutingState, names: list | None) -> None:
    """Refuse a call that names other adapters than those of the route that it follows."""
    if names is None and runtime.local.generation is not None:
        names = runtime.local.generation.adapters
    if names is None:
        return
    named = runtime.adapters_of(state.num_prompts, names)
    routed = state.adapters * len(named) if state.num_prompts == 1 else state.adapters
    if named != routed:
        of_route, advice = "the cache was filled by", "a cache keeps its route, so prefill anew"
        if runtime.local.pinned is not None:
            of_route, advice = "the pinned route belongs to", "leave adapter_names out"
        raise ValueError(
            f"adapter_names: {of_route} adapters {list(state.adapters)}, the call names "
            f"{list(named)}; {advice}"
        )


def _route_anew(
    runtime: Runtime, source: prompts.Source, inputs: dict[str, Any], names: list | None
) -> Call:
    """A call whose blocks will route the prompts that `source` finds."""
    plan, row_of, lengths = source.resolve()
    adapters = runtime.adapters_of(plan.spans.shape[0], names)
    call = Call(RoutingState(runtime.names, runtime.paths, adapters, row_of, lengths), plan)
    call.cache = inputs.get("past_key_values")
    call.labels = inputs.get("labels")
    call.num_items = inputs.get("num_items_in_batch")
    return call


def _has_routers(runtime: Runtime, names: list | None) -> bool:
    used = runtime.adapters_of(1, names)
    return any(name is not None and runtime.config_of(name).router for name in used)


def _pending(cache: Any, slot: Any) -> Any:
    if cache is not None:
        return getattr(cache, prompts.PENDING, None)
    return getattr(slot, "pending", None)


def _ungated_state(
    runtime: Runtime, rows: int, names: list | None, device: torch.device
) -> RoutingState:
    """Adapters without a router: every expert on, nothing to find out."""
    adapters = runtime.adapters_of(rows if names else 1, names)
    if len(adapters) == 1:
        row_of = torch.zeros(rows, dtype=torch.int64, device=device)
    else:
        row_of = prompts.rows_of(len(adapters), rows, device)
    state = RoutingState(runtime.names, runtime.paths, adapters, row_of)
    for block in range(len(runtime.blocks)):
        state.block_gates[block] = ones(runtime, state, block)
        state.block_probabilities[block] = state.block_gates[block]
        state.note_active(block)
    return state


def _open_encoder_decoder(
    runtime: Runtime,
    module: nn.Module,
    inputs: dict[str, Any],
    x: Tensor | None,
    names: list | None,
) -> Call:
    encoded = inputs.get("encoder_outputs") if module is runtime.model else None
    if runtime.local.pinned is not None or encoded is not None:
        first = x if encoded is None else _last_hidden(encoded)
        rows, device = first.shape[0], first.device
        state = known_state(runtime, inputs.get("past_key_values"), None, rows, device)
        if state is None:
            state = getattr(encoded, ROUTE, None)
            if state is None and _has_routers(runtime, names):
                raise ValueError(
                    "milora: encoder_outputs carry no route; call the model's encoder while "
                    "the adapter is active and pass on its output object"
                )
            if state is not None and state.num_rows != rows:
                state = state.with_rows(prompts.rows_of(state.num_prompts, rows, device))
            if state is None:
                state = _ungated_state(runtime, rows, names, device)
        check_same_adapters(runtime, state, names)
        call = Call(state)
        call.fresh = not state.complete  # the decoder's blocks route on their first forward
        call.cache = inputs.get("past_key_values")
        return call
    if x is None:
        raise ValueError("milora: the encoder got neither input_ids nor inputs_embeds")
    if not _has_routers(runtime, names):
        return Call(_ungated_state(runtime, x.shape[0], names, x.device))
    source = prompts.Source(
        rows=x.shape[0],
        num_columns=x.shape[1],
        device=x.device,
        mask=prompts.attended(inputs.get("attention_mask"), *x.shape[:2]),
        whole=True,
    )
    return _route_anew(runtime, source, inputs, names)


def _last_hidden(encoded: Any) -> Tensor:
    return encoded[0] if isinstance(encoded, tuple) else encoded.last_hidden_state
