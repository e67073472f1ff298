"""One batch, each row its own tenant, beside the bare base, PEFT's mixed batch and stacked torch.

    c1  decode, all seven modules of every block on
    c2  decode, MiLoRA with top_k 3; the others get the same three modules for every row
    c3  prefill, all modules on
    c4  decode and a short generate with 1 to 1000 adapters registered in an AdapterPool
    t1  a training step, MiLoRA with top_k 3 beside PEFT LoRA

A decode step is one forward of one token per row on a cache of fixed length. The logits of every
provider are compared with plain float32 torch before anything is timed.

    python bench/bench_multitenant.py --case c1 c2 --json results.jsonl
"""

from __future__ import annotations

import argparse
import gc
import itertools
from dataclasses import dataclass

import machine
import multitenant_training
import torch
from measure import DTYPES, Report, Run, interleaved, parser, popularity
from providers import (
    MODULES,
    Plain,
    Provider,
    check_logits,
    milora_model,
    peft_model,
    route_of,
    stacked_model,
)
from tenants import Shape, Tenants, base_model
from torch import Tensor, nn

ALL_ON = {"top_k": 7, "gate": "hard"}  # the router runs, and every gate is 1
TOP_3 = {"top_k": 3}
SHARED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")  # rivals' modules in c2
PROVIDERS = ("base", "milora", "peft", "stacked", "reference")


@dataclass
class Setting:
    """One point of the axes; everything that the cases of it share."""

    args: argparse.Namespace
    report: Report
    shape: Shape
    dtype: torch.dtype
    rank: int
    batch: int
    popularity: str
    base: nn.Module
    bandwidth: float

    def tenants(self, num_adapters: int | None = None) -> Tenants:
        num_adapters = num_adapters or self.args.tenants
        rows = popularity(self.popularity, self.batch, num_adapters)
        device = self.args.device
        return Tenants.random(self.shape, self.rank, num_adapters, rows, self.dtype, device)

    @property
    def extra(self) -> dict:
        return {
            "rank": self.rank,
            "batch": self.batch,
            "popularity": self.popularity,
            "shape": str(self.shape),
        }


# ---- providers of c1, c2, c3 ------------------------------------------------------------------


def make_providers(s: Setting, tenants: Tenants, routed: bool) -> dict[str, Provider]:
    rivals = SHARED if routed else MODULES
    attached = milora_model(s.base, tenants, TOP_3 if routed else ALL_ON)
    names = {"adapter_names": tenants.names}
    makers = {
        "base": lambda: Provider(s.base, torch.zeros_like(tenants.gates())),
        "milora": lambda: Provider(attached, None, names, routed=True),
        "peft": lambda: Provider(peft_model(s.base, tenants, rivals), tenants.gates(rivals), names),
        "stacked": lambda: Provider(stacked_model(s.base, tenants, rivals), tenants.gates(rivals)),
        "reference": lambda: Provider(attached, None, names, routed=True, swapped=True),
    }
    wanted = ["base", *(name for name in s.args.provider if name != "base")]
    return {name: makers[name]() for name in wanted}


class Decoding:
    """One provider's decode step: one token per row behind the prompts, whose cache stays."""

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


def check(s: Setting, tenants: Tenants, providers: dict[str, Provider], prompts: Tensor) -> None:
    """Compare every provider's logits, of a prefill and of a decode step, with plain torch."""
    plain = Plain(s.base, tenants)

    def logits(provider) -> Tensor:
        decoding = Decoding(provider, prompts)
        return torch.cat([decoding.prefilled.logits, decoding.step()], dim=1).float()

    bare = logits(lambda **inputs: plain(torch.zeros_like(tenants.gates()), **inputs))
    for name, provider in providers.items():
        if provider.routed:
            provider.gates = route_of(provider.model, {"input_ids": prompts, **provider.kwargs})
        gates = provider.gates
        want = logits(lambda gates=gates, **inputs: plain(gates, **inputs))
        check_logits(name, logits(provider), want, bare, s.dtype)


def floor_of(base_seconds: float, nbytes: int, bandwidth: float) -> float:
    return (base_seconds + nbytes / bandwidth) / base_seconds


def decode(s: Setting, case: str, tenants: Tenants, providers: dict[str, Provider]) -> None:
    prompts = tenants.prompts(s.args.prompt_tokens).to(s.args.device)
    decodings = {name: Decoding(provider, prompts) for name, provider in providers.items()}
    runs = {name: Run(d.step, d.reset) for name, d in decodings.items()}
    times = interleaved(runs, s.args.device, s.args.repeat or 60, s.args.seconds)
    for name, provider in providers.items():
        nbytes = tenants.active_bytes(provider.gates)
        s.report.time(
            case, name, s.dtype, "decode_step", times,
            floor=floor_of(times["base"].best, nbytes, s.bandwidth),
            num_tenants=len(set(tenants.adapter_of)), adapter_bytes=nbytes,
            active_experts=active_per_block(tenants, provider.gates), **s.extra,
        )  # fmt: skip


def active_per_block(tenants: Tenants, gates: Tensor) -> float:
    """Distinct (adapter, module) pairs that a block computes, mean over blocks."""
    pairs = {
        (layer, tenants.adapter_of[row], column) for layer, row, column in gates.nonzero().tolist()
    }
    return len(pairs) / tenants.shape.layers


def prefill(s: Setting, case: str, tenants: Tenants, providers: dict[str, Provider]) -> None:
    prompts = tenants.prompts(s.args.prompt_tokens).to(s.args.device)
    inputs = {"input_ids": prompts, "use_cache": True, "logits_to_keep": 1}
    runs = {name: Run(lambda p=provider: p(**inputs)) for name, provider in providers.items()}
    times = interleaved(runs, s.args.device, s.args.repeat or 8, s.args.seconds)
    rate = 2 * s.shape.linear_weights * prompts.numel() / times["base"].best
    for name, provider in providers.items():
        flops = tenants.active_flops(provider.gates, prompts.shape[1])
        s.report.time(
            case, name, s.dtype, "prefill", times,
            floor=1 + flops / rate / times["base"].best,
            num_tenants=len(set(tenants.adapter_of)), adapter_flops=flops,
            prompt_tokens=prompts.shape[1], **s.extra,
        )  # fmt: skip


@torch.no_grad()
def inference_cases(s: Setting) -> None:
    for routed, cases in ((False, {"c1": decode, "c3": prefill}), (True, {"c2": decode})):
        wanted = [case for case in cases if case in s.args.case]
        if not wanted:
            continue
        tenants = s.tenants()
        providers = make_providers(s, tenants, routed)
        check(s, tenants, providers, tenants.prompts(min(16, s.args.prompt_tokens)))
        if routed:  # what the timed prompts switch on
            prompts = tenants.prompts(s.args.prompt_tokens).to(s.args.device)
            for provider in providers.values():
                if provider.routed:
                    inputs = {"input_ids": prompts, **provider.kwargs}
                    provider.gates = route_of(provider.model, inputs)
        for case in wanted:
            cases[case](s, case, tenants, providers)
        del providers
        gc.collect()


# ---- main -------------------------------------------------------------------------------------


def main() -> None:
    options = parser(__doc__.splitlines()[0], ("c1", "c2", "c3", "c4", "t1"))
    options.add_argument("--shape", type=Shape.parse, default=Shape(),
                         help="hidden,layers,heads,intermediate,vocab")  # fmt: skip
    options.add_argument("--provider", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    options.add_argument("--rank", type=int, nargs="+", default=[32])
    options.add_argument("--batch", type=int, nargs="+", default=[8])
    options.add_argument("--tenants", type=int, default=8, help="adapters on the model")
    options.add_argument("--prompt-tokens", type=int, default=128)
    options.add_argument("--train-tokens", type=int, default=256)
    options.add_argument("--seconds", type=float, default=20.0, help="most time for one case")
    args = options.parse_args()
    if args.quick:
        args.shape = Shape(**{**vars(args.shape), "layers": min(2, args.shape.layers)})
        args.repeat = args.repeat or 4
    report = Report("multitenant", args)
    bandwidth = machine.read_bandwidth(args.device)
    report.add("memory", "torch.sum", torch.float32, "read_bandwidth", bandwidth / 1e9, "GB/s")
    for name in args.dtype:
        dtype = DTYPES[name]
        base = base_model(args.shape, dtype, args.device)
        for rank, batch, mix in itertools.product(args.rank, args.batch, args.popularity):
            s = Setting(args, report, args.shape, dtype, rank, batch, mix, base, bandwidth)
            inference_cases(s)
            if "t1" in args.case:
                multitenant_training.run(s)
        del base
        gc.collect()


if __name__ == "__main__":
    main()
