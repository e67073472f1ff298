"""The CUDA kernels, and whole models with them, beside other engines, PEFT and plain torch.

    g1    the decode op, 64 rows of 64 adapters; other mixes, batches, shapes, ranks and mixed ranks
    g2    a decode step of a Llama-2-7B shape, 32 tenants in a batch of 32, top_k 3
    g3    a block's linear modules over 4096 prompt tokens of 8 tenants
    g4    the prompt router beside one read of the hidden states
    g5    the paper's Table 4: generation with beam 1 and 3 beside LoRA, DoRA and MOELoRA
    pool  the adapter pool's copies beside one copy of as many bytes

Every provider is compared with float32 torch before it is timed. Engines come from bench/peers/;
one that cannot run is reported as absent. With `--device cpu --quick` everything runs small and
without graphs, to try the paths; such times mean nothing.

    python bench/bench_gpu.py --device cuda --case g1 --json build/gpu/gpu.jsonl
"""

from __future__ import annotations

import gc
import importlib

import gpu_timing
import torch
from gpu_cases import LLAMA_7B, TINY
from gpu_compare import Setting
from measure import DTYPES, POPULARITIES, Report, parser
from tenants import Shape

CASES = {
    "g1": "gpu_decode",
    "g2": "gpu_step",
    "g3": "gpu_prefill",
    "g4": "gpu_router",
    "g5": "gpu_table4",
    "pool": "gpu_pool",
}
SMALL = {"shape": Shape.parse(TINY), "tokens": 64, "tenants": 2, "rank": 8, "batch": 2,
         "prompt_tokens": 16, "new_tokens": 4}  # fmt: skip


def main() -> None:
    options = parser(__doc__.splitlines()[0], list(CASES))
    options.set_defaults(popularity=list(POPULARITIES), dtype=["bfloat16"], device="cuda")
    options.add_argument("--shape", type=Shape.parse, default=Shape.parse(LLAMA_7B),
                         help="hidden,layers,heads,intermediate,vocab")  # fmt: skip
    options.add_argument("--rank", type=int, default=32, help="of g2, g3, g5 and pool")
    options.add_argument("--tokens", type=int, default=4096, help="of g3 and g4, all prompts")
    options.add_argument("--tenants", type=int, default=8, help="of g3")
    options.add_argument("--batch", type=int, default=32, help="rows of g2, each its own tenant")
    options.add_argument("--prompt-tokens", type=int, default=256, help="of g2 and g5, a row")
    options.add_argument("--new-tokens", type=int, default=32, help="of g5")
    options.add_argument("--seconds", type=float, default=5.0, help="most time for one case")
    args = options.parse_args()
    if args.quick:
        vars(args).update(SMALL)
    if args.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: torch sees no GPU; --device cpu --quick tries the paths")
    torch.manual_seed(0)
    report = Report("gpu", args)
    capability = gpu_timing.capability(args.device)
    report.common["capability"] = capability
    bandwidth = gpu_timing.copy_bandwidth(args.device, quick=args.quick)
    report.add("memory", "base", torch.uint8, "copy_bandwidth", bandwidth / 1e9, "GB/s")
    setting = Setting(args, report, bandwidth, capability)
    for case in args.case:
        for dtype in args.dtype:
            with torch.no_grad():
                importlib.import_module(CASES[case]).run(setting, DTYPES[dtype])
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
