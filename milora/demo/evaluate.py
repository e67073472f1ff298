"""Held-out loss and exact match of one model on one task."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from milora.data import CompletionCollator

Row = dict[str, list[int]]  # input_ids and labels, as `encode_examples` gives them
BATCH_SIZE = 32


@dataclass(frozen=True)
class Score:
    """`loss`: mean negative log-likelihood of the answer's tokens, in nats."""

    loss: float
    exact_match: float
    num_examples: int


def prompt_of(row: Row) -> list[int]:
    return [
        token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0
    ]


def answer_of(row: Row) -> list[int]:
    return [label for label in row["labels"] if label >= 0]


def constant_answer(rows: list[Row]) -> float:
    """Exact match of the best answer that ignores the prompt: the floor of a useful model."""
    counts = Counter(tuple(answer_of(row)) for row in rows)
    return counts.most_common(1)[0][1] / len(rows)


def score(model: nn.Module, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Score:
    """Loss by teacher forcing, exact match by greedy decoding of each row's prompt."""
    total, num_tokens, matches = 0.0, 0, 0
    collator = CompletionCollator(tokenizer.pad_token_id)
    for start in range(0, len(rows), BATCH_SIZE):
        chunk = rows[start : start + BATCH_SIZE]
        batch = collator(chunk)
        with torch.inference_mode():
            loss = model(**batch, use_cache=False).loss
        size = sum(len(answer_of(row)) for row in chunk)
        total, num_tokens = total + loss.item() * size, num_tokens + size

        wanted = [answer_of(row) for row in chunk]
        answers = generate(
            model, tokenizer, [prompt_of(row) for row in chunk], max(map(len, wanted))
        )
        for tokens, answer in zip(answers.tolist(), wanted, strict=True):
            said = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            matches += said == tokenizer.decode(answer, skip_special_tokens=True).strip()
    return Score(total / num_tokens, matches / len(rows), len(rows))


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    num_tokens: int,
    exactly: bool = False,
) -> Tensor:
    """Greedy answers [num_prompts, <= num_tokens] int64; `exactly` never stops early."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens if exactly else None,
        )
    return output[:, batch["input_ids"].shape[1] :]
