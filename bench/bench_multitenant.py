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

import gc
import itertools

import machine
import multitenant_inference
import multitenant_registered
import multitenant_training
from measure import DTYPES, Report, parser
from multitenant_inference import PROVIDERS
from setting import Setting
from tenants import Shape, base_model


def main() -> None:
    options = parser(__doc__.splitlines()[0], ("c1", "c2", "c3", "c4", "t1"))
    options.add_argument("--shape", type=Shape.parse, default=Shape(),
                         help="hidden,layers,heads,intermediate,vocab")  # fmt: skip
    options.add_argument("--provider", nargs="+", choices=PROVIDERS, default=None,
                         help="default: all; on a GPU all but the slow reference")  # fmt: skip
    options.add_argument("--rank", type=int, nargs="+", default=[32])
    options.add_argument("--batch", type=int, nargs="+", default=[8])
    options.add_argument(
        "--tenants", type=int, nargs="+", default=[8], help="adapters on the model"
    )
    options.add_argument("--pool", action="store_true", help="c1 to c3 from an AdapterPool")
    options.add_argument("--profile", action="store_true", help="where milora's time goes")
    options.add_argument("--prompt-tokens", type=int, default=128)
    options.add_argument("--train-tokens", type=int, default=256)
    options.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="most time for one case and dtype; c3 and t1 take twice",
    )
    args = options.parse_args()
    if args.quick:
        args.shape = Shape(**{**vars(args.shape), "layers": min(2, args.shape.layers)})
        args.prompt_tokens, args.train_tokens = (
            min(32, args.prompt_tokens),
            min(64, args.train_tokens),
        )
        args.repeat = args.repeat or 4
    if args.provider is None:
        args.provider = [p for p in PROVIDERS if p != "reference" or args.device == "cpu"]
    report = Report("multitenant", args)
    bandwidth = 0.0
    for name in args.dtype:
        dtype = DTYPES[name]
        # The best of all tries: a slow spell must not lower the floors' cost of bytes.
        bandwidth = max(bandwidth, machine.read_bandwidth(args.device))
        report.add("memory", "base", dtype, "read_bandwidth", bandwidth / 1e9, "GB/s")
        base = base_model(args.shape, dtype, args.device)
        points = itertools.product(args.rank, args.batch, args.tenants, args.popularity)
        for rank, batch, tenants, mix in points:
            s = Setting(args, report, args.shape, dtype, rank, batch, tenants, mix, base, bandwidth)
            multitenant_inference.run(s)
            if "c4" in args.case:
                multitenant_registered.run(s)
            if "t1" in args.case:
                multitenant_training.run(s)
        del base
        gc.collect()


if __name__ == "__main__":
    main()
