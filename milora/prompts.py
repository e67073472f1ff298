"""Which tokens of a forward are the prompt.   [MiLoRA, section 3: the router sees the prompt only]

In order: explicit `prompt_lengths`, labels (the tokens before the first label that is not -100),
what `generate` captured on entry, and, where a cache is being filled or the model is an encoder,
every attended token. A token of the answer that reaches the router is a bug, so a forward that
says none of this is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from milora.routing import Plan, spans_of

PENDING = "_milora_pending"
IGNORED = -100


@dataclass
class Pending:
    """The prompt as `generate` got it.

    Attributes:
        mask: [rows, columns] attention mask over the prompt, or None (all attended).
        length: columns of the prompt; later columns of the first forward are speculative tokens.
        num_prompts: rows before they were repeated for beams or several return sequences.
    """

    mask: Tensor | None
    length: int | None
    num_prompts: int | None


@dataclass
class Source:
    """Everything that a forward says about its prompts; `resolve` decides."""

    rows: int
    num_columns: int
    device: torch.device
    mask: Tensor | None = None
    labels: Tensor | None = None
    lengths: Any = None
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    pending: Pending | None = None
    prefill: bool = False
    whole: bool = False

    def resolve(self) -> tuple[Plan, Tensor, Tensor]:
        """The plan, the prompt of each row [rows], the prompts' lengths [num_prompts].

        Raises:
            ValueError: nothing says where the prompt ends, or a prompt is empty.
        """
        if self.lengths is not None or self.labels is not None:
            segments = self._segments()
            return self._padded_or_packed(segments)
        if self.pending is not None:
            return self._pending_prompts(self.pending)
        if not (self.prefill or self.whole):
            raise ValueError(
                "milora: this forward has neither a cache, labels nor prompt lengths, so the "
                "router cannot tell the prompt from the answer. Say it: `with "
                "milora.prompt_lengths(model, n): model(...)`, with n the number of prompt tokens "
                "of each row; or pass use_cache=True if all tokens are the prompt"
            )
        return self._plan(self._attended(), torch.arange(self.rows, device=self.device))

    # ---- rows with padding ----------------------------------------------------------------------

    def _attended(self) -> Tensor:
        if self.mask is not None:
            return self.mask.to(self.device)
        return torch.ones(self.rows, self.num_columns, dtype=torch.bool, device=self.device)

    def _plan(self, prompt: Tensor, row_of: Tensor) -> tuple[Plan, Tensor, Tensor]:
        num_prompts = prompt.shape[0]
        first_rows = torch.arange(num_prompts, device=self.device) * (self.rows // num_prompts)
        spans, take, lengths = spans_of(prompt, first_rows, self.num_columns)
        _check_not_empty(lengths)
        return Plan(spans, self.rows * self.num_columns, take), row_of, lengths

    def _pending_prompts(self, pending: Pending) -> tuple[Plan, Tensor, Tensor]:
        num_prompts = pending.num_prompts or self.rows
        if self.rows % num_prompts:
            raise ValueError(
                f"milora: generate() began with {num_prompts} prompts and runs {self.rows} rows"
            )
        length = min(pending.length or self.num_columns, self.num_columns)
        mask = pending.mask
        if mask is None:
            prompt = torch.ones(self.rows, length, dtype=torch.bool, device=self.device)
        else:
            prompt = mask[:, :length].to(self.device) != 0
        prompt = prompt[:: self.rows // num_prompts]
        return self._plan(prompt, rows_of(num_prompts, self.rows, self.device))

    # ---- labels and lengths, padded or packed ---------------------------------------------------

    def _segments(self) -> Tensor | None:
        """[num_tokens] int64 segment of each token where rows are packed, else None.

        Padding-free collators give cumulative lengths or position ids that start again at 0.
        """
        num_tokens = self.rows * self.num_columns
        starts = torch.zeros(num_tokens, dtype=torch.bool, device=self.device)
        if self.cu_seq_lens is not None:
            ends = self.cu_seq_lens.to(self.device).long()
            starts[ends[ends < num_tokens]] = True
        elif self.position_ids is not None and self.mask is None and self.position_ids.dim() == 2:
            positions = self.position_ids.to(self.device).expand(self.rows, -1)
            if positions.shape[1] == self.num_columns:
                starts = (positions == 0).flatten()
        starts[:: self.num_columns] = True
        if int(starts.sum()) == self.rows:
            return None
        return starts.cumsum(0) - 1

    def _padded_or_packed(self, segments: Tensor | None) -> tuple[Plan, Tensor, Tensor]:
        if segments is None:
            rows = torch.arange(self.rows, device=self.device)
            attended = self._attended()
            return self._plan(attended & self._before_answer(attended), rows)
        num_segments = int(segments[-1]) + 1
        columns = torch.zeros(num_segments, dtype=torch.int64, device=self.device)
        columns.index_add_(0, segments, torch.ones_like(segments))
        first = columns.cumsum(0) - columns
        if self.lengths is not None:
            lengths = self._lengths(num_segments)
            if bool((lengths > columns).any()):
                raise ValueError(
                    f"prompt_lengths: {lengths.tolist()} exceed the segments' {columns.tolist()}"
                )
        else:
            answered = (self.labels.to(self.device).flatten() != IGNORED).long()
            total = answered.cumsum(0)
            before = total[first] - answered[first]
            in_prompt = (total - before[segments] == 0).long()
            lengths = torch.zeros_like(columns).index_add_(0, segments, in_prompt)
        _check_not_empty(lengths)
        spans = torch.stack([first, first + lengths], 1).to(torch.int32)
        plan = Plan(spans, segments.shape[0], segment_of=segments.to(torch.int32))
        # Rows are not what follows a route here; `Plan.segment_of` says it per token.
        return plan, torch.arange(num_segments, device=self.device), lengths

    def _before_answer(self, attended: Tensor) -> Tensor:
        if self.lengths is None:
            if tuple(self.labels.shape) != (self.rows, self.num_columns):
                raise ValueError(
                    f"milora: labels must be [{self.rows}, {self.num_columns}] as input_ids, got "
                    f"{list(self.labels.shape)}"
                )
            return (self.labels.to(self.device) != IGNORED).cumsum(1) == 0
        lengths = self._lengths(self.rows)
        available = attended.sum(1)
        if bool((lengths > available).any()):
            raise ValueError(
                f"prompt_lengths: {lengths.tolist()} exceed the rows' attended tokens "
                f"{available.tolist()}"
            )
        return attended.cumsum(1) <= lengths[:, None]

    def _lengths(self, count: int) -> Tensor:
        lengths = torch.as_tensor(self.lengths, device=self.device)
        if lengths.dim() == 0:
            lengths = lengths.expand(count)
        if tuple(lengths.shape) != (count,) or lengths.is_floating_point():
            raise ValueError(
                f"prompt_lengths: must be an integer or {count} integers, one per prompt, got "
                f"{self.lengths!r}"
            )
        return lengths.long()


def attended(attention_mask: Any, rows: int, num_columns: int) -> Tensor | None:
    """[rows, num_columns] bool from a 2-D mask; None where all is attended or nothing is known.

    A mask longer than the forward covers a cache in front of it. Masks of other forms (4-D, or a
    dict per layer type) are made inside `generate`, which has captured the 2-D mask before.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    if attention_mask.shape[0] != rows or attention_mask.shape[1] < num_columns:
        return None
    return attention_mask[:, -num_columns:] != 0


def rows_of(num_prompts: int, rows: int, device: torch.device) -> Tensor:
    """[rows] int64: the prompt of each row where every prompt has rows / num_prompts of them.

    Raises:
        ValueError: the rows are no multiple of the prompts.
    """
    if num_prompts == 0 or rows % num_prompts:
        raise ValueError(f"milora: {rows} rows cannot follow the routes of {num_prompts} prompts")
    return torch.arange(rows, device=device) // (rows // num_prompts)


def _check_not_empty(lengths: Tensor) -> None:
    if bool((lengths < 1).any()):
        empty = (lengths < 1).nonzero().squeeze(1).tolist()
        raise ValueError(
            f"milora: the prompts of rows {empty} are empty, so there is nothing to route on. "
            "Labels must be -100 on the prompt (completion-only labels), or give the prompt's "
            "length with milora.prompt_lengths(model, n)"
        )
