"""What is on a model and what it has done: parameters, counters, the use of its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from milora.experts import get_kind
from milora.runtime import Stats, check_known, runtime_of


def stats(model: nn.Module) -> Stats:
    """A copy of the counters; see `Stats`."""
    counted = runtime_of(model).stats
    return Stats(counted.routed_prompts, counted.router_launches)


def reset_stats(model: nn.Module) -> None:
    runtime_of(model).stats = Stats()


def balance_report(model: nn.Module, adapter_name: str | None = None) -> dict[str, Any]:
    """The last load-balance loss and each expert's share f_i over the window, per block."""
    runtime = runtime_of(model)
    name = adapter_name or runtime.active
    window = runtime.windows.get(name)
    shares = window.shares() if window else []
    loss = None if window is None or window.last_loss is None else window.last_loss.item()
    per_block = {}
    for block, share in enumerate(shares):
        experts = [runtime.blocks[block].experts[c] for c in runtime.columns[name][block]]
        per_block[block] = dict(zip(experts, share, strict=True))
    return {"balance_loss": loss, "share": per_block}


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of one adapter.

    `activated` is the worst case for one prompt: the router and the `top_k` largest experts of
    each block; `activated_mean` the mean over experts.
    """

    trainable: int
    experts: int
    router: int
    pooler: int
    activation: int
    activated: int
    activated_mean: float


def count_parameters(model: nn.Module, adapter_name: str = "default") -> ParameterCount:
    """Count an adapter's parameters; works on the meta device. Fixed tensors are none."""
    runtime = runtime_of(model)
    check_known(runtime, adapter_name)
    experts = router = pooler = activation = activated = 0
    activated_mean = 0.0
    counted: set[int] = set()
    for block, linears in enumerate(runtime.linears):
        groups = [
            linear.trained(adapter_name) for linear in linears if adapter_name in linear.specs
        ]
        sizes = sorted(sum(t.numel() for t in group.values()) for group in groups)
        for tensor in (tensor for group in groups for tensor in group.values()):
            experts += 0 if id(tensor) in counted else tensor.numel()  # some kinds share tensors
            counted.add(id(tensor))
        top_k = len(sizes)
        module = runtime.routers_of(adapter_name)[block]
        if module is not None:
            router += module.w_r.numel()
            pooler += 0 if module.w_sa is None else module.w_sa.numel()
            activation += 0 if module.theta is None else module.theta.numel()
            top_k = min(runtime.configs[adapter_name].top_k, len(sizes))
        activated += sum(sizes[len(sizes) - top_k :])
        activated_mean += top_k * sum(sizes) / max(len(sizes), 1)
    if get_kind(runtime.configs[adapter_name].expert).shares_tensors:
        activated, activated_mean = experts, float(experts)
    routing = router + pooler + activation
    return ParameterCount(
        experts + routing, experts, router, pooler, activation, activated + routing,
        activated_mean + routing,
    )  # fmt: skip


def activation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Θ: the rational coefficients of all routers of the active adapter."""
    runtime = runtime_of(model)
    name = runtime.active
    if name is None or not runtime.configs[name].router or not runtime.configs[name].bilevel:
        return []
    thetas = [router.theta for router in runtime.routers_of(name) if router is not None]
    return [theta for theta in thetas if theta is not None]
