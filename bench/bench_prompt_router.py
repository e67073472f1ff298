"""prompt_router beside the same maths in plain torch and beside one read of the hidden states.

Kinds: forward (parameters as tensors), pool (parameters of many tenants in the adapter pool) and
backward (forward and all gradients). Providers: milora; reference, plain torch one prompt after
another; stacked, plain torch over all prompts at once (equal lengths, one kind of router); base, a
sum over the hidden states, which reads them once and is the yardstick of the ratios.

    python bench/bench_prompt_router.py --quick --json results.jsonl
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

from milora import ops, rational, reference

KINDS = ("forward", "pool", "backward")
ARGUMENTS = ("h", "spans", "router_of", "w_sa", "w_r", "coef", "codes")
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # largest error of a probability
TOP_K = 3


@dataclass(frozen=True)
class Case:
    kind: str
    batch: int = 8
    tokens: int = 128
    d: int = 1024
    pooler: str = "self_attention"
    popularity: str = "distinct"
    num_experts: int = 7

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch}x{self.tokens} d{self.d} {self.pooler} {self.popularity}"


def make_cases(args: argparse.Namespace) -> list[Case]:
    """Sweeps around one point, or all combinations of what the command line names."""
    cases = []
    for kind in args.case:
        if args.batch or args.popularity:
            axes = args.batch or [8], args.popularity or ["distinct"]
            cases += [Case(kind, batch=b, popularity=mix) for b, mix in itertools.product(*axes)]
            continue
        point = Case(kind)
        cases.append(point)
        if args.quick:
            continue
        cases.append(Case(kind, batch=1, tokens=4096, d=4096))
        if kind == "forward":
            cases += [replace(point, pooler=pooler) for pooler in ops.POOLERS[1:3]]
        if kind == "pool":
            cases += [replace(point, batch=batch) for batch in (1, 2, 4, 16, 32, 64)]
            cases += [replace(point, batch=16, popularity=mix) for mix in POPULARITIES[1:]]
    return cases


class Problem:
    """Arguments of the ops, the same for every provider; as many routers as prompts."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str):
        self.draw = torch.Generator().manual_seed(0)
        n, d = case.batch, case.d
        starts = torch.arange(n, dtype=torch.int32) * case.tokens
        code = [ops.POOLERS.index(case.pooler), 0, 0, 0, TOP_K, case.num_experts]
        coef = torch.tensor(rational.fit(), dtype=torch.float32)
        tensors = {
            "h": self.random(n * case.tokens, d).to(dtype),
            "spans": torch.stack([starts, starts + case.tokens], dim=1),
            "router_of": torch.tensor(popularity(case.popularity, n, n), dtype=torch.int32),
            "w_sa": self.random(n, d) * d**-0.5,
            "w_r": self.random(n, case.num_experts, d) * d**-0.5,
            "coef": coef.repeat(n, 1),
            "codes": torch.tensor([code] * n, dtype=torch.int32),
        }
        routers = [{k: tensors[k][i] for k in ("w_sa", "w_r", "coef")} for i in range(n)]
        tensors["pool"], tensors["offsets"] = reference.pack_routers(routers)
        self.case = case
        self.t = {name: tensor.to(device) for name, tensor in tensors.items()}
        # Hidden states in turn, so many that none is still in a cache: those of other layers.
        h = self.t["h"]
        number = min(64, 1 + 2 * machine.cache_bytes(device) // h.nbytes)
        self.turns = itertools.cycle([h, *(h.clone() for _ in range(number - 1))])

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw)

    def tensors(self) -> list[Tensor]:
        """Arguments of `ops.prompt_router`, with the next hidden states."""
        self.t["h"] = next(self.turns)
        return [self.t[name] for name in ARGUMENTS]


def stacked(
    h: Tensor,
    spans: Tensor,
    router_of: Tensor,
    w_sa: Tensor,
    w_r: Tensor,
    coef: Tensor,
    codes: Tensor,
) -> tuple[Tensor, Tensor]:
    """All prompts in one batch: what equal lengths and one kind of router allow."""
    router_of = router_of.long()
    x = h.view(len(router_of), -1, h.shape[1]).float()
    pooler = int(codes[0, 0])
    if pooler == 0:
        scores = torch.bmm(x, w_sa[router_of][:, :, None])
        pooled = torch.bmm(torch.softmax(scores, 1).transpose(1, 2), x)[:, 0]
    else:
        pooled = x.mean(1) if pooler == 1 else x.amax(1)
    activated = rational.evaluate(coef[0], pooled)
    probs = torch.softmax(torch.einsum("bd,bnd->bn", activated, w_r[router_of]), dim=1)
    kept = torch.zeros_like(probs).scatter(1, probs.topk(TOP_K, dim=1).indices, 1.0)
    return probs, probs * kept


def make_runs(p: Problem) -> dict[str, Callable[[], object]]:
    case = p.case

    def read() -> Tensor:
        return p.tensors()[0].view(torch.float32).sum()  # bytes count, values do not

    def in_pool(op: Callable) -> object:
        h, spans, router_of, *_ = p.tensors()
        t = p.t
        return op(h, spans, router_of, t["pool"], t["offsets"], t["codes"], case.num_experts)

    ours = {"milora": ops.prompt_router, "reference": reference.prompt_router, "stacked": stacked}
    if case.kind == "forward":
        runs = {name: lambda op=op: op(*p.tensors()) for name, op in ours.items()}
    elif case.kind == "pool":
        runs = {
            "milora": lambda: in_pool(ops.prompt_router_pool),
            "reference": lambda: reference.prompt_router(*p.tensors()),
            "stacked": lambda: stacked(*p.tensors()),
        }
    else:
        for name in ("w_sa", "w_r", "coef"):
            p.t[name].requires_grad_()
        dgates = p.random(case.batch, case.num_experts).to(p.t["h"].device)

        def step(op: Callable) -> tuple[Tensor, ...]:
            arguments = p.tensors()
            leaves = [arguments[0].requires_grad_(), *(p.t[n] for n in ("w_sa", "w_r", "coef"))]
            return torch.autograd.grad(op(*arguments)[1], leaves, dgates)

        runs = {name: lambda op=op: step(op) for name, op in ours.items()}
    return {"base": read, **runs}


def check(p: Problem, runs: dict[str, Callable], dtype: torch.dtype) -> None:
    """Probabilities (backward: gradients, by their size) as plain torch's."""
    want = runs["reference"]()[0].float()
    for name, run in runs.items():
        if name == "base":
            continue
        error = (run()[0].float() - want).abs().max() / want.abs().max()
        if not error <= ALLOWED[dtype]:
            raise RuntimeError(f"{p.case.name}: {name} is wrong by {error:.3g}")


def bench(case: Case, dtype: torch.dtype, report: Report, args, bandwidth: float) -> None:
    p = Problem(case, dtype, args.device)
    runs = make_runs(p)
    with torch.set_grad_enabled(case.kind == "backward"):
        check(p, runs, dtype)
        wanted = {name: Run(run) for name, run in runs.items() if name in args.provider}
        times = interleaved(wanted, args.device, args.repeat or (20 if args.quick else 100), 1.5)
    nbytes = p.t["h"].nbytes * (2 if case.kind == "backward" else 1)
    floor = nbytes / bandwidth / times["base"].best
    extra = {
        "batch": case.batch,
        "popularity": case.popularity,
        "shape": f"{case.tokens} tokens, d {case.d}, {case.pooler}",
        "bytes": nbytes,
    }
    for name in wanted:
        report.time(
            case.name, name, dtype, "time", times, unit="us",
            floor=None if name == "base" else floor, **extra,
        )  # fmt: skip
    if "milora" in times:
        read = nbytes / times["milora"].best / 1e9
        report.add(case.name, "milora", dtype, "bandwidth", read, "GB/s", **extra)


def main() -> None:
    options = parser(__doc__.splitlines()[0], KINDS)
    options.set_defaults(popularity=None)
    providers = ["base", "milora", "reference", "stacked"]
    options.add_argument("--provider", nargs="+", choices=providers, default=providers)
    options.add_argument("--batch", type=int, nargs="+", help="prompts")
    args = options.parse_args()
    args.provider = list(dict.fromkeys(["base", *args.provider]))
    report = Report("prompt_router", args)
    bandwidth = machine.read_bandwidth(args.device)
    report.add("memory", "base", torch.float32, "read_bandwidth", bandwidth / 1e9, "GB/s")
    for name, case in itertools.product(args.dtype, make_cases(args)):
        bench(case, DTYPES[name], report, args, bandwidth)


if __name__ == "__main__":
    main()
