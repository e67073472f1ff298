"""Modules that read the same x, rows of many tenants, and the update of each row: for G1 and G3.

Everything is drawn on the device. `Problem.update` is plain float32 torch, which no provider is
made of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of rows in the pool


@dataclass
class Weights:
    """Of S modules: w [d_out, d_in], a [adapters, rank, d_in], b [adapters, d_out, rank]."""

    w: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]

    def copy(self) -> Weights:
        """The adapters again, elsewhere in memory; the base's weights are shared."""
        return Weights(self.w, [t.clone() for t in self.a], [t.clone() for t in self.b])

    def alone(self, s: int) -> Weights:
        return Weights([self.w[s]], [self.a[s]], [self.b[s]])

    def pool(self) -> tuple[Tensor, Tensor]:
        """As `grouped_lora_` reads them: all A, Bt one after another; offsets [adapters, S, 4]."""
        pieces, columns, first = [], [], 0
        for a, b in zip(self.a, self.b, strict=True):
            row_bytes = [d * a.element_size() for d in (a.shape[2], b.shape[1])]
            if any(size % ALIGNMENT for size in row_bytes):
                raise ValueError(f"rows of {row_bytes} bytes are no multiples of {ALIGNMENT}")
            both = torch.cat([a.flatten(1), b.mT.flatten(1)], dim=1).view(torch.uint8)
            starts = first + torch.arange(len(a), device=a.device) * both.shape[1]
            absent = torch.full_like(starts, -1)
            columns.append(torch.stack([starts, starts + a[0].nbytes, absent, absent], dim=1))
            pieces.append(both.flatten())
            first += both.numel()
        return torch.cat(pieces), torch.stack(columns, dim=1).contiguous()


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
        self.y = torch.randn(len(x), sum(self.widths), device=x.device).to(x.dtype)
        rows = torch.arange(len(adapter_of), dtype=torch.int32, device=x.device)
        self.route_of = rows.repeat_interleave(tokens)
        self.slots = torch.tensor(adapter_of, dtype=torch.int32, device=x.device)

    @classmethod
    def random(
        cls,
        d_in: int,
        d_out: tuple[int, ...],
        adapter_of: list[int],
        num_adapters: int,
        rank: int,
        dtype: torch.dtype,
        device: str,
        tokens: int = 1,
        gates: Tensor | None = None,
    ) -> Problem:
        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, device=device) * shape[-1] ** -0.5).to(dtype)

        weights = Weights(
            [draw(n, d_in) for n in d_out],
            [draw(num_adapters, rank, d_in) for _ in d_out],
            [draw(num_adapters, n, rank) for n in d_out],
        )
        x = torch.randn(len(adapter_of) * tokens, d_in, device=device).to(dtype)
        on = torch.ones(len(adapter_of), len(d_out), device=device) if gates is None else gates
        return cls(x, weights, adapter_of, tokens, on)

    @property
    def rank(self) -> int:
        return self.weights.a[0].shape[1]

    @property
    def num_adapters(self) -> int:
        return self.weights.a[0].shape[0]

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
        return sum(
            len(self.rows_of(s)) * (a[0].nbytes + b[0].nbytes)
            for s, (a, b) in enumerate(zip(self.weights.a, self.weights.b, strict=True))
        )

    def active_flops(self) -> int:
        d_in, total = self.x.shape[1], 0
        for s, width in enumerate(self.widths):
            rows = sum(len(rows) for rows in self.rows_of(s).values())
            total += 2 * rows * self.rank * (d_in + width)
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
