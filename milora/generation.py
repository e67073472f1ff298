"""`generate` on an attached model: capture the prompt on entry, keep its route for the call.

What `generate` is given says where the prompt ends; the forwards inside it no longer do. An
all-ones mask becomes None, a static cache turns the mask 4-D, prompt lookup and assisted decoding
append speculative tokens to the first forward, beams repeat rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from milora.prompts import PENDING, Pending
from milora.route_cache import carried_route, held_by
from milora.routing import RoutingState

if TYPE_CHECKING:
    from milora.pooled import PoolLease
    from milora.runtime import Runtime


@dataclass
class Slot:
    """Where a `generate` without a cache keeps a route: one for the prompt's own forwards, one for
    the unconditional branch of classifier-free guidance."""

    state: RoutingState | None = None
    pending: Pending | None = None


@dataclass
class Generation:
    """One running `generate` call."""

    num_prompts: int | None
    length: int | None
    adapters: list[str | None] | None
    lease: PoolLease | None = None  # of adapters that live in a pool, for the whole call
    own: Slot = field(default_factory=Slot)
    other: Slot = field(default_factory=Slot)
    prepared: Tensor | None = None

    def slot(self, input_ids: Tensor | None) -> Slot:
        return self.own if input_ids is self.prepared else self.other


class Replaced:
    """A model's method with another body but its own signature.

    transformers inspects the signatures of `generate` and its helpers, and copies and pickles of
    the model must get a method of the copy; a closure or a stored bound method would give neither.
    """

    def __init__(self, model: nn.Module, name: str, body: Callable):
        self.model = model
        self.name = name
        self.previous = model.__dict__.get(name)  # somebody else's replacement, if any
        self.body = body

    @property
    def original(self) -> Callable:
        return self.previous or getattr(type(self.model), self.name).__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self.original, *args, **kwargs)


class GenerateMethods:
    """The bodies that stand in for `generate` and `prepare_inputs_for_generation`."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    def generate(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        runtime = self.runtime
        adapters = kwargs.pop("adapter_names", runtime.local.adapter_names)
        if runtime.is_disabled():
            return original(*args, **kwargs)
        arguments = dict(zip(inspect.signature(original).parameters, args, strict=False))
        arguments.update(kwargs)
        if runtime.is_bare(adapters, arguments):
            return original(*args, **kwargs)
        self._refuse(arguments)
        inputs = next(
            (
                arguments[key]
                for key in ("inputs", "input_ids", "inputs_embeds")
                if isinstance(arguments.get(key), Tensor)
            ),
            None,
        )
        # With embeddings, input_ids (if any) are what was generated before: the mask tells.
        embeds = arguments.get("inputs_embeds")
        inputs = embeds if isinstance(embeds, Tensor) else inputs
        num_prompts, length = (None, None) if inputs is None else inputs.shape[:2]
        lease = runtime.lease_for(num_prompts, adapters, carried_route(arguments))
        previous = runtime.local.generation
        runtime.local.generation = Generation(num_prompts, length, adapters, lease)
        try:
            return original(*args, **kwargs)
        finally:
            runtime.abandon()
            runtime.local.generation = previous
            if lease is not None:
                lease.release()

    def _refuse(self, arguments: dict[str, Any]) -> None:
        def option(name: str) -> Any:
            given = arguments.get(name)
            config = arguments.get("generation_config")
            default = getattr(self.runtime.model, "generation_config", None)
            return given or getattr(config, name, None) or getattr(default, name, None)

        if (chunk := option("prefill_chunk_size")) and not self.runtime.local.pinned:
            raise ValueError(
                f"milora: prefill_chunk_size={chunk} cannot be exact with a prompt router: a "
                "block's input depends on the routes of the blocks before it, which need the whole "
                "prompt. Leave prefill_chunk_size unset, or pin a route with milora.pin_route"
            )
        if option("cache_implementation") == "paged":
            raise ValueError(
                "milora: cache_implementation='paged' (continuous batching) packs several requests "
                "into one row, whose routes cannot be told apart; use a padded batch"
            )

    def prepare_inputs(self, original: Callable, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Note the prompt's mask, while it is still 2-D, with the cache that the prefill fills."""
        inputs = original(*args, **kwargs)
        generation = self.runtime.local.generation
        if generation is None or self.runtime.is_encoder_decoder:
            return inputs
        cache = kwargs.get("past_key_values")
        generation.prepared = inputs.get("input_ids")
        if cache is not None:
            if held_by(cache) is None:
                setattr(cache, PENDING, self._pending(generation, kwargs))
        elif generation.own.pending is None:
            generation.own.pending = self._pending(generation, kwargs)
        return inputs

    def _pending(self, generation: Generation, kwargs: dict[str, Any]) -> Pending:
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        return Pending(mask, generation.length, generation.num_prompts)
