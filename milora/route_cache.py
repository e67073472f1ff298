"""Let a route live with its key-value cache: copied, repeated, selected and reset along with it."""

from __future__ import annotations

from typing import Any

from milora.routing import RoutingState

ROUTE = "_milora_route"


class _Following:
    """A cache's own method that takes the route along.

    An object and not a closure, so that a deep copy of the cache gets one bound to the copy.
    """

    def __init__(self, cache: Any, method: str):
        self.cache = cache
        self.method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self.cache), self.method)(self.cache, *args, **kwargs)
        state: RoutingState | None = self.cache.__dict__.get(ROUTE)
        if state is not None:
            argument = args[0] if args else next(iter(kwargs.values()), None)
            setattr(self.cache, ROUTE, _FOLLOWED[self.method](state, argument))
        return result


# Reordering beams only permutes rows of one prompt, so `reorder_cache` needs no follower.
_FOLLOWED = {
    "batch_repeat_interleave": lambda state, repeats: state.repeat_rows(repeats),
    "batch_select_indices": lambda state, indices: state.select_rows(indices),
    "reset": lambda state, _: None,
}


def follow_cache(cache: Any, state: RoutingState) -> None:
    """Store `state` with `cache`, a transformers `Cache` or any object with attributes."""
    setattr(cache, ROUTE, state)
    for method in _FOLLOWED:
        if hasattr(type(cache), method) and method not in cache.__dict__:
            setattr(cache, method, _Following(cache, method))


def held_by(cache: Any) -> RoutingState | None:
    return getattr(cache, "__dict__", {}).get(ROUTE)


def carried_route(inputs: dict[str, Any]) -> RoutingState | None:
    """The route that the arguments of a forward or of `generate` bring along."""
    route = held_by(inputs.get("past_key_values"))
    return held_by(inputs.get("encoder_outputs")) if route is None else route
