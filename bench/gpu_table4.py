"""G5: the paper's Table 4: generation with adapters that stay unmerged, beam 1 and 3.

    lora     PEFT LoRA                     dora    PEFT DoRA
    moelora  a mixture per token (Liu et al., arXiv 2310.18339): 8 experts of rank 4, top 4, ours,
             with all experts of a module in two products and its router in one
    milora   one route per prompt, top_k 3

Llama-2-7B's shape with random weights, rank 32 in all, one prompt. `generate` on a dynamic cache is
the eager form; a decode step of as many rows as beams as a CUDA graph is the other. Memory is what
PyTorch had allocated at most during `generate`, less the other methods' adapters.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import machine
import torch
from gpu_compare import Setting
from gpu_model import base_on, tenants_on
from gpu_step import graphs, has_peft
from measure import Run, Times, interleaved
from peers import PeerAbsent
from providers import Provider, fill, milora_model, peft_model
from setting import TOP_3
from tenants import Tenants, twin
from torch import Tensor, nn

from milora.baselines import TokenMixtureConfig, attach_token_mixture

BEAMS = (1, 3)
PEFTS = ("lora", "dora")
EXPERTS, TOP_EXPERTS = 8, 4


def make_lora(base: nn.Module, tenants: Tenants) -> nn.Module:
    return peft_model(base, tenants)


def make_dora(base: nn.Module, tenants: Tenants) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=tenants.rank, lora_alpha=tenants.rank, use_dora=True, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(
        twin(base), config, adapter_name="tenant0", autocast_adapter_dtype=False
    )
    fill(model, tenants, prefix="base_model.model.")
    return model.to(next(base.parameters()).dtype).eval()


def make_moelora(base: nn.Module, tenants: Tenants) -> nn.Module:
    config = TokenMixtureConfig(EXPERTS, tenants.rank // EXPERTS, TOP_EXPERTS)
    model = attach_token_mixture(twin(base), config)
    model.to(next(base.parameters()).dtype)  # its experts start in float32, which would be slower
    for module in model.modules():
        if hasattr(module, "router"):
            module.lora_B.normal_(std=module.lora_B.shape[1] ** -0.5)
    return model.eval()


def make_milora(base: nn.Module, tenants: Tenants) -> nn.Module:
    return milora_model(base, tenants, TOP_3)


MAKERS: dict[str, Callable[[nn.Module, Tenants], nn.Module]] = {
    "base": lambda base, tenants: base,
    "lora": make_lora,
    "dora": make_dora,
    "moelora": make_moelora,
    "milora": make_milora,
}


def run(s: Setting, dtype: torch.dtype) -> None:
    device = s.args.device
    base = base_on(device, s.args.shape, dtype)
    tenants = tenants_on(device, s.args.shape, s.args.rank, 1, [0], dtype)
    prompt = tenants.prompts(s.args.prompt_tokens).to(device)
    models, own = {}, {}
    for name, make in MAKERS.items():
        if name in PEFTS and not has_peft():
            s.absent("g5", name, dtype, PeerAbsent("PEFT is not installed"))
            continue
        before = allocated(device)
        models[name] = make(base, tenants)
        generate(models[name], prompt, 1, 2)  # what is built at the first use belongs to it
        gc.collect()
        own[name] = allocated(device) - before
    extra = {
        "rank": s.args.rank, "batch": 1, "shape": str(s.args.shape),
        "prompt_tokens": s.args.prompt_tokens, "new_tokens": s.args.new_tokens,
    }  # fmt: skip
    for beams in BEAMS:
        eager(s, dtype, models, prompt, beams, own, extra)
        rows = {name: Provider(model, None) for name, model in models.items()}
        case = f"g5 graph beam {beams}"
        times = graphs(s, case, dtype, rows, prompt.repeat(beams, 1))
        speeds(s, case, dtype, times, 1, extra)


def generate(model: nn.Module, prompt: Tensor, beams: int, new_tokens: int) -> Tensor:
    return model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), num_beams=beams,
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
    )  # fmt: skip


def eager(
    s: Setting, dtype: torch.dtype, models: dict[str, nn.Module], prompt: Tensor, beams: int,
    own: dict[str, int], extra: dict,
) -> None:  # fmt: skip
    case, tokens = f"g5 eager beam {beams}", s.args.new_tokens
    runs = {
        name: Run(lambda model=model: generate(model, prompt, beams, tokens))
        for name, model in models.items()
    }
    repeat = min(s.repeat, 10)  # each is a whole generation
    times = interleaved(runs, s.args.device, repeat, 8 * s.args.seconds)
    speeds(s, case, dtype, times, tokens, extra)
    if s.args.device == "cuda":
        for name, peak in peaks(runs, own).items():
            s.report.add(case, name, dtype, "peak_memory", peak / 2**30, "GiB", **extra)


def speeds(
    s: Setting, case: str, dtype: torch.dtype, times: dict[str, Times], tokens: int, extra: dict
) -> None:
    """Tokens/s of each, and milora's as a multiple of the others'."""
    for name, found in times.items():
        s.report.add(case, name, dtype, "tokens_per_s", tokens / found.best, "1/s",
                     ratio=found.best / times["base"].best, ratio_to="base", **extra)  # fmt: skip
    for rival in ("lora", "dora", "moelora"):
        if rival in times:
            gain = times[rival].best / times["milora"].best
            s.report.add(case, "milora", dtype, f"over_{rival}", gain, "", **extra)


def peaks(runs: dict[str, Run], own: dict[str, int]) -> dict[str, int]:
    """Bytes allocated at most, without what belongs to the other methods."""
    found = {}
    for name, run_ in runs.items():
        torch.cuda.reset_peak_memory_stats()
        run_.step()
        machine.synchronize("cuda")
        others = sum(size for other, size in own.items() if other not in ("base", name))
        found[name] = torch.cuda.max_memory_allocated() - others
    return found


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0
