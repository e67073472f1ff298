"""The three adapters that the demo compares, with equal numbers of trainable parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

import milora
from milora.baselines import TokenMixtureConfig, TokenMixtureLinear, attach_token_mixture

BASE, LORA, MIXTURE, MILORA = "base", "LoRA", "token mixture", "MiLoRA"
METHODS = (BASE, LORA, MIXTURE, MILORA)

_MIXTURE_EXPERTS = range(4, 9)  # the sizes that mixture papers use
_MIXTURE_TOP_K = 2


@dataclass(frozen=True)
class Budgets:
    """One config per method, whose trainable parameters are as equal as whole ranks allow."""

    lora: milora.MiLoRAConfig
    mixture: TokenMixtureConfig
    milora: milora.MiLoRAConfig


@dataclass(frozen=True)
class Parameters:
    """`activated`: what one token (token mixture) or one prompt (MiLoRA) uses of `trainable`."""

    trainable: int
    activated: int


def equal_budgets(model: nn.Module, rank: int, seed: int) -> Budgets:
    """Fit LoRA's rank and the mixture's (experts, rank) to MiLoRA's count at `rank`.

    The routers cost parameters, so equal ranks would not be equal budgets.
    """
    routed = milora.MiLoRAConfig(rank=rank, seed=seed)
    budget = milora.count_parameters(milora.attach(model, routed)).trainable
    milora.detach(model)

    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    per_rank = sum(m.in_features + m.out_features for m in linears)
    per_expert = sum(m.in_features for m in linears)

    def mixture_size(experts: int, expert_rank: int) -> int:
        return experts * (expert_rank * per_rank + per_expert)

    experts, expert_rank = min(
        ((e, q) for e in _MIXTURE_EXPERTS for q in range(1, rank + 1)),
        key=lambda size: abs(mixture_size(*size) - budget),
    )
    return Budgets(
        lora=milora.MiLoRAConfig(rank=round(budget / per_rank), router=False, seed=seed),
        mixture=TokenMixtureConfig(experts, expert_rank, top_k=_MIXTURE_TOP_K, seed=seed),
        milora=routed,
    )


def attach(model: nn.Module, method: str, budgets: Budgets) -> nn.Module:
    """Put the method's adapter on `model`, in place; the base method leaves it as it is."""
    if method == LORA:
        return milora.attach(model, budgets.lora)
    if method == MIXTURE:
        return attach_token_mixture(model, budgets.mixture)
    if method == MILORA:
        return milora.attach(model, budgets.milora)
    return model


def count(model: nn.Module, method: str) -> Parameters:
    """Trainable and activated parameters of the adapter on `model`."""
    if method == BASE:
        return Parameters(0, 0)
    if method in (LORA, MILORA):
        counts = milora.count_parameters(model)
        return Parameters(counts.trainable, counts.activated)
    layers = [m for m in model.modules() if isinstance(m, TokenMixtureLinear)]
    router = sum(m.router.numel() for m in layers)
    experts = sum(m.lora_A.numel() + m.lora_B.numel() for m in layers)
    config = layers[0].config
    return Parameters(experts + router, router + experts * config.top_k // config.num_experts)
