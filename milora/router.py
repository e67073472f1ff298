"""The prompt router of one block.   [MiLoRA, eq. 2, 3, 6 and 8]"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from milora import ops, rational
from milora.config import ACTIVATIONS, GATES, POOLERS, ROUTER_NORMS, MiLoRAConfig

NUM_COEFFICIENTS = 12
ROUTER_NAME = "milora_router"  # of the routers' ModuleDict, a child of its block


class PromptRouter(nn.Module):
    """Pool a prompt, activate, and choose the experts of one block.

    Parameters (float32): `w_sa` [d] where the pooler is self_attention, `w_r` [num_experts, d], and
    `theta` [12] = a_0..a_6, b_1..b_5 where the activation is rational. With `pooled_input` the
    router reads vectors that another block has pooled and has no pooler of its own.

    `w_sa` starts at zero: uniform attention, i.e. the mean. A random start would put all attention
    on the few tokens with very large activations that real models have.
    """

    def __init__(
        self,
        d: int,
        num_experts: int,
        config: MiLoRAConfig,
        block: int,
        *,
        pooled_input: bool = False,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.codes = router_codes(config, block, num_experts, pooled_input=pooled_input)
        weight = torch.empty(num_experts, d, device=device)
        if weight.device.type != "meta":
            weight = torch.empty(num_experts, d).normal_(0, d**-0.5, generator=generator).to(device)
        self.w_r = nn.Parameter(weight)
        if POOLERS[self.codes[0]] == "self_attention":
            self.w_sa = nn.Parameter(torch.zeros(d, device=device))
        else:
            self.register_parameter("w_sa", None)
        if ACTIVATIONS[self.codes[1]] == "rational":
            theta = torch.tensor(rational.fit(), dtype=torch.float32)
            self.theta = nn.Parameter(
                theta.to(device)
                if weight.device.type != "meta"
                else torch.empty_like(theta, device="meta")
            )
        else:
            self.register_parameter("theta", None)

    def extra_repr(self) -> str:
        pooler, activation, norm, gate, top_k, num_experts = self.codes
        return (
            f"num_experts={num_experts}, top_k={top_k}, pooler={POOLERS[pooler]}, "
            f"activation={ACTIVATIONS[activation]}, norm={ROUTER_NORMS[norm]}, gate={GATES[gate]}"
        )


def router_codes(
    config: MiLoRAConfig, block: int, num_experts: int, *, pooled_input: bool = False
) -> tuple[int, int, int, int, int, int]:
    """A router's row of `codes`, as `ops.prompt_router` takes them."""
    return (
        POOLERS.index("mean" if pooled_input else config.pooler),
        ACTIVATIONS.index(config.activation_of(block)),
        ROUTER_NORMS.index(config.router_norm),
        GATES.index(config.gate),
        min(config.top_k, num_experts),
        num_experts,
    )


def route(
    routers: list[PromptRouter], h: Tensor, spans: Tensor, router_of: Tensor, *, train_theta: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Route each prompt with its own router in one launch.

    Args:
        routers: the distinct routers; all read the same d. Numbers of experts may differ.
        h: [num_tokens, d], hidden states right before the block.
        spans: [num_prompts, 2] int32, half-open token ranges of `h`.
        router_of: [num_prompts] int32, index into `routers`; -1 leaves zeros.
        train_theta: whether the rational coefficients get a gradient (bi-level: only on their own
            batches; the other parameters then have requires_grad False).
    Returns: probabilities and gates [num_prompts, N_max], pooled [num_prompts, d], float32.
    """
    n_max = max(router.codes[-1] for router in routers)
    w_r = torch.stack([_pad_rows(router.w_r, n_max) for router in routers])
    zeros = torch.zeros(h.shape[-1], device=h.device)
    w_sa = torch.stack([zeros if router.w_sa is None else router.w_sa for router in routers])
    coef = torch.stack([_coefficients(router, train_theta, h.device) for router in routers])
    make_codes = _codes.__wrapped__ if torch.compiler.is_compiling() else _codes
    codes = make_codes(tuple(router.codes for router in routers), h.device)
    # float() undoes a cast of the whole model to bf16: routing is always float32.
    return ops.prompt_router(h, spans, router_of, w_sa.float(), w_r.float(), coef.float(), codes)


@lru_cache(maxsize=256)
def _codes(codes: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept: a later training step must be able to save it
        return torch.tensor(codes, dtype=torch.int32, device=device)


def _pad_rows(w_r: Tensor, rows: int) -> Tensor:
    missing = rows - w_r.shape[0]
    return w_r if missing == 0 else torch.cat([w_r, w_r.new_zeros(missing, w_r.shape[1])])


def _coefficients(router: PromptRouter, train: bool, device: torch.device) -> Tensor:
    if router.theta is None:
        return torch.zeros(NUM_COEFFICIENTS, device=device)
    return router.theta if train else router.theta.detach()


def keeps_unused_edges() -> bool:
    """Whether unused parameters must still receive a (zero) gradient.

    DDP waits for a gradient of every parameter, and FSDP2's reduce-scatter hangs when ranks hold
    gradients of different parameters. Both happen when ranks activate different experts.
    """
    return torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()
