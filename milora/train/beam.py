"""BeamLoRA's search over ranks: the least important ones make room for copies of the best.

Every few thousand steps [arXiv 2502.13604, section 3]

1. the shares ŝ of all modules are sorted together, and the ranks behind the mass p · (number of
   ranks) are dropped; p goes from 1 to `keep` along a cosine over the training;
2. each dropped rank becomes a copy of one of its module's best ranks, taken from an earlier state
   of A, B and their Adam moments: copies of today's would stay equal for ever. Source and copy get
   the mean of their q, and Adam forgets about q.

Where the authors leave a choice: the earlier state is that of one period before (the first copies
are fresh starts, B = 0), and at most half of a module's ranks go at a time, so that each copy has a
source of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from milora.experts import get_kind
from milora.nn import MiLoRALinear
from milora.runtime import check_known, runtime_of

_MOMENTS = ("exp_avg", "exp_avg_sq")


class BeamSearch:
    """The search on one adapter of kind "beamlora".

    Args:
        keep: p at the end of the training; it begins with 1, where nothing is dropped.
    Raises:
        ValueError: no such adapter, another kind, sharded parameters, or keep is not in (0, 1].
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default", keep: float = 0.95):
        runtime = runtime_of(model)
        check_known(runtime, adapter_name)
        if (kind := runtime.configs[adapter_name].expert) != "beamlora":
            raise ValueError(f"BeamSearch: experts must be of kind beamlora, got {kind}")
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"BeamSearch: keep must be in (0, 1], got {keep}")
        self.adapter_name = adapter_name
        self.keep = keep
        self.linears = [
            linear
            for linears in runtime.linears
            for linear in linears
            if adapter_name in linear.specs
        ]
        tensors = [t for linear in self.linears for t in linear.tensors(adapter_name).values()]
        if any(hasattr(tensor, "device_mesh") for tensor in tensors):
            raise ValueError("BeamSearch: sharded parameters cannot be rearranged here")
        self.earlier = self._state(None)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None, progress: float) -> int:
        """Drop and copy once, and keep today's state for the next time.

        Args:
            optimizer: whose Adam moments follow the ranks; None where there are none.
            progress: share of the training that is done, 0 to 1.
        Returns: how many ranks were replaced.
        """
        now = self._state(optimizer)
        shares = [self._shares(linear) for linear in self.linears]
        p = self.keep + (1.0 - self.keep) * (1.0 + math.cos(math.pi * progress)) / 2.0
        count = 0
        for linear, share, kept in zip(self.linears, shares, kept_ranks(shares, p), strict=True):
            order = share.argsort(descending=True, stable=True)
            dropped = order[~kept[order]].flip(0)[: len(share) // 2]  # the least of them first
            if len(dropped):
                self._replace(linear, optimizer, order[: len(dropped)], dropped)
                count += len(dropped)
        self.earlier = now
        return count

    def _shares(self, linear: MiLoRALinear) -> Tensor:
        kind, name = get_kind("beamlora"), self.adapter_name
        return kind.shares(linear.tensors(name), linear.specs[name]).double().cpu()

    def _replace(
        self,
        linear: MiLoRALinear,
        optimizer: torch.optim.Optimizer | None,
        sources: Tensor,
        copies: Tensor,
    ) -> None:
        tensors = linear.tensors(self.adapter_name)
        q = tensors["lora_beam_core"]
        sources, copies = sources.to(q.device), copies.to(q.device)
        for name, dim in (("lora_beam_A", 0), ("lora_beam_B", 1)):
            before, moments = self.earlier[tensors[name]]
            tensors[name].index_copy_(dim, copies, before.index_select(dim, sources))
            for key, moment in _moments(optimizer, tensors[name]).items():
                old = moments.get(key, torch.zeros_like(moment))
                moment.index_copy_(dim, copies, old.index_select(dim, sources))
        mean = (q[sources] + q[copies]) / 2
        q[sources] = q[copies] = mean
        for moment in _moments(optimizer, q).values():
            moment.zero_()

    def _state(self, optimizer: Any) -> dict[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        """Copies of every A and B, and of their moments."""
        return {
            tensor: (
                tensor.detach().clone(),
                {key: moment.clone() for key, moment in _moments(optimizer, tensor).items()},
            )
            for linear in self.linears
            for name, tensor in linear.tensors(self.adapter_name).items()
            if name != "lora_beam_core"
        }


def kept_ranks(shares: list[Tensor], p: float) -> list[Tensor]:
    """Per module, which ranks stay: the largest shares of all, until their mass is above p of it.

    Args:
        shares: per module [rank], float64.
    Returns: per module [rank] bool.
    """
    pooled = torch.cat(shares)
    order = pooled.argsort(descending=True, stable=True)
    before = pooled[order].cumsum(0) - pooled[order]  # the mass in front of each
    kept = torch.zeros_like(pooled, dtype=torch.bool)
    kept[order] = before <= p * pooled.sum()
    return list(kept.split([len(share) for share in shares]))


def _moments(optimizer: Any, tensor: Tensor) -> dict[str, Tensor]:
    state = {} if optimizer is None else optimizer.state.get(tensor, {})
    return {key: state[key] for key in _MOMENTS if key in state}


class BeamCallback(TrainerCallback):
    """Runs a `BeamSearch` inside a transformers Trainer.

    Args:
        model, adapter_name, keep: as `BeamSearch` takes them.
        every: optimizer steps between two searches (the paper: 3000).

    Attributes:
        replaced: how many ranks each search replaced so far.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str = "default",
        *,
        every: int = 3000,
        keep: float = 0.95,
    ):
        if every < 1:
            raise ValueError(f"BeamCallback: every must be at least 1, got {every}")
        self.search = BeamSearch(model, adapter_name, keep)
        self.every = every
        self.replaced: list[int] = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            progress = state.global_step / state.max_steps
            self.replaced.append(self.search.step(optimizer, progress))
        return control
