"""Who adds the update in G1 and G3: ours, what people write in torch, and the engines' kernels.

A provider belongs to one problem; `call(weights)` is one update with one copy of the adapters.
"""

from __future__ import annotations

from collections.abc import Callable

import peers
import torch
from gpu_problem import Problem, Weights
from torch import Tensor
from torch.nn.functional import linear

from milora import ops

Call = Callable[[], object]
# Largest error as a share of the largest update.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class Provider:
    def __init__(self, problem: Problem):
        self.parts = [problem]

    @property
    def problem(self) -> Problem:
        return self.parts[0]

    def call(self, weights: Weights) -> Call:
        raise NotImplementedError

    def base_call(self) -> Call:
        """The modules themselves, into every part's y."""
        jobs = [
            (part.x, w.T, y)
            for part in self.parts
            for w, y in zip(part.weights.w, part.slices(), strict=True)
        ]

        def run() -> None:
            for x, w, y in jobs:
                torch.mm(x, w, out=y)

        return run

    def outputs(self) -> list[Tensor]:
        """y of each part."""
        return [part.y for part in self.parts]


class Base(Provider):
    """The bare modules: cuBLAS."""

    def call(self, weights: Weights) -> Call:
        return lambda: None


class Milora(Provider):
    def arguments(self, weights: Weights) -> tuple:
        p = self.problem
        pool, offsets = weights.pool()
        ranks = torch.tensor(weights.ranks, dtype=torch.int32, device=p.x.device)
        ranks = ranks[:, None].expand(offsets.shape[:2]).contiguous()
        scales = torch.ones(offsets.shape[:2], device=p.x.device)
        return pool, offsets, ranks, scales, p.gates, p.route_of, p.slots

    def call(self, weights: Weights) -> Call:
        arguments, ys, x = self.arguments(weights), self.problem.slices(), self.problem.x
        path, columns = self.path(), list(range(len(ys)))
        return lambda: ops.grouped_lora_(ys, x, *arguments, columns, path)

    def path(self) -> int:
        return ops.DECODE if self.problem.tokens == 1 else ops.PREFILL


class Wgmma(Milora):
    """Ours by the instructions that 9.0 alone has."""

    def path(self) -> int:
        return ops.PREFILL_WGMMA


class Fused(Milora):
    """Base and update in one product; the base's own call is left out."""

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.written: list[Tensor] = []

    def base_call(self) -> Call:
        return lambda: None

    def call(self, weights: Weights) -> Call:
        arguments, x = self.arguments(weights), self.problem.x

        def run() -> None:
            self.written = [
                ops.fused_lora(x, w, None, *arguments, s) for s, w in enumerate(weights.w)
            ]

        return run

    def outputs(self) -> list[Tensor]:
        return [torch.cat(self.written, dim=1)]


class Stacked(Provider):
    """Each request's A and B side by side, gathered before the clock runs: two batched products."""

    def call(self, weights: Weights) -> Call:
        p = self.problem
        slots = p.slots.long()
        x = p.x.view(len(slots), p.tokens, -1)
        off = not bool(p.gates.all())
        jobs = [
            (y.view(len(slots), p.tokens, -1), a[slots].mT, b[slots].mT.contiguous(), gate)
            for y, a, b, gate in zip(
                p.slices(), weights.a, weights.b, p.gates.to(x.dtype).T[..., None, None],
                strict=True,
            )
        ]  # fmt: skip

        def run() -> None:
            for y, a, bt, gate in jobs:
                hidden = torch.bmm(x, a)
                y.baddbmm_(hidden.mul_(gate) if off else hidden, bt)

        return run


class Peft(Provider):
    """One adapter after another over its own rows, as PEFT's mixed batches do."""

    def call(self, weights: Weights) -> Call:
        p = self.problem
        jobs = [
            (y, a[adapter, :rank], b[adapter, :, :rank], rows)
            for s, (y, a, b) in enumerate(zip(p.slices(), weights.a, weights.b, strict=True))
            for adapter, rows in p.rows_of(s).items()
            for rank in [weights.ranks[adapter]]
        ]

        def run() -> None:
            for y, a, b, rows in jobs:
                y.index_add_(0, rows, linear(linear(p.x[rows], a), b))

        return run


class Engine(Provider):
    """An engine's kernels. It cannot route: with gates, each module is a call of its own, in which
    the requests that switch it off have no adapter."""

    def __init__(self, name: str, problem: Problem):
        super().__init__(problem)
        self.whole = bool(problem.gates.all())
        if not self.whole:
            self.parts = [problem.alone(s) for s in range(len(problem.widths))]
        make = peers.load(name)
        decode = problem.tokens == 1
        self.peers: dict[int, peers.Peer] = {}  # of the parts that any request switches on
        for i, p in enumerate(self.parts):
            if p.rows_of(0):
                adapter_of = p.slots.repeat_interleave(p.tokens)
                self.peers[i] = make(adapter_of, p.weights.ranks, decode=decode)
        self.prepare()

    def prepare(self) -> None:
        for peer in self.peers.values():
            peer.prepare()

    def call(self, weights: Weights) -> Call:
        each = [weights] if self.whole else [weights.alone(s) for s in range(len(self.parts))]
        jobs = [
            (peer, self.parts[i].y, self.parts[i].x, peer.pack(each[i].a, each[i].b))
            for i, peer in self.peers.items()
        ]

        def run() -> None:
            for peer, y, x, packed in jobs:
                peer.update(y, x, packed)

        return run


OURS = {
    "base": Base, "milora": Milora, "wgmma": Wgmma, "fused": Fused, "stacked": Stacked,
    "peft": Peft,
}  # fmt: skip
PROVIDERS = (*OURS, *peers.PEERS)
RIVALS = ("stacked", "peft", *peers.PEERS)


def make(name: str, problem: Problem) -> Provider:
    """Raises: peers.PeerAbsent, if an engine's kernels cannot run here."""
    return OURS[name](problem) if name in OURS else Engine(name, problem)


def check(name: str, provider: Provider, call: Call, *, base: bool) -> None:
    """Run call() and compare what it makes of y with float32 torch.

    y is drawn anew before: earlier providers' calls have made it so large that an update is lost in
    its rounding.

    Args:
        base: whether the call writes the modules' outputs too, instead of adding to y.
    Raises: RuntimeError, since a bench that times wrong results is worthless.
    """
    bare = isinstance(provider, Base)
    for part in provider.parts:
        part.refill()
    updates = [part.update() for part in provider.parts]
    starts = [
        part.base() if base else part.y.to(torch.float32, copy=True) for part in provider.parts
    ]
    call()
    for got, start, update in zip(provider.outputs(), starts, updates, strict=True):
        want = start if bare else start + update
        scale = update if update.any() and not bare else start
        error = (got.float() - want).abs().max() / scale.abs().max()
        if not error <= ALLOWED[got.dtype]:
            raise RuntimeError(f"{name} is wrong by {error:.3g} of the largest update")
