"""G2: a decode step of a whole model, each row its own tenant, top_k 3.

Eager: tokens/s beside the eager base, and PEFT's mixed batch with three modules on for every row.
CUDA graph: the time that the adapters add, as a multiple of reading their bytes once at the
measured copy bandwidth. Logits are compared with float32 torch on a model of fewer layers first, in
which a float32 copy of the base fits beside the rest.
"""

from __future__ import annotations

import gc
import importlib.util

import torch
from gpu_compare import Setting
from gpu_model import StaticDecoding, base_on, tenants_on
from measure import Run, Times, interleaved
from multitenant_inference import SHARED
from peers import PeerAbsent, reason
from providers import Provider, milora_model, peft_model, route_of
from setting import TOP_3, Decoding, check
from setting import Setting as ModelSetting
from tenants import Shape, Tenants
from torch import Tensor, nn

CHECKED_LAYERS = 2


def run(s: Setting, dtype: torch.dtype) -> None:
    correct(s, dtype)
    gc.collect()
    if not has_peft():
        s.absent("g2", "peft", dtype, PeerAbsent("PEFT is not installed"))
    shape, rows = s.args.shape, s.args.batch
    base = base_on(s.args.device, shape, dtype)
    tenants = tenants_on(s.args.device, shape, s.args.rank, rows, list(range(rows)), dtype)
    providers = make_providers(base, tenants)
    prompts = tenants.prompts(s.args.prompt_tokens).to(s.args.device)
    routed = {"input_ids": prompts, **providers["milora"].kwargs}
    providers["milora"].gates = route_of(providers["milora"].model, routed)
    extra = {
        "rank": s.args.rank, "batch": rows, "tenants": rows, "shape": str(shape),
        "prompt_tokens": s.args.prompt_tokens,
    }  # fmt: skip
    eager(s, dtype, providers, prompts, extra)
    graph(s, dtype, providers, prompts, tenants, extra)


def make_providers(base: nn.Module, tenants: Tenants) -> dict[str, Provider]:
    on, names = tenants.gates(SHARED), {"adapter_names": tenants.names}
    made = {
        "base": Provider(base, torch.zeros_like(on)),
        "milora": Provider(milora_model(base, tenants, TOP_3), None, names, routed=True),
    }
    if has_peft():
        made["peft"] = Provider(peft_model(base, tenants, SHARED), on, names)
    return made


def has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def correct(s: Setting, dtype: torch.dtype) -> None:
    """Raises: RuntimeError, if a provider's logits are wrong."""
    layers = min(CHECKED_LAYERS, s.args.shape.layers)
    shape = Shape(**{**vars(s.args.shape), "layers": layers})
    base = base_on(s.args.device, shape, dtype)
    rows = min(8, s.args.batch)
    tenants = tenants_on(s.args.device, shape, s.args.rank, rows, list(range(rows)), dtype)
    providers = make_providers(base, tenants)
    whole = ModelSetting(
        s.args, s.report, shape, dtype, s.args.rank, rows, rows, "distinct", base, s.bandwidth
    )
    check(whole, tenants, providers, tenants.prompts(16).to(s.args.device))


def eager(
    s: Setting, dtype: torch.dtype, providers: dict[str, Provider], prompts: Tensor, extra: dict
) -> None:
    runs = {name: Decoding(provider, prompts).run for name, provider in providers.items()}
    times = interleaved(runs, s.args.device, s.repeat, 4 * s.args.seconds)
    for name, found in times.items():
        s.report.time("g2 eager", name, dtype, "decode_step", times, **extra)
        s.report.add("g2 eager", name, dtype, "tokens_per_s", len(prompts) / found.best, "1/s",
                     **extra)  # fmt: skip
    speed = times["base"].best / times["milora"].best
    s.report.add("g2 eager", "milora", dtype, "speed_over_base", speed, "", **extra)


def graphs(
    s: Setting, case: str, dtype: torch.dtype, providers: dict[str, Provider], prompts: Tensor
) -> dict[str, Times]:
    """Seconds of a decode step as a CUDA graph; those that no graph holds are reported absent."""
    runs: dict[str, Run] = {}
    for name, provider in providers.items():
        try:
            runs[name] = StaticDecoding(provider, prompts).run(s.args.device)
        except (RuntimeError, ValueError, TypeError) as error:
            if name in ("base", "milora"):
                raise
            s.absent(case, name, dtype, PeerAbsent(f"no CUDA graph: {reason(error)}"))
    return interleaved(runs, s.args.device, s.repeat, 4 * s.args.seconds)


def graph(
    s: Setting, dtype: torch.dtype, providers: dict[str, Provider], prompts: Tensor,
    tenants: Tenants, extra: dict,
) -> None:  # fmt: skip
    times = graphs(s, "g2 graph", dtype, providers, prompts)
    nbytes = tenants.active_bytes(providers["milora"].gates)
    floor = nbytes / s.bandwidth
    base = times["base"].best
    for name in times:
        s.report.time("g2 graph", name, dtype, "decode_step", times,
                      floor=1 + floor / base, bytes=nbytes, **extra)  # fmt: skip
    added = times["milora"].best - base
    s.report.add("g2 graph", "milora", dtype, "added_over_floor", added / floor, "",
                 added_us=added * 1e6, floor_us=floor * 1e6, bytes=nbytes, **extra)  # fmt: skip
