"""What the routers did on held-out prompts: counters, and how often each expert is on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import milora
from milora.demo.evaluate import BATCH_SIZE, Row, generate, prompt_of


@dataclass(frozen=True)
class RoutingCounts:
    """MiLoRA's own counters over some `generate` calls, and what they should come to.

    A router works once per prompt and block: `routed_prompts` = blocks × prompts and
    `router_launches` = blocks × prefills, however many forwards the answers took.
    """

    num_blocks: int
    num_prompts: int
    num_prefills: int
    num_forwards: int
    routed_prompts: int
    router_launches: int


@dataclass(frozen=True)
class Routes:
    """`shares`: task -> [num_blocks, num_experts] f32, share of prompts that keep the expert."""

    counts: RoutingCounts
    shares: dict[str, Tensor]
    experts: list[str]


def observe_routes(
    model: nn.Module,
    rows: dict[str, list[Row]],
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
) -> Routes:
    """Answer every prompt of `rows` (task -> rows) with `num_tokens` tokens and watch."""
    num_forwards = 0

    def count(*_) -> None:
        nonlocal num_forwards
        num_forwards += 1

    hook = model.register_forward_hook(count)
    milora.reset_stats(model)
    shares, num_prefills = {}, 0
    try:
        for task, examples in rows.items():
            prompts = [prompt_of(row) for row in examples]
            with milora.record_routing(model) as states:
                for start in range(0, len(prompts), BATCH_SIZE):
                    chunk = prompts[start : start + BATCH_SIZE]
                    generate(model, tokenizer, chunk, num_tokens, exactly=True)
            num_prefills += len(states)
            kept = torch.cat([state.gates > 0 for state in states], dim=1)
            shares[task] = kept.float().mean(dim=1)
            names = states[0].names
    finally:
        hook.remove()
    stats = milora.stats(model)
    counts = RoutingCounts(
        num_blocks=len(names),
        num_prompts=sum(map(len, rows.values())),
        num_prefills=num_prefills,
        num_forwards=num_forwards,
        routed_prompts=stats.routed_prompts,
        router_launches=stats.router_launches,
    )
    # All blocks of a Llama have the same modules, so one list of names serves the heat map.
    return Routes(counts, shares, [path.rpartition(".")[2] for path in names[0]])
