"""Kinds whose tokens gate single ranks: the update is g · scale · B (r(x) ⊙ A x), r(x) in R^rank.

A, B and scale are those of an ordinary chain. What is new is r, which each token gets from its own
x: few of its entries are not 0. Inference computes r in front of the op, which multiplies it in
(`milora.ops.grouped_lora_`, rank_gates); training composes the same in plain torch
(`milora.rank_gates`). Such an update is no matrix: it cannot be merged or exported, and an
`AdapterPool`, which holds (A, B) alone, refuses it.

A bias on the selection keeps the ranks in even use without a loss. Each training forward counts how
many of its tokens chose each rank, and adds bias_step · sign(mean - count) to the rank's bias, as
the authors' codes do. The bias is saved and has no gradient; under DDP it is that of rank 0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from milora import ops
from milora.experts.base import ExpertSpec, check_positive
from milora.experts.chain import FactorChain


class RankGated(FactorChain):
    """Options: `top_k`, ranks that a token uses (all, where a module has fewer); `bias_step`.

    A subclass has a tensor `<prefix>_bias` [rank] among its fixed ones.
    """

    @abstractmethod
    def rank_gates(self, x: Tensor, values: dict[str, Tensor], spec: ExpertSpec) -> Tensor:
        """r: [num_tokens, rank] float32, with 0 for what a token does not use.

        Args:
            x: [num_tokens, d_in], any float dtype.
            values: `tensors` and `frozen` in one.
        Note: a token's bits do not depend on the tokens beside it.
        """

    def tensors(self, spec: ExpertSpec) -> dict[str, tuple[int, ...]]:
        return {**super().tensors(spec), f"{self.prefix}_bias": (spec.rank,)}

    def drawn(self, tensors: dict[str, Tensor], spec: ExpertSpec) -> dict[str, Any]:
        name = f"{self.prefix}_bias"  # `rebalance` is about to change it
        return {name: tensors[name].clone()}

    @torch.no_grad()
    def rebalance(self, tensors: dict[str, Tensor], gates: Tensor, spec: ExpertSpec) -> None:
        """Move the bias towards even use, after a training forward with these gates."""
        counts = (gates != 0).sum(0).to(torch.float32)
        step = self.option(spec, "bias_step") * (counts.mean() - counts).sign()
        bias = tensors[f"{self.prefix}_bias"]
        bias.add_(step.to(bias.dtype))

    def selected(self, scores: Tensor, spec: ExpertSpec) -> Tensor:
        """[num_tokens, rank]: 1 for the top_k highest scores (ties: lower index), else 0."""
        order = scores.detach().sort(dim=1, descending=True, stable=True).indices
        chosen = order[:, : self.option(spec, "top_k")]
        return torch.zeros_like(scores).scatter(1, chosen, 1.0)

    def validate(self, options: dict[str, Any]) -> None:
        super().validate(options)
        check_positive(self.name, options, "top_k")
        step = options.get("bias_step", 0.0)
        is_number = isinstance(step, int | float) and not isinstance(step, bool)
        if not is_number or not math.isfinite(step) or step < 0:
            raise ValueError(f"{self.name}: bias_step must be a number >= 0, got {step!r}")


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in float32, [num_tokens, rows], differentiable.

    Through our own op with an identity for B, since a GEMM of torch's gives a row other bits in
    another batch, and next to a tie the row would then choose other ranks.

    Args:
        x: [num_tokens, d_in].  weight: [rows, d_in], at most 256 rows.
    """
    x, weight = x.float(), weight.float()
    num_tokens, rows = x.shape[0], weight.shape[0]
    device = x.device
    return ops.grouped_lora(
        torch.zeros(num_tokens, rows, device=device),
        x.contiguous(),
        [weight.contiguous()],
        [torch.eye(rows, device=device)],
        [1.0],
        torch.ones(1, device=device),
        torch.zeros(num_tokens, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
