"""One point of bench_multitenant.py's axes, and what all its cases do with it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from measure import Report, Run, popularity
from providers import Plain, Provider, check_logits, route_of
from tenants import MODULES, Shape, Tenants
from torch import Tensor, nn

ALL_ON = {"top_k": len(MODULES), "gate": "hard"}  # the router runs, and every gate is 1
TOP_3 = {"top_k": 3}


@dataclass
class Setting:
    args: argparse.Namespace
    report: Report
    shape: Shape
    dtype: torch.dtype
    rank: int
    batch: int
    num_adapters: int  # on the model, in c1 to c3
    popularity: str
    base: nn.Module
    bandwidth: float  # bytes a second

    def tenants(self, num_adapters: int, adapter_of: list[int] | None = None) -> Tenants:
        """Random adapters; rows ask for them by the setting's popularity if not told otherwise."""
        rows = adapter_of or popularity(self.popularity, self.batch, num_adapters)
        device = self.args.device
        return Tenants.random(self.shape, self.rank, num_adapters, rows, self.dtype, device)

    @property
    def extra(self) -> dict:
        return {
            "rank": self.rank,
            "batch": self.batch,
            "tenants": self.num_adapters,
            "popularity": self.popularity,
            "shape": str(self.shape),
        }

    def bytes_floor(self, base_seconds: float, nbytes: int) -> float:
        """Time ÷ base if the adapters' bytes came at full read bandwidth and nothing else."""
        return 1 + nbytes / self.bandwidth / base_seconds


class Decoding:
    """A decode step: one token per row behind the prompts, on a cache that stays as it is."""

    def __init__(self, provider: Provider, prompts: Tensor):
        self.provider = provider
        self.prefilled = provider(input_ids=prompts, use_cache=True, logits_to_keep=1)
        self.cache = self.prefilled.past_key_values
        self.token = prompts[:, :1]

    def step(self) -> Tensor:
        output = self.provider(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        return output.logits

    def reset(self) -> None:
        self.cache.crop(-1)

    @property
    def run(self) -> Run:
        return Run(self.step, self.reset)


def check(s: Setting, tenants: Tenants, providers: dict[str, Provider], prompts: Tensor) -> None:
    """Compare every provider's logits, of a prefill and of a decode step, with plain torch."""
    plain = Plain(s.base, tenants)

    def logits(provider) -> Tensor:
        decoding = Decoding(provider, prompts)
        return torch.cat([decoding.prefilled.logits, decoding.step()], dim=1).float()

    off = torch.zeros_like(tenants.gates())
    bare = logits(lambda **inputs: plain(off, **inputs))
    for name, provider in providers.items():
        if provider.routed:
            provider.gates = route_of(provider.model, {"input_ids": prompts, **provider.kwargs})
        gates = provider.gates
        want = logits(lambda gates=gates, **inputs: plain(gates, **inputs))
        check_logits(name, logits(provider), want, bare, s.dtype)
