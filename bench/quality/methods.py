"""The methods that are compared, at equal numbers of trainable parameters.

The budget is that of a plain LoRA of `rank` on all linear modules of all blocks. A router, DoRA's
magnitudes or a mixture's gates cost parameters too, so the others get smaller ranks: the same rank
everywhere, and one more on the module names that bring the count nearest to the budget.

LoRA, DoRA and AdaLoRA are PEFT's. MOELoRA (a router per module and token) is
`milora.baselines.token_mixture`. LoRA-Mini, MiLoRA and MiDoRA are this library's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

import milora
from milora.baselines import TokenMixtureConfig, attach_token_mixture
from milora.router import ROUTER_NAME

BASE = "base"
MILORA, MIDORA = "MiLoRA", "MiDoRA"
METHODS = ("LoRA", "DoRA", "AdaLoRA", "MOELoRA", "LoRA-Mini", MILORA, MIDORA)
ROUTED = (MILORA, MIDORA)

_TOP_K = 3  # the paper's
_MIXTURE_EXPERTS, _MIXTURE_TOP_K = range(4, 9), 2  # the sizes that mixture papers use
_ADALORA_KEEPS = 2 / 3  # its paper starts at 1.5 times the rank that is left in the end


@dataclass(frozen=True)
class Attached:
    """A model with an adapter. `activated`: what one prompt (MOELoRA: one token) uses."""

    model: nn.Module
    trainable: int
    activated: int


@dataclass(frozen=True)
class Ranks:
    """`rank` everywhere, and one more on the modules named in `raised`."""

    rank: int
    raised: tuple[str, ...] = ()

    def pattern(self, factor: float = 1) -> dict[str, Any]:
        return dict.fromkeys(self.raised, factor * (self.rank + 1))


def linears(model: nn.Module) -> dict[str, list[nn.Linear]]:
    """The linear modules of the blocks by last name ("q_proj"); the output head is left out."""
    head, found = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found.setdefault(name.rpartition(".")[2], []).append(module)
    return found


def per_rank(model: nn.Module) -> dict[str, int]:
    """Parameters that one more rank costs, by module name."""
    return {
        name: sum(m.in_features + m.out_features for m in modules)
        for name, modules in linears(model).items()
    }


def budget_of(model: nn.Module, rank: int) -> int:
    return rank * sum(per_rank(model).values())


def attach(
    model: nn.Module, method: str, rank: int, seed: int, steps: int, **changes: Any
) -> Attached:
    """Put `method` on `model`, in place, at the budget of a LoRA of `rank`.

    Args:
        steps: of the training to come; AdaLoRA plans its pruning by it.
        changes: fields of MiLoRAConfig for the ablations of MiLoRA; `alpha_factor` (alpha ÷ rank)
            for MiLoRA and LoRA; `fixed_rank` for MiLoRA, instead of the budget's; `trains_router`
            False for MiLoRA, whose routes then stay what the seed made them; `activated_only` for
            LoRA, whose budget is then what one prompt uses of the MiLoRA of this budget.

    Raises:
        ValueError: an unknown method.
    """
    if changes and method not in ("LoRA", *ROUTED):
        raise ValueError(f"attach: {method} takes no changes, got {', '.join(changes)}")
    if method in ("LoRA", "DoRA"):
        return _peft_lora(model, method == "DoRA", rank, seed, **changes)
    if method == "AdaLoRA":
        return _adalora(model, rank, seed, steps)
    if method == "MOELoRA":
        return _mixture(model, rank, seed)
    if method == "LoRA-Mini":
        return _lora_mini(model, rank, seed)
    if method in ROUTED:
        return _milora(model, "dora" if method == MIDORA else "lora", rank, seed, **changes)
    raise ValueError(f"attach: method must be one of {', '.join(METHODS)}, got {method!r}")


def fit(model: nn.Module, budget: int, fixed: int = 0) -> Ranks:
    """The ranks whose parameters plus `fixed` are nearest to `budget`."""
    costs = per_rank(model)
    rank = max(1, (budget - fixed) // sum(costs.values()))
    rest = budget - fixed - rank * sum(costs.values())
    choices = itertools.chain.from_iterable(
        itertools.combinations(costs, n) for n in range(len(costs))
    )
    raised = min(choices, key=lambda names: abs(rest - sum(costs[name] for name in names)))
    return Ranks(rank, raised)


# ---- PEFT -------------------------------------------------------------------------------------


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _seeded(model: nn.Module, config: peft.PeftConfig, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def _peft_lora(
    model: nn.Module,
    dora: bool,
    rank: int,
    seed: int,
    alpha_factor: float = 1,
    activated_only: bool = False,
) -> Attached:
    modules = linears(model)
    magnitudes = sum(m.out_features for group in modules.values() for m in group) if dora else 0
    budget = activated_by_milora(model, rank) if activated_only else budget_of(model, rank)
    ranks = fit(model, budget, magnitudes)
    config = peft.LoraConfig(
        r=ranks.rank,
        lora_alpha=alpha_factor * ranks.rank,
        rank_pattern=ranks.pattern(),
        alpha_pattern=ranks.pattern(alpha_factor),
        target_modules=list(modules),
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    model = _seeded(model, config, seed)
    return Attached(model, _trainable(model), _trainable(model))


def _adalora(model: nn.Module, rank: int, seed: int, steps: int) -> Attached:
    """PEFT's AdaLoRA. It trains triplets of all `rank`, and keeps two thirds of them on average."""
    kept = max(1, round(_ADALORA_KEEPS * rank))
    config = peft.AdaLoraConfig(
        init_r=rank,
        target_r=kept,
        lora_alpha=rank,
        tinit=steps // 5,
        tfinal=steps // 4,
        deltaT=max(1, steps // 50),
        total_step=steps,
        target_modules=list(linears(model)),
        task_type="CAUSAL_LM",
    )
    model = _seeded(model, config, seed)
    return Attached(model, _trainable(model), _trainable(model) * kept // rank)


# ---- this library's ---------------------------------------------------------------------------


def mixture_size(model: nn.Module, rank: int) -> tuple[int, int]:
    """(experts, rank of each) whose count is nearest to the budget, the gates' rows included."""
    per_expert = sum(m.in_features for group in linears(model).values() for m in group)
    of_rank, budget = sum(per_rank(model).values()), budget_of(model, rank)
    sizes = itertools.product(_MIXTURE_EXPERTS, range(1, rank + 1))
    return min(sizes, key=lambda size: abs(size[0] * (size[1] * of_rank + per_expert) - budget))


def _mixture(model: nn.Module, rank: int, seed: int) -> Attached:
    experts, expert_rank = mixture_size(model, rank)
    config = TokenMixtureConfig(experts, expert_rank, top_k=_MIXTURE_TOP_K, seed=seed)
    gates = experts * sum(m.in_features for group in linears(model).values() for m in group)
    attach_token_mixture(model, config)
    trainable = _trainable(model)
    return Attached(model, trainable, gates + (trainable - gates) * _MIXTURE_TOP_K // experts)


def _lora_mini(model: nn.Module, rank: int, seed: int) -> Attached:
    """Inner sizes of 64, or half the model's width if that is less, and as high a rank as fits."""
    modules = linears(model)
    inner = min(64, model.config.hidden_size // 2)
    of_rank = 2 * inner * sum(map(len, modules.values()))
    config = milora.MiLoRAConfig(
        rank=max(1, round(budget_of(model, rank) / of_rank)),
        router=False,
        expert="lora_mini",
        expert_options={"inner_in": inner, "inner_out": inner},
        seed=seed,
    )
    return _counted(milora.attach(model, config))


def _milora(
    model: nn.Module,
    expert: str,
    rank: int,
    seed: int,
    alpha_factor: float | None = None,
    fixed_rank: int | None = None,
    trains_router: bool = True,
    **changes: Any,
) -> Attached:
    if not trains_router:
        changes = {"bilevel": False, **changes}
    ranks = Ranks(fixed_rank) if fixed_rank else routed_ranks(model, expert, rank)
    factor = {} if alpha_factor is None else {
        "alpha": alpha_factor * ranks.rank, "alpha_pattern": ranks.pattern(alpha_factor),
    }  # fmt: skip
    config = milora.MiLoRAConfig(
        **{"top_k": _TOP_K, **changes},
        **factor,
        rank=ranks.rank,
        rank_pattern=ranks.pattern(),
        expert=expert,
        seed=seed,
    )
    attached = _counted(milora.attach(model, config))
    return attached if trains_router else _without_router(attached)


def _without_router(attached: Attached) -> Attached:
    """Take the routers out of the training and out of the counts."""
    removed = 0
    for name, parameter in attached.model.named_parameters():
        if f".{ROUTER_NAME}." in name:
            removed += parameter.numel()
            parameter.requires_grad_(False)
    return Attached(attached.model, attached.trainable - removed, attached.activated - removed)


def activated_by_milora(model: nn.Module, rank: int) -> int:
    """Parameters that one prompt uses of a MiLoRA at the budget of a LoRA of `rank`."""
    activated = _milora(model, "lora", rank, seed=0).activated
    milora.detach(model)
    return activated


def routed_ranks(model: nn.Module, expert: str, rank: int) -> Ranks:
    """What is left of the budget for experts beside router, pooler and coefficients."""
    milora.attach(model, milora.MiLoRAConfig(rank=1, expert=expert))
    fixed = milora.count_parameters(model).trainable - sum(per_rank_of_bases(model).values())
    milora.detach(model)
    return fit(model, budget_of(model, rank), fixed)


def per_rank_of_bases(model: nn.Module) -> dict[str, int]:
    """`per_rank` of a model whose linear modules are wrapped already: they are `base_layer`s."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.endswith(".base_layer") and isinstance(module, nn.Linear):
            found[name] = module.in_features + module.out_features
    return found


def _counted(model: nn.Module) -> Attached:
    count = milora.count_parameters(model)
    return Attached(model, count.trainable, count.activated)
