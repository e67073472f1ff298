"""The load-balance loss, and how it joins the task loss.   [MiLoRA, eq. 4 and 5]

L_lb = mean over blocks of N · Σ_i f_i · p̂_i is added to the loss that the model returns, so that
any training loop sees it. A Trainer that makes its loss of other outputs collects it instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from milora.routing import Call

if TYPE_CHECKING:
    from milora.runtime import Runtime

IGNORED = -100


class BalanceWindow:
    """The loss of one adapter, with f_i taken over a running window.

    f_i (detached) is the share of prompts whose argmax is expert i over at least `size` prompts: on
    a micro-batch of one, f would be one-hot and the loss would only punish confidence. Counts are
    summed over data-parallel ranks; nothing here waits for the device. p̂ is the mean probability
    over this micro-batch's prompts.
    """

    def __init__(self, size: int):
        self.size = size
        self.steps: list[tuple[int, Tensor]] = []  # (prompts, counts of all blocks end to end)
        self.widths: list[int] = []
        self.last_loss: Tensor | None = None

    def loss(self, probabilities: list[Tensor], weights: Tensor | None = None) -> Tensor:
        """The loss of one micro-batch, which is added to the window.

        Args:
            probabilities: [num_prompts, N_b] of each block.
            weights: [num_prompts], each prompt's part of a batch that is accumulated from several
                micro-batches; the losses of all of them then add up to the whole batch's. None
                weighs the prompts equally, with a sum of 1.
        Returns: scalar, differentiable in the probabilities.
        """
        self.widths = [p.shape[1] for p in probabilities]
        counts = torch.cat([_leads(p.detach()) for p in probabilities])
        num_prompts = probabilities[0].shape[0]
        if weights is None:
            weights = probabilities[0].new_full((num_prompts,), 1 / max(num_prompts, 1))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
            num_prompts *= dist.get_world_size()
        self._push(num_prompts, counts)
        per_block = [
            p.shape[1] * (f.to(p) * (weights.to(p) @ p)).sum()
            for f, p in zip(self._shares(), probabilities, strict=True)
        ]
        loss = torch.stack(per_block).mean()
        tiny = torch.finfo(weights.dtype).tiny
        self.last_loss = loss.detach() / weights.sum().clamp(min=tiny).to(loss)
        return loss

    def _push(self, num_prompts: int, counts: Tensor) -> None:
        self.steps.append((num_prompts, counts))
        total = sum(prompts for prompts, _ in self.steps)
        while total - self.steps[0][0] >= self.size:
            total -= self.steps.pop(0)[0]

    def _shares(self) -> list[Tensor]:
        total = torch.stack([counts for _, counts in self.steps]).sum(0)
        return [block / block.sum() for block in total.split(self.widths)]

    def shares(self) -> list[list[float]]:
        """f_i of each block over the window, a list per block; empty before the first batch."""
        return [share.tolist() for share in self._shares()] if self.steps else []

    def state_dict(self) -> dict:
        return {
            "widths": self.widths,
            "steps": [[prompts, counts.tolist()] for prompts, counts in self.steps],
        }

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.widths = [int(width) for width in state["widths"]]
        self.steps = [(int(n), torch.tensor(c, device=device)) for n, c in state["steps"]]


def _leads(probabilities: Tensor) -> Tensor:
    """[N] int64: how often each expert is the argmax. `torch.bincount` would wait for a GPU."""
    experts = torch.arange(probabilities.shape[1], device=probabilities.device)
    return (probabilities.argmax(-1, keepdim=True) == experts).sum(0)


@dataclass
class Collected:
    """For a training loop that does not use the model's own loss.

    Attributes:
        labels: labels of forwards that are given none: they say where the prompts end.
        num_items: labels in the whole accumulated batch, as `num_items_in_batch`.
        terms: the balance losses of the forwards, weighted, for the loop to add.
    """

    labels: Tensor | None = None
    num_items: Tensor | int | None = None
    terms: list[Tensor] = field(default_factory=list)


def add_balance_loss(runtime: Runtime, call: Call, output: Any) -> Any:
    """Add the balance loss of a training forward to the loss in its output, or collect it.

    Returns: the output to hand on; None leaves it as it is.
    """
    collected = runtime.local.collected
    task_loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    is_wanted = isinstance(task_loss, Tensor) and call.labels is not None
    if not call.fresh or not (is_wanted or collected is not None):
        return None
    weights = _weights(runtime, call)
    device = call.state.row_of.device  # the blocks may stand on several
    loss = None
    for name in call.adapters:
        config = runtime.configs[name]
        if not config.router or not config.balance_coef:
            continue
        rows = [row for row, of_row in enumerate(call.state.adapters) if of_row == name]
        take = slice(None) if len(rows) == call.state.num_prompts else rows
        probabilities = [
            (p[take][:, columns] if len(columns) < p.shape[1] else p[take]).to(device)
            for p, columns in zip(
                call.state.block_probabilities, runtime.columns[name], strict=True
            )
            if columns
        ]
        term = runtime.windows[name].loss(probabilities, None if weights is None else weights[take])
        loss = config.balance_coef * term if loss is None else loss + config.balance_coef * term
    if loss is None:
        return None
    if collected is not None:
        collected.terms.append(loss)
        return None
    total = task_loss + loss.to(task_loss)
    if isinstance(output, tuple):
        return (total, *output[1:])
    output.loss = total
    return output


def _weights(runtime: Runtime, call: Call) -> Tensor | None:
    """[num_prompts]: each prompt's part of the accumulated batch, as the task loss weighs it.

    Trainer divides the sum over an answer's tokens by the batch's number of labels. With the same
    weights, any split of a batch over micro-batches and ranks gives the same balance loss.
    """
    if call.num_items is None or call.labels is None:
        return None
    state, labels = call.state, call.labels
    answered = labels != IGNORED
    if runtime.is_encoder_decoder or runtime.whole:
        prompt_of = state.row_of
        answered = answered.flatten(1).sum(1) if answered.dim() > 1 else answered
    else:  # a causal model's first label is nobody's target
        prompt_of = call.route_of(labels.numel()).view(labels.shape)[:, 1:].flatten()
        answered = answered[:, 1:].flatten()
    weights = torch.zeros(state.num_prompts, device=labels.device)
    weights.index_add_(0, prompt_of.long().to(labels.device), answered.float())
    return weights / call.num_items
