"""Batches: padded on the right, so that a row's prompt begins at column 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from milora.data.encoding import IGNORED


@dataclass
class CompletionCollator:
    """Pads encoded examples to the longest one.

    Args:
        pad_token_id: fills `input_ids`; any id will do, since the mask hides it.
        multiple_of: round the length up to this, which keeps matrix shapes few and aligned.
    """

    pad_token_id: int = 0
    multiple_of: int = 8

    def __call__(self, rows: Sequence[dict[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Build one batch.

        Returns: input_ids, attention_mask and labels, each [num_rows, length] int64; labels are
            -100 on prompt and padding.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), -(-longest // self.multiple_of) * self.multiple_of)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
        }
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][i, :length] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][i, :length] = 1
            batch["labels"][i, :length] = torch.as_tensor(row["labels"])
        return batch


def pad_token_id(tokenizer) -> int:
    """The tokenizer's padding id, or its end id: the attention mask hides padding anyway."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
