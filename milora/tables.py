"""What inference kernels read of a block's experts and routers, wherever the weights live."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# The columns of `offsets`: what an expert has in the pool.
EXPERT_PARTS = ("a", "bt", "u", "v", "core")


@dataclass
class BlockTables:
    """One block's tables, with a row per slot (an adapter's place) and a column per expert.

    Kernels read them in place, so whoever owns them changes their contents and never the tensors:
    a captured CUDA graph then stays valid while adapters come and go.

    Attributes:
        pool: [pool_bytes] uint8, starts on 16 bytes.
        offsets: [num_slots, num_experts, 5] int64, bytes of `EXPERT_PARTS` in the pool;
            -1 = absent.
        ranks: [num_slots, num_experts] int32; 0 = this adapter has no expert there.
        scales: [num_slots, num_experts] float32.
        router_offsets: [num_slots, 3] int64, bytes of w_sa, W_r, coefficients; -1 = absent.
        router_codes: [num_slots, 6] int32, as `ops.prompt_router` takes them.
    """

    pool: Tensor
    offsets: Tensor
    ranks: Tensor
    scales: Tensor
    router_offsets: Tensor | None = None
    router_codes: Tensor | None = None
