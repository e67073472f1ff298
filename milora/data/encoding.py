"""From examples to token ids, with the prompt's length kept exact.

The prompt is encoded alone, the same way in training and in use, so that the router sees the same
tokens in both. Encoding prompt and answer as one text could merge tokens across the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from milora.data.jsonl import Example
from milora.errors import UserError

IGNORED = -100


@dataclass
class EncodedDataset(torch.utils.data.Dataset):
    """Encoded examples, ready for `CompletionCollator`.

    Args:
        rows: {"input_ids": prompt + answer, "labels": -100 for each prompt token + answer}.
        truncated: examples whose answer was cut at `max_length`.
        dropped: places of the examples whose prompt alone fills `max_length`.
    """

    rows: list[dict[str, list[int]]]
    truncated: int = 0
    dropped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


class Encoder:
    """Turns prompts and answers into token ids.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: Jinja text that replaces the tokenizer's own template.
    """

    def __init__(self, tokenizer, chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    def prompt(self, example: Example) -> list[int]:
        """Token ids of the prompt; of a chat, with the header that opens the assistant's turn.

        Raises:
            UserError: no token, or chat messages without a chat template.
        """
        if isinstance(example.prompt, str):
            ids = self.tokenizer(example.prompt)["input_ids"]
            # Some tokenizers close every text with the end token; the answer follows here.
            if ids and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]
        else:
            ids = self._render(example.prompt, example.where, open_answer=True)
        if not ids:
            raise UserError(f"{example.where}: the prompt has no token; the router needs one")
        return ids

    def answer(self, example: Example, prompt: Sequence[int]) -> list[int]:
        """Token ids of the answer, with the end token.

        Raises:
            UserError: the chat template does not put the answer behind the prompt, so the
                prompt's end cannot be known.
        """
        if isinstance(example.completion, str):
            ids = self.tokenizer(example.completion, add_special_tokens=False)["input_ids"]
            end = self.tokenizer.eos_token_id
            return ids if end is None else [*ids, end]
        full = self._render((*example.prompt, example.completion), example.where, open_answer=False)
        if full[: len(prompt)] != list(prompt) or len(full) == len(prompt):
            raise UserError(
                f"{example.where}: the chat template does not render a prompt as the beginning of "
                "prompt and answer, so the end of the prompt is unknown",
                hint="use 'prompt' and 'completion', or give another --chat-template",
            )
        return full[len(prompt) :]

    def _render(self, messages: Sequence[dict], where: str, *, open_answer: bool) -> list[int]:
        if self.chat_template is None and not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"{where}: chat messages need a chat template, and this tokenizer has none",
                hint="give one with --chat-template FILE, or use 'prompt' and 'completion'",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                add_generation_prompt=open_answer,
                tokenize=False,
            )
        except Exception as error:  # the template is the user's own program: any error is its own
            raise UserError(f"{where}: the chat template failed: {error}") from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_examples(
    examples: Sequence[Example], encoder: Encoder, max_length: int
) -> EncodedDataset:
    """Encode examples, cutting answers at `max_length` tokens in all.

    An example whose prompt leaves no room for an answer teaches nothing; it is dropped and named
    in the result rather than trained on with a cut prompt, which would route differently.

    Raises:
        UserError: an example cannot be encoded, or none is left.
    """
    encoded = EncodedDataset([])
    for example in examples:
        prompt = encoder.prompt(example)
        answer = encoder.answer(example, prompt)
        if len(prompt) >= max_length:
            encoded.dropped.append(example.where)
            continue
        encoded.truncated += len(prompt) + len(answer) > max_length
        answer = answer[: max_length - len(prompt)]
        labels = [IGNORED] * len(prompt) + answer
        encoded.rows.append({"input_ids": prompt + answer, "labels": labels})
    if not encoded.rows:
        raise UserError(
            f"{examples[0].where.rpartition(':')[0]}: every prompt is as long as the limit of "
            f"{max_length} tokens or longer",
            hint="raise --max-length, or use a model with more positions",
        )
    return encoded
