"""prompt_router beside the same maths in plain torch and beside one read of the hidden states.

Providers: read, a sum over H, which is the yardstick of the ratios; ours; reference, plain torch
one prompt after another.

    python bench/bench_prompt_router.py --quick --json results.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from measure import Report, arguments, fastest

from milora import ops, reference


@dataclass(frozen=True)
class Case:
    name: str
    num_prompts: int
    tokens_per_prompt: int
    d: int
    pooler: str = "self_attention"
    num_experts: int = 7


CASES = [
    Case("8 x 128, d 1024", 8, 128, 1024),
    Case("1 x 4096, d 4096", 1, 4096, 4096),
    Case("8 x 128, d 1024, max", 8, 128, 1024, pooler="max"),
    Case("8 x 128, d 1024, mean", 8, 128, 1024, pooler="mean"),
]


def setup(case: Case, dtype: torch.dtype, device: str) -> dict:
    """Arguments of the op, the same for every provider."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = case.num_prompts * case.tokens_per_prompt
    starts = torch.arange(case.num_prompts, dtype=torch.int32) * case.tokens_per_prompt
    code = [ops.POOLERS.index(case.pooler), 0, 0, 0, 3, case.num_experts]
    arguments = {
        "h": torch.randn(num_tokens, case.d, generator=generator).to(dtype),
        "spans": torch.stack([starts, starts + case.tokens_per_prompt], dim=1),
        "router_of": torch.zeros(case.num_prompts, dtype=torch.int32),
        "w_sa": torch.randn(1, case.d, generator=generator) / case.d**0.5,
        "w_r": torch.randn(1, case.num_experts, case.d, generator=generator) / case.d**0.5,
        "coef": torch.tensor([[0.0, 0.5, 0.4, 0.1, 0, 0, 0, 0, 0.1, 0, 0.01, 0]]),
        "codes": torch.tensor([code], dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in arguments.items()}


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    report = Report("prompt_router", args)
    for dtype in (torch.float32, torch.bfloat16):
        for case in CASES[:1] if args.quick else CASES:
            inputs = setup(case, dtype, args.device)
            runs = {
                "read": lambda h=inputs["h"]: h.sum(dtype=torch.float32),
                "ours": lambda inputs=inputs: ops.prompt_router(**inputs),
                "reference": lambda inputs=inputs: reference.prompt_router(**inputs),
            }
            with torch.no_grad():
                times = fastest(runs, args.device, 20 if args.quick else 100)
            for name, seconds in times.items():
                ratio = seconds / times["read"]
                report.add(case.name, name, dtype, "time", seconds * 1e6, "us", ratio)
            read = inputs["h"].nbytes / times["ours"] / 1e9
            report.add(case.name, "ours", dtype, "bandwidth", read, "GB/s")


if __name__ == "__main__":
    main()
