"""lm-evaluation-harness (lm_eval 0.4.x) with the candidate answers kept out of the router.

The harness scores `context + answer` in one forward, padded on the right and without a mask. A
router that pools over all of it would see the answer and the padding. Here each row's context
length goes with it, so a block routes on the context alone:

    results = lm_eval.simple_evaluate(model=MiLoRALM(model, tokenizer), tasks=["boolq"])

Policies:
- A context that leaves fewer than `answer_room` of the model's `max_length` tokens is cut from the
  left to leave just that room, whatever its answers are. The harness itself cuts by each answer's
  length, which would let the answer choose which tokens are routed on.
- A rolling perplexity has no prompt. Each window routes on the tokens that the harness puts before
  its scored ones: the prefix token (begin or end of text) in the first window, one token of the
  text in later ones, more in the last, which is filled up. So no window routes on a token that it
  scores; values compare only with values of this policy.
- A task that writes its candidates into the *context* (WinoGrande's form) does show them to the
  router; that is the task's own prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

import milora
from milora.errors import UserError

try:
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "milora.integrations.lm_eval needs lm-evaluation-harness: "
        "pip install 'lm_eval>=0.4.13,<0.5'"
    ) from error

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class AnswerTooLong(UserError, ValueError):
    """An answer that does not fit behind its context, cut to leave `answer_room` tokens."""


class MiLoRALM(HFLM):
    """A model with MiLoRA adapters for lm_eval's `simple_evaluate(model=...)`.

    Args:
        model: a causal language model object that `milora.attach` or `milora.load` prepared.
        tokenizer: its tokenizer.
        batch_size: rows of a forward, or "auto".
        answer_room: tokens of `max_length` that a context may never take. None is a quarter of
            `max_length`, at most 256.
        options: further arguments of HFLM (max_length, add_bos_token, ...).

    Raises:
        ValueError: an encoder-decoder model, or `answer_room` out of range.
        AnswerTooLong: (while scoring) an answer does not fit behind its context.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        *,
        batch_size: int | str = 8,
        answer_room: int | None = None,
        **options,
    ):
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError("MiLoRALM: model must be a causal language model, got encoder-decoder")
        # The harness's cache would score a one-token answer from another answer's forward.
        options.update(logits_cache=False, backend="causal")
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options)
        limit = self.max_length
        self.answer_room = min(256, limit // 4) if answer_room is None else answer_room
        if not 1 <= self.answer_room < limit:
            raise ValueError(
                f"MiLoRALM: answer_room must be in [1, {limit - 1}], got {self.answer_room}"
            )
        self._expected: list[Request] | None = None

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs=None
    ) -> list[tuple[float, bool]]:
        # A rolling window comes without texts, and fits as it is.
        requests = [
            (texts, context if texts is None else self._cut(context, answer), answer)
            for texts, context, answer in requests
        ]
        # HFLM sorts its rows by this same key, and Python's sort keeps the order of equal keys.
        order = sorted(requests, key=lambda r: (-len(r[1]) - len(r[2]), (*r[1], *r[2])))
        with self._expecting(order):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _cut(self, context: list[int], answer: list[int]) -> list[int]:
        room = self.max_length - self.answer_room
        context = context[-room:]
        # The answer's last token is scored but never fed, hence the one.
        if len(context) + len(answer) - 1 > self.max_length:
            raise AnswerTooLong(
                f"MiLoRALM: an answer of {len(answer)} tokens does not fit behind its context of "
                f"{len(context)} tokens in max_length {self.max_length}; raise answer_room"
            )
        return context

    @contextlib.contextmanager
    def _expecting(self, rows: list[Request] | None):
        before, self._expected = self._expected, rows
        try:
            yield
        finally:
            self._expected = before

    def _detect_batch_size(self, requests=None, pos: int = 0) -> int:
        with self._expecting(None):  # its forwards are of made-up tokens
            return super()._detect_batch_size(requests, pos)

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        lengths = [inps.shape[1]] * inps.shape[0]
        if self._expected is not None:
            rows, self._expected = (
                self._expected[: inps.shape[0]],
                self._expected[inps.shape[0] :],
            )
            lengths = [self._check(fed, row) for fed, row in zip(inps.tolist(), rows, strict=True)]
        with milora.prompt_lengths(self.model, lengths):
            return super()._model_call(inps, attn_mask, labels)

    def _check(self, fed: list[int], row: Request) -> int:
        """The row's context length, once it is sure that this is the row."""
        _, context, answer = row
        tokens = [*context, *answer][:-1]
        if fed[: len(tokens)] != tokens:
            raise RuntimeError(
                "MiLoRALM: lm_eval fed its rows in another order than expected; this version of "
                "lm_eval is not supported (0.4.13 is)"
            )
        return len(context)
