"""The ops of milora, typed and documented. Plain-torch versions: `milora.reference`.

Each op runs on the CPU (x86-64 with run-time instruction sets, any other CPU with the baseline) and
on CUDA where the library was built for it, is deterministic, and is batch-invariant bitwise: what a
row or prompt gets does not depend on the rows and prompts beside it, nor on the number of threads.
This module knows torch and nothing of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from milora._build import load_library

load_library()

# Held once: attribute look-ups on torch.ops cost as much as a small op.
_grouped_lora_ = torch.ops.milora.grouped_lora_.default
_fused_lora = torch.ops.milora.fused_lora.default
_grouped_lora = torch.ops.milora.grouped_lora.default
_grouped_lora_add_ = torch.ops.milora.grouped_lora_add_.default
_grouped_lora_backward_ = torch.ops.milora.grouped_lora_backward_.default
_prompt_router = torch.ops.milora.prompt_router.default
_prompt_router_pool = torch.ops.milora.prompt_router_pool.default
_prompt_router_backward = torch.ops.milora.prompt_router_backward.default

MAX_RANK = 256
MAX_EXPERTS = 64
MAX_SLICES = 16

# Values of `path` of `grouped_lora_`.
DECODE, PREFILL, PREFILL_WGMMA = 0, 1, 2

# Values of `codes` of `prompt_router`, in the order of its columns.
POOLERS = ("self_attention", "mean", "max", "last")
ACTIVATIONS = ("rational", "gelu", "relu")
NORMS = ("none", "rms")
GATES = ("probability", "renormalized", "hard")


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
    path: int = DECODE,
    rank_gates: Tensor | None = None,
) -> None:
    """Add each token's gated low-rank update in place, for modules that share x.   [MiLoRA, eq. 1]

    y_s[t] += g · (scale · B C (r ⊙ A x_t) + u ⊙ y_s[t] + v),
    g = gates[route_of[t], experts[s]],  r = rank_gates[t, s, :rank], or 1 without them

    The y on the right is the value before. u and v are the output vectors of DoRA, C is the core of
    LoRA-XS, whose A and B may be those of other adapters too; an adapter without them has −1 in
    `offsets`, and without C it is as if C were 1. For inference: no autograd is registered.

    Args:
        y: S slices, each [..., d_out_s], dtype of x, with one row per token. 1 to 16 of them.
            Changed in place.
        x: [..., d_in] float32 | bfloat16 | float16; num_tokens is the product of the leading
            dimensions. x and y are contiguous, or 2-D with rows at any stride.
        pool: [pool_bytes] uint8, starts on 16 bytes. A [rank, d_in] and Bᵀ [rank, d_out] in x's
            dtype, each row on 16 bytes: the row stride is d · itemsize rounded up to 16. C
            [rank, rank] likewise. u and v [d_out] float32.
        offsets: [num_adapters, num_experts, 5] int64, bytes from the pool's start of A, Bᵀ, u, v,
            C, each a multiple of 16; −1 = no such vector or matrix.
        ranks: [num_adapters, num_experts] int32, 0 to 256; 0 = no expert here.
        scales: [num_adapters, num_experts] float32.
        gates: [num_routes, num_experts] float32; 0 = the row is untouched, bitwise.
        route_of: [num_tokens] int32, row of `gates`; −1 leaves the token untouched.
        adapter_of: [num_routes] int32; −1 = the bare base.
        experts: per slice its column of `gates`, `offsets`, `ranks` and `scales`.
        path: `DECODE`, made for few rows per adapter, or `PREFILL`, for many; `PREFILL_WGMMA`, the
            same in the instructions of compute capability 9.0, for bfloat16 and float16 in rows
            that start on 16 bytes. A row's bits depend on the path and on nothing beside the row.
            The CPU has one path and takes all.
        rank_gates: [num_tokens, S, max_rank] float32, contiguous, or None. max_rank is 1 to 256 and
            at least the rank of every expert in use; what lies past an expert's rank is not read.
    Raises: RuntimeError if a dtype, shape, layout or device is wrong; on the CPU also if a route,
        adapter, rank or offset is out of range. CUDA kernels do not read these on the host: there
        such a row is left untouched. `PREFILL_WGMMA` raises where it has no kernel.
    Note: accumulates in float32 and rounds once; where the CPU or GPU multiplies bf16 pairs,
        C (r ⊙ A x), not rounded before, is rounded to bf16 too, as torch does between two
        products. No host synchronisation,
        CUDA-graph safe.
    """
    tables = pool, offsets, ranks, scales, gates, route_of, adapter_of
    _grouped_lora_(y, x, *tables, experts, path, rank_gates)


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
) -> Tensor:
    """A module and its experts in one product, which writes y once.               [MiLoRA, eq. 1]

    y[t] = y0 + g · (scale · B C (A x_t) + u ⊙ y0 + v),  y0 = W x_t + bias,
    g = gates[route_of[t], expert]

    Args:
        x: [..., d_in] float32 | bfloat16 | float16, contiguous, or 2-D with rows at any stride.
        w: [d_out, d_in], dtype of x, last dim contiguous.
        bias: [d_out], dtype of x, or None.
        pool, offsets, ranks, scales, gates, route_of, adapter_of: as `grouped_lora_` takes them.
        expert: the module's column of `gates`, `offsets`, `ranks` and `scales`.
    Returns: [..., d_out], dtype of x. Accumulates in float32; C A x times gate and scale is rounded
        to x's dtype, as the matrix units take it.
    Raises: RuntimeError as `grouped_lora_`; on CUDA also if the GPU is not of compute capability
        9.0, the dtype is float32, or rows of x or w do not start on 16 bytes: call `linear` and
        `grouped_lora_` there, and wherever a rank has a gate of its own, which this op has not.
    Note: for inference, no autograd is registered. On CUDA a row's bits depend on that row and its
        expert alone, provided that the experts' weights are finite; they are not the bits of
        `grouped_lora_`, also for rows without an adapter. The CPU computes `linear`, then
        `grouped_lora_`. No host synchronisation, CUDA-graph safe.
    """
    return _fused_lora(
        x, w, bias, pool, offsets, ranks, scales, gates, route_of, adapter_of, expert
    )


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
    """y plus each token's gated low-rank update, differentiable.                   [MiLoRA, eq. 1]

    out[t] = y[t] + g · scale_i · B_i (A_i x_t),  g = gates[route_of[t]],
    i = adapter_of[route_of[t]]

    Args:
        y: [num_tokens, d_out], dtype of x, last dim contiguous.
        x: [num_tokens, d_in] float32 | bfloat16 | float16, last dim contiguous.
        a: num_adapters of [rank_i, d_in], dtype of x, contiguous; ranks 1 to 256.
        b: num_adapters of [d_out, rank_i], dtype of x, contiguous.
        scales: num_adapters.
        gates: [num_routes] float32, this module's column of the gates.
        route_of: [num_tokens] int32; −1 leaves the token as it is.
        adapter_of: [num_routes] int32; −1 = the bare base.
    Returns: [num_tokens, d_out], dtype of x. Accumulates and rounds as `grouped_lora_`.
    Raises: RuntimeError as `grouped_lora_`.
    Note: gradients reach y, x, a, b and gates. A token whose gate is 0 is skipped, so it gives no
        gradient, to the gate neither; an adapter without tokens gets zeros.
    """
    return _grouped_lora(y, x, a, b, scales, gates, route_of, adapter_of)


def lora_linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    gates: Tensor,
    route_of: Tensor,
    adapter_of: Tensor,
) -> Tensor:
    """A frozen linear module and `grouped_lora` on what it gives, as one autograd node.  [eq. 1]

    The update goes into the module's own output and its gradient into the module's own gradient of
    x, so that rows with gate 0 cost nothing in either direction.

    Args:
        x: [num_tokens, d_in] float32 | bfloat16 | float16, last dim contiguous.
        w: [d_out, d_in], dtype of x; gets no gradient.
        bias: [d_out], dtype of x, or None; gets no gradient.
        a, b, scales, gates, route_of, adapter_of: as `grouped_lora` takes them.
    Returns: [num_tokens, d_out], dtype of x.
    Raises: RuntimeError as `grouped_lora`; also on a second derivative, which it does not have.
    """
    return _LoraLinear.apply(x, w, bias, scales, gates, route_of, adapter_of, *a, *b)


def prompt_router(
    h: Tensor,
    spans: Tensor,
    router_of: Tensor,
    w_sa: Tensor,
    w_r: Tensor,
    coef: Tensor,
    codes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool each prompt's hidden states, activate, route.                 [MiLoRA, eq. 2, 3, 6, 8]

    pooled = Σ_t softmax(h w_sa)_t h_t  (or mean, max, last),  p = softmax(W_r g(norm(pooled))),
    gates = p for the top_k largest (ties: lower index), else 0;
    rational g(x) = Σ_{j=0..6} a_j xʲ / (1 + |Σ_{i=1..5} b_i xⁱ|), evaluated without overflow.

    Args:
        h: [num_tokens, d] float32 | bfloat16 | float16, last dim contiguous. Tokens outside all
            spans are never read: they may be NaN.
        spans: [num_prompts, 2] int32, half-open token ranges that do not overlap. An empty span
            pools to 0.
        router_of: [num_prompts] int32; −1 = no router: the outputs' rows are 0.
        w_sa: [num_routers, d] float32.
        w_r: [num_routers, N, d] float32, N at most 64.
        coef: [num_routers, 12] float32: a_0..a_6, b_1..b_5.
        codes: [num_routers, 6] int32: pooler (`POOLERS`), activation (`ACTIVATIONS`), norm
            (`NORMS`; rms with eps 1e-6), gate (`GATES`), top_k, num_experts ≤ N.
    Returns: probs [num_prompts, N] and gates [num_prompts, N] float32, 0 from num_experts on, and
        pooled [num_prompts, d] float32, before norm and activation.
    Raises: RuntimeError if a dtype, shape, layout or device is wrong; on the CPU also if a code,
        span or router is out of range.
    Note: gradients reach h, w_sa, w_r and coef. `hard` gates pass theirs straight to the kept
        probabilities; max pooling gives its to the first maximum.
    """
    return _prompt_router(h, spans, router_of, w_sa, w_r, coef, codes)


def prompt_router_pool(
    h: Tensor,
    spans: Tensor,
    router_of: Tensor,
    pool: Tensor,
    offsets: Tensor,
    codes: Tensor,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`prompt_router` with the routers' weights in the pool: one call serves many tenants.

    Args:
        h, spans, router_of, codes: as `prompt_router` takes them.
        pool: [pool_bytes] uint8, starts on 16 bytes. Each router has w_sa [d], W_r [n, d] with
            n = its num_experts, and its coefficients [12], all float32; rows of W_r start on
            16 bytes.
        offsets: [num_routers, 3] int64, bytes from the pool's start of w_sa, W_r and the
            coefficients, each a multiple of 16. −1 = absent, where pooler or activation needs none.
        num_experts: columns of probs and gates, 1 to 64.
    Returns: as `prompt_router`, and the same bits.
    Raises: RuntimeError as `prompt_router`; on the CPU also if an offset of a router in use is out
        of range. On CUDA such a prompt's rows are 0.
    Note: for inference, no autograd is registered. Routers that no prompt uses are not looked at.
    """
    return _prompt_router_pool(h, spans, router_of, pool, offsets, codes, num_experts)


def _last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.register_fake("milora::grouped_lora_")
def _(
    y,
    x,
    pool,
    offsets,
    ranks,
    scales,
    gates,
    route_of,
    adapter_of,
    experts,
    path=0,
    rank_gates=None,
) -> None:
    return None


@torch.library.register_fake("milora::fused_lora")
def _(x, w, bias, pool, offsets, ranks, scales, gates, route_of, adapter_of, expert) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


@torch.library.register_fake("milora::grouped_lora")
def _(y, x, a, b, scales, gates, route_of, adapter_of) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.register_fake("milora::grouped_lora_add_")
def _(y, x, a, b, scales, gates, route_of, adapter_of) -> None:
    return None


@torch.library.register_fake("milora::grouped_lora_backward_")
def _(dy, x, a, b, scales, gates, route_of, adapter_of, dx, da, db, dgates) -> None:
    return None


@torch.library.register_fake("milora::prompt_router")
def _(h, spans, router_of, w_sa, w_r, coef, codes):
    num_prompts, num_experts = spans.shape[0], w_r.shape[1]
    return (
        w_sa.new_empty((num_prompts, num_experts)),
        w_sa.new_empty((num_prompts, num_experts)),
        w_sa.new_empty((num_prompts, h.shape[1])),
    )


@torch.library.register_fake("milora::prompt_router_pool")
def _(h, spans, router_of, pool, offsets, codes, num_experts):
    num_prompts = spans.shape[0]
    shapes = (num_experts, num_experts, h.shape[1])
    return tuple(h.new_empty((num_prompts, n), dtype=torch.float32) for n in shapes)


@torch.library.register_fake("milora::prompt_router_backward")
def _(dprobs, dgates, dpooled, h, spans, router_of, w_sa, w_r, coef, codes, probs, pooled):
    return tuple(t.new_empty(t.shape) for t in (h, w_sa, w_r, coef))


def _grouped_lora_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, x, a, b, scales, gates, route_of, adapter_of = inputs
    ctx.save_for_backward(x, gates, route_of, adapter_of, *a, *b)
    ctx.scales = scales


def _grouped_lora_grad(ctx: Any, dout: Tensor) -> tuple:
    saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = torch.zeros_like(saved[0]) if needs[1] else None
    need_weights = _any(needs[2]) or _any(needs[3])
    da, db, dgates = _add_gradients(ctx, dout, saved, dx, need_weights, needs[5])
    no_scales = None if da else []  # torch takes an empty list for one of tensors
    return dout if needs[0] else None, dx, da, db, no_scales, dgates, None, None


def _add_gradients(
    ctx: Any, dy: Tensor, saved: Sequence[Tensor], dx: Tensor | None, weights: bool, gates: bool
) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    """Add the update's gradient of x to `dx`, and return those of a, b and gates where wanted.

    Args:
        saved: x, gates, route_of, adapter_of, *a, *b.
    """
    x, gate_values, route_of, adapter_of, *a_and_b = saved
    half = len(a_and_b) // 2
    a, b = a_and_b[:half], a_and_b[half:]
    # Tokens and adapters without work keep their zeros.
    da, db = ([torch.zeros_like(t) for t in group] if weights else [] for group in (a, b))
    dgates = torch.zeros_like(gate_values) if gates else None
    if weights or gates or dx is not None:
        dy = _last_dim_contiguous(dy)
        tables = gate_values, route_of, adapter_of
        _grouped_lora_backward_(dy, x, a, b, ctx.scales, *tables, dx, da, db, dgates)
    return da or [None] * half, db or [None] * half, dgates


class _LoraLinear(torch.autograd.Function):
    """See `lora_linear`."""

    @staticmethod
    def forward(ctx, x, w, bias, scales, gates, route_of, adapter_of, *weights):
        y = torch.nn.functional.linear(x, w, bias)
        half = len(weights) // 2
        _grouped_lora_add_(
            y, x, weights[:half], weights[half:], scales, gates, route_of, adapter_of
        )
        ctx.save_for_backward(w, x, gates, route_of, adapter_of, *weights)
        ctx.scales = scales
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        w, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = dy.mm(w) if needs[0] else None
        da, db, dgates = _add_gradients(ctx, dy, saved, dx, any(needs[7:]), needs[4])
        return dx, None, None, None, dgates, None, None, *da, *db


def _any(needs: bool | Sequence[bool]) -> bool:
    return needs if isinstance(needs, bool) else any(needs)


torch.library.register_autograd(
    "milora::grouped_lora", _grouped_lora_grad, setup_context=_grouped_lora_setup
)


def _prompt_router_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    probs, _, pooled = output
    ctx.save_for_backward(*inputs, probs, pooled)


def _prompt_router_grad(ctx: Any, dprobs: Tensor, dgates: Tensor, dpooled: Tensor) -> tuple:
    dh, dw_sa, dw_r, dcoef = _prompt_router_backward(
        dprobs.contiguous(), dgates.contiguous(), dpooled.contiguous(), *ctx.saved_tensors
    )
    return dh, None, None, dw_sa, dw_r, dcoef, None


torch.library.register_autograd(
    "milora::prompt_router", _prompt_router_grad, setup_context=_prompt_router_setup
)
