"""The baseline: a mixture of LoRA experts with one router per linear module and per token.

The form of MOELoRA (Liu et al., arXiv 2310.18339) and LoRAMoE (Dou et al., arXiv 2312.09979) with
the sparse top-k gate of Mixtral: for each token x and each linear module W,

    p = softmax(R x),   g = p on the top_k largest, divided by their sum, else 0
    y = W x + scale * sum_e g_e B_e A_e x

A mixture of E experts of rank q is one LoRA of rank E q with a gate per rank block:
`B (g ⊙ A x)` with A = [A_1; ..; A_E] and B = [B_1, .., B_E]. So a module costs one router product,
one stacked A and one stacked B whatever E is, and no token is gathered or scattered. Computing the
dropped experts too is cheaper than sorting tokens at these ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class TokenMixtureConfig:
    """A token-routed mixture of LoRA on every linear module but the output head.

    Args:
        num_experts: experts a module has (E).
        expert_rank: rank of each expert (q); a module trains a stacked rank of E q.
        top_k: experts that a token keeps.
        alpha: the update is scaled by alpha / expert_rank; None means expert_rank.
        balance_coef: weight of the load-balance loss, mean over modules, in the model's loss.
        seed: seed of the initial A and R; B starts at zero.

    Raises:
        ValueError: a count is below 1, or top_k is above num_experts.
    """

    num_experts: int = 8
    expert_rank: int = 4
    top_k: int = 2
    alpha: float | None = None
    balance_coef: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_experts", "expert_rank", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"TokenMixtureConfig: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"TokenMixtureConfig: top_k must be at most num_experts = {self.num_experts}, "
                f"got {self.top_k}"
            )

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.expert_rank


@dataclass
class _Forward:
    """What the modules of one model share during one of its forwards."""

    collect: bool = False
    token_mask: Tensor | None = None  # [num_tokens] bool, False at padding
    losses: list[Tensor] = field(default_factory=list)


class TokenMixtureLinear(nn.Module):
    """A frozen linear module and its experts, routed per token.

    Parameters, all float32: `lora_A` [E q, d_in], `lora_B` [d_out, E q], `router` [E, d_in].
    """

    def __init__(
        self, base_layer: nn.Linear, config: TokenMixtureConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.config = config
        self.shared = _Forward()
        d_out, d_in = base_layer.weight.shape
        stacked = config.num_experts * config.expert_rank
        # PEFT's initial LoRA: kaiming-uniform with a = sqrt(5), which is U(-1, 1) / sqrt(d_in).
        bound = 1 / math.sqrt(d_in)
        device = base_layer.weight.device

        def uniform(rows: int) -> nn.Parameter:
            # Drawn on the CPU, so that a seed gives the same experts on every device.
            values = torch.empty(rows, d_in).uniform_(-bound, bound, generator=generator)
            return nn.Parameter(values.to(device))

        self.lora_A = uniform(stacked)
        self.router = uniform(config.num_experts)
        self.lora_B = nn.Parameter(torch.zeros(d_out, stacked, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d_in] to [..., d_out], in the base's dtype; the mixture runs in float32."""
        config = self.config
        y = self.base_layer(x)
        tokens = x.reshape(-1, x.shape[-1]).to(self.lora_A.dtype)
        gates = self._gates(functional.linear(tokens, self.router))
        low = functional.linear(tokens, self.lora_A)
        low = low.view(-1, config.num_experts, config.expert_rank) * gates.unsqueeze(-1)
        flat = y.reshape(-1, y.shape[-1])
        update = low.flatten(1)
        if flat.dtype == update.dtype:
            return torch.addmm(flat, update, self.lora_B.t()).view_as(y)
        return y + functional.linear(update, self.lora_B).to(y.dtype).view_as(y)

    def _gates(self, logits: Tensor) -> Tensor:
        """Gates [num_tokens, E] times `scale`, from router logits of the same shape."""
        config = self.config
        kept, index = logits.topk(config.top_k, dim=-1)
        # softmax over the kept logits is the full softmax divided by the kept sum
        weights = kept.softmax(dim=-1) * config.scale
        gates = torch.zeros_like(logits).scatter(-1, index, weights)
        if self.shared.collect:
            self.shared.losses.append(_balance_loss(logits, index, self.shared.token_mask))
        return gates


def attach_token_mixture(model: nn.Module, config: TokenMixtureConfig) -> nn.Module:
    """Freeze `model` and put a mixture on each of its linear modules, in place.

    The output head (`model.get_output_embeddings()`) is left as it is. While training, the
    balance loss joins the model's loss, weighted under gradient accumulation like the task loss.

    Raises:
        ValueError: the model has no linear module, or has a mixture already.
    """
    head = model.get_output_embeddings()
    targets = []
    for name, module in model.named_modules():
        if isinstance(module, TokenMixtureLinear):
            raise ValueError(f"attach_token_mixture: {name} has a mixture already")
        if isinstance(module, nn.Linear) and module is not head:
            targets.append((name, module))
    if not targets:
        raise ValueError("attach_token_mixture: the model has no nn.Linear besides its output head")

    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    shared = _Forward()
    for name, module in targets:
        layer = TokenMixtureLinear(module, config, generator)
        layer.shared = shared
        layer.train(module.training)
        model.set_submodule(name, layer)
    model._token_mixture_hooks = _install_balance(model, shared, config.balance_coef)
    return model


def detach_token_mixture(model: nn.Module) -> nn.Module:
    """Put the frozen linear modules back; the model is bit for bit what it was.

    Raises:
        ValueError: the model has no mixture.
    """
    mixtures = [(n, m) for n, m in model.named_modules() if isinstance(m, TokenMixtureLinear)]
    if not mixtures:
        raise ValueError("detach_token_mixture: the model has no token mixture")
    for name, module in mixtures:
        model.set_submodule(name, module.base_layer)
    for hook in model.__dict__.pop("_token_mixture_hooks"):
        hook.remove()
    return model


def _balance_loss(logits: Tensor, index: Tensor, token_mask: Tensor | None) -> Tensor:
    """E * sum_e f_e * mean p_e over real tokens; 1 when balanced.   [Switch, arXiv 2101.03961]

    `f_e` is the share of the kept slots that went to expert e and carries no gradient.
    """
    num_experts = logits.shape[-1]
    probabilities = logits.softmax(dim=-1)
    if token_mask is not None:
        probabilities, index = probabilities[token_mask], index[token_mask]
    slots = torch.bincount(index.flatten(), minlength=num_experts).to(probabilities.dtype)
    return num_experts * (slots / slots.sum()) @ probabilities.mean(dim=0)


def _install_balance(model: nn.Module, shared: _Forward, coefficient: float) -> list:
    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        shared.losses = []
        shared.collect = module.training and kwargs.get("labels") is not None
        mask = kwargs.get("attention_mask")
        shared.token_mask = None if mask is None or mask.dim() != 2 else mask.bool().flatten()

    def after(module: nn.Module, args: tuple, kwargs: dict, output):
        if shared.collect and output.loss is not None:
            balance = torch.stack(shared.losses).mean()
            output.loss = output.loss + coefficient * _share(kwargs) * balance
        shared.collect, shared.token_mask, shared.losses = False, None, []
        return output

    return [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]


def _share(kwargs: dict) -> Tensor | float:
    """This micro-batch's share of the whole batch: Trainer does not divide the loss afterwards."""
    num_items = kwargs.get("num_items_in_batch")
    if num_items is None:
        return 1.0
    # Causal models shift labels by one, so the first column is never a target.
    return (kwargs["labels"][:, 1:] != -100).sum() / num_items
