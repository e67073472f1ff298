"""Held-out loss and exact match, both read off one teacher-forced forward.

Greedy decoding says exactly the answer (and then the end token) if and only if each answer token is
the arg max given the ones before it. So one forward tells what `generate` would have said.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from milora.data import CompletionCollator

Row = dict[str, list[int]]
BATCH_SIZE = 128


@dataclass(frozen=True)
class Score:
    """`loss`: mean negative log-likelihood of an answer's token (end token too), in nats."""

    exact_match: float
    loss: float


@torch.no_grad()
def score(model: nn.Module, rows: list[Row], collate: CompletionCollator, device: str) -> Score:
    """Labels tell a MiLoRA router where each prompt ends; no token of an answer reaches it."""
    matches, total, num_tokens = 0, 0.0, 0
    for start in range(0, len(rows), BATCH_SIZE):
        batch = {k: v.to(device) for k, v in collate(rows[start : start + BATCH_SIZE]).items()}
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        answered = labels >= 0
        right = (logits.argmax(-1) == labels) | ~answered
        matches += right.all(dim=1).sum().item()
        total += functional.cross_entropy(
            logits[answered], labels[answered], reduction="sum"
        ).item()
        num_tokens += answered.sum().item()
    return Score(matches / len(rows), total / num_tokens)
