"""How the forwards inside a `with` block are routed, recorded or trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from milora.opening import check_layout
from milora.report import activation_parameters
from milora.routing import RoutingState
from milora.runtime import Runtime, runtime_of


@contextlib.contextmanager
def _local(model: nn.Module, **values: Any) -> Iterator[Runtime]:
    runtime = runtime_of(model)
    previous = {name: getattr(runtime.local, name) for name in values}
    for name, value in values.items():
        setattr(runtime.local, name, value)
    try:
        yield runtime
    finally:
        for name, value in previous.items():
            setattr(runtime.local, name, value)


@contextlib.contextmanager
def prompt_lengths(model: nn.Module, lengths: int | list[int] | Tensor) -> Iterator[None]:
    """Say how many tokens of each row are the prompt, for forwards that give no labels.

    Args:
        lengths: one integer, or one per row (per segment of a packed row): attended tokens from
            the row's first one. Serves likelihood scoring, DPO, GRPO.
    """
    with _local(model, prompt_lengths=lengths):
        yield


@contextlib.contextmanager
def pin_route(model: nn.Module, state: RoutingState) -> Iterator[None]:
    """Use `state` for every forward inside, whatever the prompts say.

    A state of one prompt serves every row; otherwise the rows of each forward must be a multiple
    of its prompts. A route of an adapter that the model does not know, under whatever name it was
    recorded, is applied to the active one. `adapter_names`, if given, must be those of the state.
    """
    runtime = runtime_of(model)
    # accelerate leaves offloaded weights on the meta device.
    device = next(p.device for p in model.parameters() if not p.is_meta)
    state = state.to(device)
    state.adapters = tuple(
        runtime.active if name is not None and not runtime.knows(name) else name
        for name in state.adapters
    )
    check_layout(runtime, state)
    with _local(model, pinned=state):
        yield


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The bare model inside: no router, no expert."""
    with _local(model, disabled=True):
        yield


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[list[RoutingState]]:
    """Collect the route of each routed forward of this thread inside: one state per prefill."""
    states: list[RoutingState] = []
    with _local(model, recorders=(*runtime_of(model).local.recorders, states)):
        yield states


@contextlib.contextmanager
def activation_phase(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Train the rational coefficients Θ inside, and nothing else.   [MiLoRA, appendix A]

    Outside of it Θ asks for no gradient: an optimizer made of what does will not hold it, and DDP
    will not wait for it. Inside of it nothing else does.
    Yields: the coefficients.
    """
    runtime = runtime_of(model)
    theta = activation_parameters(model)
    before = [(p, p.requires_grad) for p in runtime.model.parameters()]
    runtime.model.requires_grad_(False)
    for parameter in theta:
        parameter.requires_grad_(True)
    runtime.train_theta = True
    try:
        yield theta
    finally:
        runtime.train_theta = False
        for parameter, asked in before:
            parameter.requires_grad_(asked)
