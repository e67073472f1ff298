"""Updates whose tokens gate single ranks (`milora.experts.RankGated`): inference and training.

Inference computes the gates of a call's rank-gated adapters and hands them to the op; batches that
name no such adapter never come here. Training composes the update in plain torch, one adapter after
another: that costs more than the grouped op, and serves any mixture of adapters, the gradients of
routers and activation checkpointing alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from milora.experts import RankGated, get_kind

if TYPE_CHECKING:
    from milora.nn import MiLoRALinear
    from milora.routing import Call


def is_rank_gated(linear: MiLoRALinear, name: str) -> bool:
    return isinstance(get_kind(linear.kinds[name]), RankGated)


class RankGates:
    """Makes `rank_gates` of `ops.grouped_lora_` for modules that read one x.

    Args:
        linears: the slices of the op call.
        num_tokens: rows of x.
    """

    def __init__(self, call: Call, linears: list[MiLoRALinear], num_tokens: int):
        self.num_slices = len(linears)
        self.width = 0
        self.parts: list[tuple[int, MiLoRALinear, str, Tensor | None]] = []
        of_token = _adapter_of_tokens(call, num_tokens)
        for s, linear in enumerate(linears):
            for index, name in enumerate(call.adapters):
                if (spec := linear.specs.get(name)) is None:
                    continue
                self.width = max(self.width, get_kind(linear.kinds[name]).served_rank(spec))
                if is_rank_gated(linear, name):
                    # Rows of the bare model need no mask: the op leaves them alone.
                    mask = None
                    if len(call.adapters) > 1:
                        mask = (of_token == index).to(linear.device)[:, None]
                    self.parts.append((s, linear, name, mask))

    @classmethod
    def needed(cls, call: Call, linears: list[MiLoRALinear], num_tokens: int) -> RankGates | None:
        """None where no adapter of the call gates ranks in these modules. A pool's never do."""
        gated = not call.pooled and any(
            is_rank_gated(linear, name)
            for linear in linears
            for name in call.adapters
            if name in linear.specs
        )
        return cls(call, linears, num_tokens) if gated else None

    def of(self, x: Tensor) -> Tensor:
        """[num_tokens, num_slices, width] float32; 1 for the ranks of other kinds' rows.

        Every rank-gated adapter reads all rows, so that sizes do not depend on who stands where.
        """
        x = x.reshape(-1, x.shape[-1])
        out = torch.ones(x.shape[0], self.num_slices, self.width, device=x.device)
        for s, linear, name, mask in self.parts:
            gates = _gates(linear, name, x, linear.values(name))
            part = out[:, s, : gates.shape[1]]
            part.copy_(gates if mask is None else torch.where(mask, gates, part))
        return out


def add_gated_update(call: Call, linear: MiLoRALinear, name: str, y: Tensor, x: Tensor) -> Tensor:
    """y plus one rank-gated adapter's update of its rows, differentiable.

    y[t] + g · scale · B (r(x_t) ⊙ A x_t), of the tokens of this adapter whose gate g is not 0.

    Args:
        y: [num_tokens, d_out].  x: [num_tokens, d_in], dtype of y, after dropout: r sees it too.
    """
    kind = get_kind(linear.kinds[name])
    place = linear.block, linear.column, name
    is_first = linear.training and place not in call.drawn  # and no recomputation
    values = linear.values(name, call)
    weights = kind.materialise(values, {}, linear.specs[name])
    gates = call.state.block_gates[linear.block][:, linear.column].to(y.device)
    route_of = call.route_of(y.shape[0]).to(y.device).clamp(min=0).long()
    gate_of = gates[route_of]
    is_here = _adapter_of_tokens(call, y.shape[0]).to(y.device) == call.adapters.index(name)
    rows = (is_here & (gate_of != 0)).nonzero()[:, 0]
    x = x[rows]
    ranks = _gates(linear, name, x, values)
    if is_first:
        kind.rebalance(linear.tensors(name), ranks, linear.specs[name])
    hidden = ranks.to(y.dtype) * (x @ weights.a.to(y.dtype).T)
    update = weights.scale * (hidden @ weights.b.to(y.dtype).T)
    return y.index_add(0, rows, gate_of[rows, None].to(y.dtype) * update)


def _gates(linear: MiLoRALinear, name: str, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    return get_kind(linear.kinds[name]).rank_gates(x, values, linear.specs[name])


def _adapter_of_tokens(call: Call, num_tokens: int) -> Tensor:
    """[num_tokens] int32: index of each token's adapter in `call.adapters`; -1 for none."""
    route_of = call.route_of(num_tokens)
    adapter = call.adapter_of[route_of.clamp(min=0).long()]
    return torch.where(route_of >= 0, adapter, torch.full_like(adapter, -1))
