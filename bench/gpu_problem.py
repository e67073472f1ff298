"""Modules that read the same x, rows of many tenants, and the update of each row: for G1 and G3.

Everything is drawn on the device, by generators of its own: after a CUDA graph whose capture has
failed, torch's default one refuses. `Problem.update` is plain float32 torch, which no provider is
made of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of rows in the pool


def generator(device: str | torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@dataclass
class Weights:
    """Of S modules: w [d_out, d_in], a [adapters, rank, d_in], b [adapters, d_out, rank].

    The tensors have the highest rank; an adapter of a lower one has zeros beyond it.
    """

    w: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    ranks: list[int]  # of each adapter

    def copy(self) -> Weights:
        """The adapters again, elsewhere in memory; the base's weights are shared."""
        a, b = ([t.clone() for t in tensors] for tensors in (self.a, self.b))
        return Weights(self.w, a, b, self.ranks)

    def adapter_bytes(self) -> int:
        """Of a copy."""
        return sum(t.nbytes for t in (*self.a, *self.b))

    def alone(self, s: int) -> Weights:
        return Weights([self.w[s]], [self.a[s]], [self.b[s]], self.ranks)

    def pool(self) -> tuple[Tensor, Tensor]:
        """As `grouped_lora_` reads them: all A, Bt one after another; offsets [adapters, S, 5]."""
        pieces, offsets, first = [], [], 0
        for a, b in zip(self.a, self.b, strict=True):
            row_bytes = [d * a.element_size() for d in (a.shape[2], b.shape[1])]
            if any(size % ALIGNMENT for size in row_bytes):
                raise ValueError(f"rows of {row_bytes} bytes are no multiples of {ALIGNMENT}")
            column = []
            for adapter, rank in enumerate(self.ranks):
                pieces += [a[adapter, :rank].flatten(), b[adapter, :, :rank].mT.flatten()]
                column.append([first, first + rank * row_bytes[0], *[-1] * 3])
                first += rank * sum(row_bytes)
            offsets.append(column)
        table = torch.tensor(offsets, device=self.a[0].device).transpose(0, 1).contiguous()
        return torch.cat(pieces).view(torch.uint8), table


class Problem:
    """A batch: x [num_tokens, d_in], y [num_tokens, sum of d_out], adapters and gates per request.

    Args:
        adapter_of: adapter of each request; -1 = none.
        tokens: of each request, all of one length.
        gates: [requests, S] float32.
    """

    def __init__(
        self, x: Tensor, weights: Weights, adapter_of: list[int], tokens: int, gates: Tensor
    ):
        self.x, self.weights, self.adapter_of, self.tokens = x, weights, adapter_of, tokens
        self.gates = gates
        self.widths = [w.shape[0] for w in weights.w]
        self.draw = generator(x.device, seed=1)
        self.y = torch.empty(len(x), sum(self.widths), dtype=x.dtype, device=x.device)
        self.refill()
        rows = torch.arange(len(adapter_of), dtype=torch.int32, device=x.device)
        self.route_of = rows.repeat_interleave(tokens)
        self.slots = torch.tensor(adapter_of, dtype=torch.int32, device=x.device)

    @classmethod
    def random(
        cls,
        d_in: int,
        d_out: tuple[int, ...],
        adapter_of: list[int],
        ranks: list[int],
        dtype: torch.dtype,
        device: str,
        tokens: int = 1,
        gates: Tensor | None = None,
    ) -> Problem:
        source = generator(device, seed=0)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(*shape, device=device, generator=source)
            return (values * shape[-1] ** -0.5).to(dtype)

        weights = Weights(
            [draw(n, d_in) for n in d_out],
            [draw(len(ranks), max(ranks), d_in) for _ in d_out],
            [draw(len(ranks), n, max(ranks)) for n in d_out],
            ranks,
        )
        for adapter, rank in enumerate(ranks):
            for a, b in zip(weights.a, weights.b, strict=True):
                a[adapter, rank:] = 0
                b[adapter, :, rank:] = 0
        x = torch.randn(len(adapter_of) * tokens, d_in, device=device, generator=source).to(dtype)
        on = torch.ones(len(adapter_of), len(d_out), device=device) if gates is None else gates
        return cls(x, weights, adapter_of, tokens, on)

    def refill(self) -> None:
        """Draw y anew: each timed call has added to it."""
        self.y.normal_(generator=self.draw)

    def slices(self) -> list[Tensor]:
        """y of each module: views."""
        return list(self.y.split(self.widths, dim=1))

    def rows_of(self, s: int) -> dict[int, Tensor]:
        """Adapter -> its rows of x with module s switched on."""
        found: dict[int, list[int]] = {}
        on = self.gates[:, s].tolist()
        for request, adapter in enumerate(self.adapter_of):
            if adapter >= 0 and on[request]:
                first = request * self.tokens
                found.setdefault(adapter, []).extend(range(first, first + self.tokens))
        return {a: torch.tensor(rows, device=self.x.device) for a, rows in found.items()}

    def active_bytes(self) -> int:
        """What an update must read of the adapters."""
        d_in, size, total = self.x.shape[1], self.x.element_size(), 0
        for s, width in enumerate(self.widths):
            total += (d_in + width) * size * sum(self.weights.ranks[a] for a in self.rows_of(s))
        return total

    def active_flops(self) -> int:
        d_in, total = self.x.shape[1], 0
        for s, width in enumerate(self.widths):
            each = (len(rows) * self.weights.ranks[a] for a, rows in self.rows_of(s).items())
            total += 2 * (d_in + width) * sum(each)
        return total

    def alone(self, s: int) -> Problem:
        """Module s as a problem of its own; requests that switch it off have no adapter there.

        How an engine without routing can be made to serve routed tenants.
        """
        gates = self.gates[:, s].tolist()
        adapters = [a if gates[i] else -1 for i, a in enumerate(self.adapter_of)]
        on = torch.ones_like(self.gates[:, :1])
        return Problem(self.x, self.weights.alone(s), adapters, self.tokens, on)

    def base(self) -> Tensor:
        """The modules' own outputs in float32, [num_tokens, sum of d_out]."""
        return torch.cat([self.x.float() @ w.float().T for w in self.weights.w], dim=1)

    def update(self) -> Tensor:
        """What is added to them, in float32."""
        x, updates = self.x.float(), []
        for s, width in enumerate(self.widths):
            update = torch.zeros(len(x), width, device=x.device)
            for adapter, rows in self.rows_of(s).items():
                a, b = self.weights.a[s][adapter].float(), self.weights.b[s][adapter].float()
                gate = self.gates[rows // self.tokens, s, None]
                update[rows] = gate * (x[rows] @ a.T @ b.T)
            updates.append(update)
        return torch.cat(updates, dim=1)
