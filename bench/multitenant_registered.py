"""Case c4: does a step cost more because more adapters are registered?

The same batch is served from pools with 1 to 1000 registered adapters, of which a handful is
resident. Two batches: every row the same tenant, and every row another one (from 10 registered on).
The adapters behind the names are a few folders on disk, each registered many times.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace

import torch
from measure import Run, Times, interleaved
from providers import Provider, open_pool, route_of, save_folders
from setting import TOP_3, Decoding, Setting, check

REGISTERED = (1, 10, 100, 1000)
NEW_TOKENS = 16
SPARE = 4  # resident adapters beyond those of a batch


@torch.no_grad()
def run(s: Setting) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kinds = s.batch  # distinct sets of weights
        tenants = s.tenants(kinds, list(range(kinds)))
        folders = save_folders(s.base, tenants, TOP_3, folder)
        base = Provider(s.base, torch.zeros_like(tenants.gates()))
        providers = {("base", "distinct"): base}
        weights = {("base", "distinct"): tenants}
        pools = []
        for registered in REGISTERED:
            model, pool = open_pool(s.base, tenants, resident=s.batch + SPARE)
            pools.append(pool)
            names = [f"tenant{i}" for i in range(registered)]
            for i, name in enumerate(names):
                pool.register(name, folders[i % kinds])
            for name in names[-SPARE:]:
                pool.load(name)
            mixes = {"identical": [0] * s.batch}
            if registered >= s.batch:
                # Far apart in the order of registration; row i gets the weights of kind i.
                spread = registered // s.batch
                mixes["distinct"] = [i * spread // kinds * kinds + i for i in range(s.batch)]
            for mix, rows in mixes.items():
                kwargs = {"adapter_names": [names[i] for i in rows]}
                providers[registered, mix] = Provider(model, None, kwargs, routed=True)
                weights[registered, mix] = replace(tenants, adapter_of=[i % kinds for i in rows])
        measure(s, providers, weights)
        for pool in pools:
            pool.close()
        del providers, base
        gc.collect()


def measure(s: Setting, providers: dict, weights: dict) -> None:
    prompts = weights["base", "distinct"].prompts(s.args.prompt_tokens).to(s.args.device)
    for mix in ("identical", "distinct"):  # the rows of a mix have the same weights in all pools
        alike = {f"c4: {key}": provider for key, provider in providers.items() if key[1] == mix}
        some = next(weights[key] for key in providers if key[1] == mix and key[0] != "base")
        check(s, some, alike, prompts[:, :16])
    for provider in providers.values():
        if provider.routed:
            inputs = {"input_ids": prompts, **provider.kwargs}
            provider.gates = route_of(provider.model, inputs)
    steps = {key: Decoding(provider, prompts).run for key, provider in providers.items()}
    repeat = s.args.repeat or 40
    report(s, "decode_step", providers, weights,
           interleaved(steps, s.args.device, repeat, s.args.seconds))  # fmt: skip
    short = prompts[:, : max(1, prompts.shape[1] // 4)]
    length = 4 if s.args.quick else NEW_TOKENS
    options = {"do_sample": False, "max_new_tokens": length, "min_new_tokens": length}
    answers = {
        key: Run(lambda p=p: p.model.generate(short, **options, **p.kwargs))
        for key, p in providers.items()
    }
    report(s, "generate", providers, weights,
           interleaved(answers, s.args.device, max(3, repeat // 10), s.args.seconds))  # fmt: skip


def report(
    s: Setting, metric: str, providers: dict, weights: dict, times: dict[tuple, Times]
) -> None:
    """Each count's time beside the base's, and beside that of the fewest registered adapters."""
    bare = times["base", "distinct"]
    fewest: dict[str, Times] = {}
    for (registered, mix), mine in times.items():
        if registered == "base":
            s.report.time("c4", "base", s.dtype, metric, {"base": mine}, **s.extra)
            continue
        first = fewest.setdefault(mix, mine)
        tenants = weights[registered, mix]
        nbytes = tenants.active_bytes(providers[registered, mix].gates)
        extra = {
            **s.extra,
            "popularity": mix,
            "registered": registered,
            "num_tenants": len(set(tenants.adapter_of)),
            "adapter_bytes": nbytes,
        }
        floor = s.bytes_floor(bare.best, nbytes) if metric == "decode_step" else None
        s.report.time("c4", "milora", s.dtype, metric, {"milora": mine, "base": bare},
                      floor=floor, **extra)  # fmt: skip
        s.report.add("c4", "milora", s.dtype, f"{metric}_growth", mine.best / first.best, "x",
                     ratio=mine.best / first.best, ratio_to="fewest registered", floor=1.0,
                     **extra)  # fmt: skip
