"""grouped_lora_ (decode, prefill) and grouped_lora (training) beside what people write in torch.

Providers: ours; loop, one LoRA after another over its own rows, as PEFT's mixed batches do;
stacked, the adapters' weights gathered and multiplied with baddbmm (equal ranks); linear, the base
module alone, which is the yardstick of the ratios of decode and prefill.

    python bench/bench_grouped_lora.py --quick --json results.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from measure import Report, arguments, fastest
from torch.nn.functional import linear

from milora import ops, reference


@dataclass(frozen=True)
class Case:
    name: str
    num_rows: int  # prompts
    tokens_per_row: int
    d_in: int
    d_out: int
    rank: int = 32
    num_adapters: int = 8
    popularity: str = "distinct"  # or identical: every row the same adapter


DECODE = [
    Case("decode 1 row", 1, 1, 1024, 1024),
    Case("decode 8 rows, 8 adapters", 8, 1, 1024, 1024),
    Case("decode 8 rows, 1 adapter", 8, 1, 1024, 1024, popularity="identical"),
    Case("decode 8 rows, mlp", 8, 1, 1024, 2816),
]
PREFILL = [Case("prefill 8 x 128", 8, 128, 1024, 1024)]
TRAIN = [
    Case("train 8 x 256", 8, 256, 1024, 1024, num_adapters=1, popularity="identical"),
    Case("train 8 x 256, mlp", 8, 256, 1024, 2816, num_adapters=1, popularity="identical"),
]


def setup(case: Case, dtype: torch.dtype, device: str) -> dict:
    """Tensors of one case, the same for every provider."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype) / shape[-1] ** 0.5

    num_tokens = case.num_rows * case.tokens_per_row
    identical = case.popularity == "identical"
    adapters = [0 if identical else i % case.num_adapters for i in range(case.num_rows)]
    a = [random(case.rank, case.d_in) for _ in range(case.num_adapters)]
    bt = [random(case.rank, case.d_out) for _ in range(case.num_adapters)]
    experts = [[{"a": x.cpu(), "bt": y.cpu()}] for x, y in zip(a, bt, strict=True)]
    pool, offsets, ranks = (t.to(device) for t in reference.pack_pool(experts))
    rows = torch.arange(case.num_rows, dtype=torch.int32)
    return {
        "x": random(num_tokens, case.d_in),
        "y": random(num_tokens, case.d_out),
        "w": random(case.d_out, case.d_in),
        "a": a,
        "b": [t.T.contiguous() for t in bt],
        "adapters": adapters,
        "a_stack": torch.stack(a),
        "b_stack": torch.stack(bt),
        "pool": pool,
        "offsets": offsets,
        "ranks": ranks,
        "scales": torch.ones(case.num_adapters, 1, device=device),
        "gates": torch.ones(case.num_rows, 1, device=device),
        "route_of": rows.repeat_interleave(case.tokens_per_row).to(device),
        "adapter_of": torch.tensor(adapters, dtype=torch.int32, device=device),
    }


def ours_pool(t: dict) -> None:
    ops.grouped_lora_(
        [t["y"]],
        t["x"],
        t["pool"],
        t["offsets"],
        t["ranks"],
        t["scales"],
        t["gates"],
        t["route_of"],
        t["adapter_of"],
        [0],
    )


def loop(t: dict, case: Case) -> None:
    for adapter in sorted(set(t["adapters"])):
        rows = [row for row, used in enumerate(t["adapters"]) if used == adapter]
        index = torch.tensor(rows, device=t["x"].device)
        x = t["x"].view(case.num_rows, case.tokens_per_row, -1)[index]
        y = t["y"].view(case.num_rows, case.tokens_per_row, -1)
        y[index] += linear(linear(x, t["a"][adapter]), t["b"][adapter])


def stacked(t: dict, case: Case) -> None:
    index = torch.tensor(t["adapters"], device=t["x"].device)
    x = t["x"].view(case.num_rows, case.tokens_per_row, -1)
    y = t["y"].view(case.num_rows, case.tokens_per_row, -1)
    hidden = torch.bmm(x, t["a_stack"][index].transpose(1, 2))
    torch.baddbmm(y, hidden, t["b_stack"][index], out=y)


def bench_inference(case: Case, dtype: torch.dtype, report: Report, args) -> None:
    t = setup(case, dtype, args.device)
    runs = {
        "linear": lambda: linear(t["x"], t["w"]),
        "ours": lambda: ours_pool(t),
        "loop": lambda: loop(t, case),
        "stacked": lambda: stacked(t, case),
    }
    with torch.no_grad():
        times = fastest(runs, args.device, 20 if args.quick else 200)
    weights = len(set(t["adapters"])) * case.rank * (case.d_in + case.d_out) * dtype.itemsize
    flops = 2 * t["x"].shape[0] * case.rank * (case.d_in + case.d_out)
    for name, seconds in times.items():
        ratio = seconds / times["linear"]
        report.add(case.name, name, dtype, "time", seconds * 1e6, "us", ratio)
    report.add(case.name, "ours", dtype, "bandwidth", weights / times["ours"] / 1e9, "GB/s")
    report.add(case.name, "ours", dtype, "rate", flops / times["ours"] / 1e9, "GFLOP/s")


def bench_training(case: Case, dtype: torch.dtype, report: Report, args) -> None:
    t = setup(case, dtype, args.device)
    leaves = [t["y"], t["x"], *t["a"], *t["b"]]
    for leaf in leaves:
        leaf.requires_grad_()
    gates = t["gates"][:, 0].clone()
    top_3_of_7 = gates.clone()
    top_3_of_7[torch.arange(case.num_rows) * 3 % 7 >= 3] = 0
    dout = torch.randn_like(t["y"])

    def ours(gates: torch.Tensor) -> None:
        out = ops.grouped_lora(
            t["y"], t["x"], t["a"], t["b"], [1.0], gates, t["route_of"], t["adapter_of"]
        )
        torch.autograd.grad(out, leaves, dout)

    def peft() -> None:
        out = t["y"] + linear(linear(t["x"], t["a"][0]), t["b"][0]) * 1.0
        torch.autograd.grad(out, leaves, dout)

    runs = {"loop": peft, "ours": lambda: ours(gates), "ours top 3": lambda: ours(top_3_of_7)}
    times = fastest(runs, args.device, 5 if args.quick else 20)
    for name, seconds in times.items():
        report.add(case.name, name, dtype, "time", seconds * 1e6, "us", seconds / times["loop"])


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    report = Report("grouped_lora", args)
    for dtype in (torch.float32, torch.bfloat16):
        for case in DECODE[1:2] if args.quick else DECODE + PREFILL:
            bench_inference(case, dtype, report, args)
        for case in TRAIN[:1] if args.quick else TRAIN:
            bench_training(case, dtype, report, args)


if __name__ == "__main__":
    main()
