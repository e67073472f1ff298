"""Every op of `milora.ops` in plain torch: same signatures, any float dtype, differentiable.

Written to be read and to be right: tests run it in float64 as the measure of the kernels. Results
have the dtype of the inputs, and nothing is accumulated in a wider one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from milora import rational
from milora.tables import EXPERT_PARTS

RMS_EPSILON = 1e-6


def pool_row_stride(d: int, dtype: torch.dtype) -> int:
    """Elements between rows of a matrix [rank, d] in the pool: rows start on 16 bytes."""
    itemsize = dtype.itemsize
    return -(-d * itemsize // 16) * 16 // itemsize


def read_pool(pool: Tensor, offset: int, rank: int, d: int, dtype: torch.dtype) -> Tensor:
    """The matrix [rank, d] of `dtype` that starts `offset` bytes into the pool."""
    stride = pool_row_stride(d, dtype)
    size = rank * stride * dtype.itemsize
    return pool[offset : offset + size].view(dtype).view(rank, stride)[:, :d]


def _pool_rows(matrix: Tensor, fill: int) -> Tensor:
    """The bytes of a matrix, or of a vector as one row, as the pool holds them."""
    matrix = matrix if matrix.dim() == 2 else matrix[None]
    rows, d = matrix.shape
    itemsize = matrix.dtype.itemsize
    padded = torch.full(
        (rows, pool_row_stride(d, matrix.dtype) * itemsize), fill, dtype=torch.uint8
    )
    padded[:, : d * itemsize] = matrix.contiguous().view(torch.uint8)
    return padded.flatten()


def pack_pool(
    adapters: Sequence[Sequence[dict[str, Tensor] | None]], fill: int = 0xFF
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay experts out as `milora.ops.grouped_lora_` reads them.

    Args:
        adapters: [num_adapters][num_experts] of None (no expert) or a dict with `a` [rank, d_in],
            `bt` [rank, d_out] and, for an output vector, `u` and `v` [d_out] float32; a `core`
            [rank, rank] too, if there is one.
        fill: byte of the padding; 0xFF makes it NaN in every dtype.
    Returns: pool uint8, offsets int64 [num_adapters, num_experts, 5], ranks int32
        [num_adapters, num_experts].
    """
    num_experts = len(adapters[0]) if adapters else 0
    offsets = torch.full((len(adapters), num_experts, len(EXPERT_PARTS)), -1, dtype=torch.int64)
    ranks = torch.zeros(len(adapters), num_experts, dtype=torch.int32)
    blocks, size = [], 0
    for i, experts in enumerate(adapters):
        for e, expert in enumerate(experts):
            if expert is None:
                continue
            ranks[i, e] = expert["a"].shape[0]
            for column, name in enumerate(EXPERT_PARTS):
                if name not in expert:
                    continue
                offsets[i, e, column] = size
                blocks.append(_pool_rows(expert[name], fill))
                size += blocks[-1].numel()
    pool = torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.uint8)
    return pool, offsets, ranks


def grouped_lora_(
    y: list[Tensor],
    x: Tensor,
    pool: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    scales: Tensor,
    gates: Tensor,
    route_of: Tensor,
    adapter_of: Tensor,
    experts: Sequence[int],
    path: int = 0,
    rank_gates: Tensor | None = None,
    pool_dtype: torch.dtype | None = None,
) -> None:
    """As `milora.ops.grouped_lora_`, whatever the path.

    `pool_dtype` is the dtype of A and Bᵀ in the pool if it is not that of x: a float64 reference of
    a bfloat16 op reads the same pool.
    """
    pool_dtype = pool_dtype or x.dtype
    d_in = x.shape[-1]
    x = x.view(-1, d_in)
    for s, (y_s, expert) in enumerate(zip(y, experts, strict=True)):
        d_out = y_s.shape[-1]
        rows = y_s.view(-1, d_out)
        for t in range(x.shape[0]):
            route = int(route_of[t])
            adapter = int(adapter_of[route]) if route >= 0 else -1
            if adapter < 0 or gates[route, expert] == 0 or ranks[adapter, expert] == 0:
                continue
            rank = int(ranks[adapter, expert])
            at_a, at_b, at_u, at_v, at_core = offsets[adapter, expert].tolist()
            a = read_pool(pool, at_a, rank, d_in, pool_dtype).to(x.dtype)
            bt = read_pool(pool, at_b, rank, d_out, pool_dtype).to(x.dtype)
            hidden = a @ x[t]
            if rank_gates is not None:
                hidden = hidden * rank_gates[t, s, :rank].to(x.dtype)
            if at_core >= 0:
                hidden = read_pool(pool, at_core, rank, rank, pool_dtype).to(x.dtype) @ hidden
            delta = scales[adapter, expert].to(x.dtype) * (hidden @ bt)
            if at_u >= 0:
                u = read_pool(pool, at_u, 1, d_out, torch.float32)[0].to(x.dtype)
                delta = delta + u * rows[t]
            if at_v >= 0:
                delta = delta + read_pool(pool, at_v, 1, d_out, torch.float32)[0].to(x.dtype)
            rows[t] += gates[route, expert].to(x.dtype) * delta


def fused_lora(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    pool: Tensor,
    offsets: Tensor,
    ranks: Tensor,
    scales: Tensor,
    gates: Tensor,
    route_of: Tensor,
    adapter_of: Tensor,
    expert: int,
    pool_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `milora.ops.fused_lora`; `pool_dtype` as in `grouped_lora_`."""
    y = torch.nn.functional.linear(x, w, bias)
    tables = (pool, offsets, ranks, scales, gates, route_of, adapter_of)
    grouped_lora_([y], x, *tables, [expert], pool_dtype=pool_dtype)
    return y


def grouped_lora(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    gates: Tensor,
    route_of: Tensor,
    adapter_of: Tensor,
) -> Tensor:
    """As `milora.ops.grouped_lora`."""
    out = y
    adapter_of_token = torch.where(
        route_of >= 0, adapter_of[route_of.clamp(min=0).long()], -torch.ones_like(route_of)
    )
    for i, (a_i, b_i, scale) in enumerate(zip(a, b, scales, strict=True)):
        tokens = (adapter_of_token == i).nonzero()[:, 0]
        gate = gates[route_of[tokens].long()]
        active = (gate != 0).detach()
        tokens, gate = tokens[active], gate[active]
        delta = scale * ((x[tokens] @ a_i.T) @ b_i.T)
        out = out.index_add(0, tokens, gate[:, None].to(delta.dtype) * delta)
    return out


def pack_routers(routers: Sequence[dict[str, Tensor]], fill: int = 0xFF) -> tuple[Tensor, Tensor]:
    """Lay routers out as `milora.ops.prompt_router_pool` reads them.

    Args:
        routers: dicts with some of `w_sa` [d], `w_r` [num_experts, d] and `coef` [12], float32.
        fill: byte of the padding; 0xFF makes it NaN.
    Returns: pool uint8, offsets int64 [num_routers, 3].
    """
    offsets = torch.full((len(routers), 3), -1, dtype=torch.int64)
    blocks, size = [], 0
    for i, router in enumerate(routers):
        for column, name in enumerate(("w_sa", "w_r", "coef")):
            if name not in router:
                continue
            offsets[i, column] = size
            blocks.append(_pool_rows(router[name], fill))
            size += blocks[-1].numel()
    pool = torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.uint8)
    return pool, offsets


def pool_prompt(h: Tensor, w_sa: Tensor, pooler: int) -> Tensor:
    """One prompt's tokens [n, d] -> [d]; codes as `milora.ops.POOLERS`.            [eq. 2, 8]"""
    if h.shape[0] == 0:
        return (h.sum(0) + w_sa * 0).to(w_sa.dtype)
    if pooler == 0:
        return torch.softmax(h @ w_sa, dim=0) @ h
    if pooler == 1:
        return h.mean(0)
    if pooler == 2:
        return h.max(0).values
    return h[-1]


def prompt_router(
    h: Tensor,
    spans: Tensor,
    router_of: Tensor,
    w_sa: Tensor,
    w_r: Tensor,
    coef: Tensor,
    codes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `milora.ops.prompt_router`; computes in the dtype of w_sa."""
    num_experts_max, d = w_r.shape[1:]
    probs, gates, pooled = [], [], []
    for prompt, router in enumerate(router_of.tolist()):
        if router < 0:
            probs.append(w_r.new_zeros(num_experts_max))
            gates.append(w_r.new_zeros(num_experts_max))
            pooled.append(w_r.new_zeros(d))
            continue
        pooler, activation, norm, gate_kind, top_k, num_experts = codes[router].tolist()
        begin, end = spans[prompt].tolist()
        vector = pool_prompt(h[begin:end].to(w_sa.dtype), w_sa[router], pooler)
        x = vector
        if norm == 1:
            x = x * torch.rsqrt(x.square().mean() + RMS_EPSILON)
        if activation == 0:
            x = rational.evaluate(coef[router], x)
        else:
            x = torch.nn.functional.gelu(x) if activation == 1 else torch.relu(x)
        p = torch.softmax(w_r[router, :num_experts] @ x, dim=0)

        # Stable descending sort: among equals the lower index comes first.
        kept = torch.zeros_like(p)
        kept[p.detach().sort(descending=True, stable=True).indices[:top_k]] = 1
        gate = p * kept
        if gate_kind == 1:
            gate = gate / gate.sum()
        elif gate_kind == 2:
            gate = kept + gate - gate.detach()
        padding = (0, num_experts_max - num_experts)
        probs.append(torch.nn.functional.pad(p, padding))
        gates.append(torch.nn.functional.pad(gate, padding))
        pooled.append(vector)
    if not probs:
        empty = w_r.new_zeros(0, num_experts_max)
        return empty, empty.clone(), w_r.new_zeros(0, d)
    return torch.stack(probs), torch.stack(gates), torch.stack(pooled)


def prompt_router_pool(
    h: Tensor,
    spans: Tensor,
    router_of: Tensor,
    pool: Tensor,
    offsets: Tensor,
    codes: Tensor,
    num_experts: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `milora.ops.prompt_router_pool`; computes in `dtype`."""
    num_routers, d = codes.shape[0], h.shape[1]
    w_sa = torch.zeros(num_routers, d, dtype=dtype)
    w_r = torch.zeros(num_routers, num_experts, d, dtype=dtype)
    coef = torch.zeros(num_routers, 12, dtype=dtype)
    for router in {router for router in router_of.tolist() if router >= 0}:
        pooler, activation, *_, n = codes[router].tolist()
        at_sa, at_r, at_coef = offsets[router].tolist()
        w_r[router, :n] = read_pool(pool, at_r, n, d, torch.float32)
        if pooler == 0:
            w_sa[router] = read_pool(pool, at_sa, 1, d, torch.float32)[0]
        if activation == 0:
            coef[router] = read_pool(pool, at_coef, 1, 12, torch.float32)[0]
    return prompt_router(h, spans, router_of, w_sa, w_r, coef, codes)
