"""grouped_lora_ (decode, prefill) and grouped_lora (training) beside what people write in torch.

Providers: milora; reference, the same in plain torch; peft, one adapter after another over its own
rows, as PEFT's mixed batches do; stacked, the rows' weights in one tensor and two batched products;
base, the linear modules themselves, which is the yardstick of the ratios. All but base time the
update alone. Weights rotate over copies that no cache holds, as a model's layers do.

    python bench/bench_grouped_lora.py --quick --json results.jsonl
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import machine
import torch
from measure import DTYPES, POPULARITIES, Report, Run, interleaved, parser, popularity
from torch import Tensor
from torch.nn.functional import linear

from milora import ops, reference

KINDS = ("decode", "prefill", "train")
TOKENS = {"decode": 1, "prefill": 128, "train": 256}  # of a row
RANKS = (8, 16, 64, 128, 256)
BATCHES = (1, 2, 4, 16, 32, 64)
# Largest error of an update, as a share of the largest update.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    kind: str
    batch: int = 8
    rank: int = 32
    popularity: str = "distinct"
    d_in: int = 1024
    d_out: tuple[int, ...] = (1024,)  # of each module that reads the same x

    @property
    def name(self) -> str:
        outs = "+".join(map(str, self.d_out))
        return f"{self.kind} b{self.batch} r{self.rank} {self.popularity} {self.d_in}-{outs}"

    @property
    def extra(self) -> dict:
        outs = "+".join(map(str, self.d_out))
        return {
            "rank": self.rank,
            "batch": self.batch,
            "popularity": self.popularity,
            "shape": f"{self.d_in}-{outs}",
        }

    @property
    def rows(self) -> list[int]:
        """The adapter of each row; there are as many adapters as rows."""
        return popularity(self.popularity, self.batch, self.batch)


def make_cases(args: argparse.Namespace) -> list[Case]:
    """Sweeps around one point, or all combinations of what the command line names."""
    cases = []
    for kind in args.case:
        mix = "identical" if kind == "train" else "distinct"  # a batch trains one adapter here
        point = Case(kind, popularity=mix)
        if args.rank or args.batch or args.popularity:
            mixes = args.popularity if kind != "train" else None
            axes = args.rank or [32], args.batch or [8], mixes or [mix]
            cases += [Case(kind, b, r, p) for r, b, p in itertools.product(*axes)]
            continue
        cases.append(point)
        if args.quick:
            continue
        cases.append(replace(point, d_out=(2816, 2816)))
        if kind == "train":
            continue
        cases += [replace(point, d_out=(1024,) * 3), replace(point, d_in=2816)]
        cases += [replace(point, rank=rank) for rank in RANKS]
        if kind == "decode":
            cases += [replace(point, batch=batch) for batch in BATCHES]
            cases += [replace(point, batch=16, popularity=mix) for mix in POPULARITIES[1:]]
    return cases


@dataclass
class Weights:
    """One layer's: per slice the base's w [d_out, d_in], adapters' a, b and Bt; and the pool."""

    w: list[Tensor]
    a: list[Tensor]  # [num_adapters, rank, d_in]
    b: list[Tensor]  # [num_adapters, d_out, rank]
    bt: list[Tensor]  # [num_adapters, rank, d_out]
    pool: Tensor

    def copy(self) -> Weights:
        groups = ([t.clone() for t in group] for group in (self.w, self.a, self.b, self.bt))
        return Weights(*groups, self.pool.clone())


class Problem:
    """Tensors of one case, the same for every provider."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str):
        draw = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=draw) * shape[-1] ** -0.5).to(dtype)

        self.case, self.device = case, device
        n, slices = case.batch, range(len(case.d_out))
        a = [random(n, case.rank, case.d_in) for _ in slices]
        b = [random(n, d_out, case.rank) for d_out in case.d_out]
        bt = [t.transpose(1, 2).contiguous() for t in b]
        experts = [[{"a": a[s][i], "bt": bt[s][i]} for s in slices] for i in range(n)]
        pool, offsets, ranks = reference.pack_pool(experts)
        tokens = TOKENS[case.kind]
        self.x = random(case.batch * tokens, case.d_in).to(device)
        self.y = [random(case.batch * tokens, d_out).to(device) for d_out in case.d_out]
        w = [random(d_out, case.d_in) for d_out in case.d_out]
        self.weights = Weights(
            *([t.to(device) for t in group] for group in (w, a, b, bt)), pool.to(device)
        )
        gates = torch.ones(n, len(slices))
        rows = torch.arange(n, dtype=torch.int32).repeat_interleave(tokens)
        adapter_of = torch.tensor(case.rows, dtype=torch.int32)
        scales = torch.ones(n, len(slices))
        self.tables = [t.to(device) for t in (offsets, ranks, scales, gates, rows, adapter_of)]

    def copies(self) -> list[Weights]:
        """So many layers that none is still in a cache when its turn comes."""
        if self.case.kind == "train":
            return [self.weights]  # bound by arithmetic
        cache = machine.cache_bytes(self.device)
        number = min(64, 1 + 2 * cache // self.weights.pool.nbytes)
        return [self.weights, *(self.weights.copy() for _ in range(number - 1))]


# ---- providers: one update of every slice, in place -------------------------------------------


def pool_op(op: Callable) -> Callable[[Problem, Weights], None]:
    def run(p: Problem, w: Weights) -> None:
        path = ops.DECODE if p.case.kind == "decode" else ops.PREFILL
        op(p.y, p.x, w.pool, *p.tables, list(range(len(p.y))), path)

    return run


def peft(p: Problem, w: Weights) -> None:
    rows_of: dict[int, list[int]] = {}
    for row, adapter in enumerate(p.case.rows):
        rows_of.setdefault(adapter, []).append(row)
    x = p.x.view(p.case.batch, -1, p.case.d_in)
    for y, a, b in zip(p.y, w.a, w.b, strict=True):
        y = y.view(p.case.batch, -1, y.shape[-1])
        for adapter, rows in rows_of.items():
            y[rows] += linear(linear(x[rows], a[adapter]), b[adapter])


def stacked(p: Problem, w: Weights) -> None:
    x = p.x.view(p.case.batch, -1, p.case.d_in)
    for y, a, bt in zip(p.y, w.a, w.bt, strict=True):
        hidden = torch.bmm(x, a.transpose(1, 2))
        y.view(p.case.batch, -1, y.shape[-1]).baddbmm_(hidden, bt)


def base(p: Problem, w: Weights) -> list[Tensor]:
    return [linear(p.x, weight) for weight in w.w]


def gathered(p: Problem, w: Weights) -> Weights:
    """A weight per row, gathered before the clock runs: `stacked` at its best."""
    rows = p.case.rows
    if rows == list(range(p.case.batch)):
        return w
    return Weights(w.w, [t[rows] for t in w.a], w.b, [t[rows] for t in w.bt], w.pool)


INFERENCE = {
    "base": base,
    "milora": pool_op(ops.grouped_lora_),
    "reference": pool_op(reference.grouped_lora_),
    "stacked": stacked,
    "peft": peft,
}


@torch.no_grad()
def bench_inference(case: Case, dtype: torch.dtype, report: Report, args, bandwidth: float) -> None:
    p = Problem(case, dtype, args.device)
    check(p, args)
    copies = p.copies()
    rings = dict.fromkeys(INFERENCE, copies)
    rings["stacked"] = [gathered(p, w) for w in copies]
    runs = {}
    for name in args.provider:
        turn = itertools.cycle(rings[name])
        runs[name] = Run(lambda f=INFERENCE[name], turn=turn: f(p, next(turn)))
    times = interleaved(runs, args.device, args.repeat or (20 if args.quick else 200), args.seconds)
    distinct, width = len(set(case.rows)), sum(case.d_in + d_out for d_out in case.d_out)
    nbytes = distinct * case.rank * width * dtype.itemsize
    flops = 2 * p.x.shape[0] * case.rank * width
    rate = 2 * p.x.shape[0] * case.d_in * sum(case.d_out) / times["base"].best
    floor = max(nbytes / bandwidth, flops / rate if TOKENS[case.kind] > 1 else 0.0)
    counts = {"num_tenants": distinct, "adapter_bytes": nbytes, "adapter_flops": flops}
    extra = {**case.extra, **counts}
    for name in args.provider:
        report.time(
            case.name, name, dtype, "time", times, unit="us",
            floor=None if name == "base" else floor / times["base"].best, **extra,
        )  # fmt: skip
    if "milora" in times:
        best = times["milora"].best
        report.add(case.name, "milora", dtype, "bandwidth", nbytes / best / 1e9, "GB/s", **extra)
        report.add(case.name, "milora", dtype, "rate", flops / best / 1e9, "GFLOP/s", **extra)


def check(p: Problem, args) -> None:
    """Every provider adds what plain float32 torch adds."""
    start = [y.clone() for y in p.y]
    want = []
    for s, y in enumerate(start):
        x = p.x.float().view(p.case.batch, -1, p.case.d_in)
        a, bt = (t[s][p.case.rows].float() for t in (p.weights.a, p.weights.bt))
        want.append((x @ a.transpose(1, 2) @ bt).view(y.shape))
    for name in args.provider:
        if name == "base":
            continue
        weights = gathered(p, p.weights) if name == "stacked" else p.weights
        INFERENCE[name](p, weights)
        for y, before, update in zip(p.y, start, want, strict=True):
            error = (y.float() - before.float() - update).abs().max() / update.abs().max()
            if not error <= ALLOWED[y.dtype]:
                raise RuntimeError(f"{p.case.name}: {name} is wrong by {error:.3g} of the update")
            y.copy_(before)


def bench_training(case: Case, dtype: torch.dtype, report: Report, args) -> None:
    """One adapter; forward and the gradients of y, x, A and B. Ratios to PEFT's expression."""
    p = Problem(case, dtype, args.device)
    a, b = ([t[0].contiguous() for t in group] for group in (p.weights.a, p.weights.b))
    leaves = [*p.y, p.x, *a, *b]
    for leaf in leaves:
        leaf.requires_grad_()
    douts = [torch.randn_like(y) for y in p.y]
    *_, gates, route_of, adapter_of = p.tables
    on = gates[:, 0].contiguous()
    some = on * (torch.arange(case.batch, device=on.device) * 3 % 7 < 3)  # 3 rows of 7

    def step(op: Callable, gates: Tensor) -> list[Tensor]:
        outs = [
            op(y, p.x, [a_s], [b_s], [1.0], gates, route_of, adapter_of)
            for y, a_s, b_s in zip(p.y, a, b, strict=True)
        ]
        return torch.autograd.grad(outs, leaves, douts)

    def peft_step() -> list[Tensor]:
        outs = [y + linear(linear(p.x, a_s), b_s) for y, a_s, b_s in zip(p.y, a, b, strict=True)]
        return torch.autograd.grad(outs, leaves, douts)

    def base_step() -> list[Tensor]:
        outs = [linear(p.x, w) for w in p.weights.w]
        return torch.autograd.grad(outs, [p.x], douts)

    for got, want in zip(step(ops.grouped_lora, on), peft_step(), strict=True):
        error = (got - want).abs().max() / want.abs().max()
        if not error <= 2 * ALLOWED[dtype]:
            raise RuntimeError(f"{case.name}: milora's gradients are wrong by {error:.3g}")
    steps = {
        "base": base_step,
        "peft": peft_step,
        "milora": lambda: step(ops.grouped_lora, on),
        "reference": lambda: step(reference.grouped_lora, on),
    }
    steps = {name: Run(steps[name]) for name in steps if name in args.provider}
    steps["top 3"] = Run(lambda: step(ops.grouped_lora, some))
    times = interleaved(steps, args.device, args.repeat or (3 if args.quick else 10), args.seconds)
    for name in steps:
        provider, label = ("milora", " top 3 of 7") if name == "top 3" else (name, "")
        times[provider] = times[name]
        report.time(
            case.name + label, provider, dtype, "time", times, to="peft", unit="us", **case.extra
        )


def main() -> None:
    options = parser(__doc__.splitlines()[0], KINDS)
    options.set_defaults(popularity=None)
    options.add_argument("--provider", nargs="+", choices=list(INFERENCE), default=list(INFERENCE))
    options.add_argument("--rank", type=int, nargs="+")
    options.add_argument("--batch", type=int, nargs="+")
    options.add_argument("--seconds", type=float, default=1.5, help="most time for one case")
    args = options.parse_args()
    args.provider = list(dict.fromkeys(["base", "peft", *args.provider]))  # the yardsticks
    report = Report("grouped_lora", args)
    bandwidth = machine.read_bandwidth(args.device)
    report.add("memory", "base", torch.float32, "read_bandwidth", bandwidth / 1e9, "GB/s")
    for name, case in itertools.product(args.dtype, make_cases(args)):
        if case.kind == "train":
            bench_training(case, DTYPES[name], report, args)
        else:
            bench_inference(case, DTYPES[name], report, args, bandwidth)


if __name__ == "__main__":
    main()
