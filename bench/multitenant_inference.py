"""Cases c1, c2 and c3: decode with all modules on, decode routed, prefill with all modules on."""

from __future__ import annotations

import gc

import multitenant_profile
import torch
from measure import Run, Times, interleaved
from providers import Provider, milora_model, peft_model, pooled_model, route_of, stacked_model
from setting import ALL_ON, TOP_3, Decoding, Setting, check
from tenants import MODULES, Tenants

PROVIDERS = ("base", "milora", "peft", "stacked", "reference")
# In c2 rivals cannot route: they have these modules on for every row. A little fewer bytes than
# three modules have on average, so the comparison favours them.
SHARED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


def make_providers(s: Setting, tenants: Tenants, routed: bool) -> dict[str, Provider]:
    rivals = SHARED if routed else MODULES
    on, names = tenants.gates(rivals), {"adapter_names": tenants.names}
    make = pooled_model if s.args.pool else milora_model
    ours = make(s.base, tenants, TOP_3 if routed else ALL_ON)
    makers = {
        "base": lambda: Provider(s.base, torch.zeros_like(on)),
        "milora": lambda: Provider(ours, None, names, routed=True),
        "peft": lambda: Provider(peft_model(s.base, tenants, rivals), on, names),
        "stacked": lambda: Provider(stacked_model(s.base, tenants, rivals), on),
        "reference": lambda: Provider(ours, None, names, routed=True, swapped=True),
    }
    wanted = ["base", *(name for name in s.args.provider if name != "base")]
    return {name: makers[name]() for name in wanted}


@torch.no_grad()
def run(s: Setting) -> None:
    for routed, cases in ((False, {"c1": decode, "c3": prefill}), (True, {"c2": decode})):
        wanted = [case for case in cases if case in s.args.case]
        if not wanted:
            continue
        tenants = s.tenants(s.num_adapters)
        providers = make_providers(s, tenants, routed)
        prompts = tenants.prompts(s.args.prompt_tokens).to(s.args.device)
        check(s, tenants, providers, prompts[:, :16])
        for provider in providers.values():
            if provider.routed:  # by the prompts that are timed
                inputs = {"input_ids": prompts, **provider.kwargs}
                provider.gates = route_of(provider.model, inputs)
        for case in wanted:
            cases[case](s, case, tenants, providers, prompts)
        del providers
        gc.collect()


def decode(s: Setting, case: str, tenants: Tenants, providers: dict, prompts) -> None:
    runs = {name: Decoding(provider, prompts).run for name, provider in providers.items()}
    times = interleaved(runs, s.args.device, s.args.repeat or 60, s.args.seconds)
    for name, provider in providers.items():
        nbytes = tenants.active_bytes(provider.gates)
        floor = s.bytes_floor(times["base"].best, nbytes)
        s.report.time(
            case, name, s.dtype, "decode_step", times, floor=floor, adapter_bytes=nbytes,
            **described(s, tenants, provider),
        )  # fmt: skip
        if name == "milora" and s.args.profile:
            seconds = (floor - 1) * times["base"].best
            multitenant_profile.run(s, case, runs["base"], runs["milora"], seconds)


def prefill(s: Setting, case: str, tenants: Tenants, providers: dict, prompts) -> None:
    inputs = {"input_ids": prompts, "use_cache": True, "logits_to_keep": 1}
    runs = {name: Run(lambda p=provider: p(**inputs)) for name, provider in providers.items()}
    times = interleaved(runs, s.args.device, s.args.repeat or 8, 2 * s.args.seconds)
    for name, provider in providers.items():
        flops = tenants.active_flops(provider.gates, prompts.shape[1])
        floor = flops_floor(s, times["base"], flops, prompts.numel())
        s.report.time(
            case, name, s.dtype, "prefill", times, floor=floor, adapter_flops=flops,
            prompt_tokens=prompts.shape[1], **described(s, tenants, provider),
        )  # fmt: skip
        if name == "milora" and s.args.profile:
            seconds = (floor - 1) * times["base"].best
            multitenant_profile.run(s, case, runs["base"], runs["milora"], seconds)


def flops_floor(s: Setting, base: Times, flops: int, num_tokens: int) -> float:
    """Time ÷ base if the adapters' arithmetic ran at the rate of the base's own."""
    rate = 2 * s.shape.linear_weights * num_tokens / base.best
    return 1 + flops / rate / base.best


def described(s: Setting, tenants: Tenants, provider: Provider) -> dict:
    """What else a line says: who is in the batch, and how many experts a block computes."""
    active = {
        (layer, tenants.adapter_of[row], column)
        for layer, row, column in provider.gates.nonzero().tolist()
    }
    return {
        "num_tenants": len(set(tenants.adapter_of)),
        "active_experts": len(active) / s.shape.layers,
        "pool": s.args.pool,
        **s.extra,
    }
