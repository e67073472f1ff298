"""Prompts on the command line: `--prompt`, `--prompts FILE` or standard input, as token ids."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from milora.cli.models import max_positions
from milora.data import Encoder, Example, read_prompts
from milora.errors import UserError


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times"
    )
    parser.add_argument(
        "--prompts",
        action="append",
        metavar="FILE",
        help="JSONL, a line: prompt, or messages (chat); may be given several times",
    )
    parser.add_argument(
        "--chat", action="store_true", help="each --prompt is a user's chat message"
    )
    parser.add_argument(
        "--chat-template", metavar="FILE", help="Jinja chat template that replaces the tokenizer's"
    )


def read_prompt_groups(namespace: argparse.Namespace) -> dict[str, list[Example]]:
    """The prompts of `--prompt` together, and those of each `--prompts` file, by a short name.

    Raises:
        UserError: a file that cannot be read.
    """
    groups = {}
    if namespace.prompt:
        groups["--prompt"] = [
            _example(text, namespace.chat, "--prompt") for text in namespace.prompt
        ]
    for file in namespace.prompts or []:
        name = Path(file).stem
        groups[file if name in groups else name] = read_prompts(file)
    return groups


def read_given_prompts(namespace: argparse.Namespace, *, stdin: bool = False) -> list[Example]:
    """All the prompts that the options name; with `stdin`, its text where they name none."""
    prompts = [example for group in read_prompt_groups(namespace).values() for example in group]
    if not prompts and stdin and not sys.stdin.isatty():
        prompts = [_example(sys.stdin.read(), namespace.chat, "standard input")]
    return prompts


def _example(text: str, chat: bool, where: str) -> Example:
    if not text.strip():
        raise UserError(f"{where}: the prompt is empty")
    return Example(({"role": "user", "content": text},) if chat else text, "", where)


def make_encoder(namespace: argparse.Namespace, tokenizer) -> Encoder:
    """An encoder with the chat template that the options name.

    Raises:
        UserError: the template cannot be read.
    """
    template = None
    if namespace.chat_template:
        try:
            template = Path(namespace.chat_template).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --chat-template: {error}") from None
    return Encoder(tokenizer, template)


def encode_prompts(model, encoder: Encoder, prompts: Sequence[Example]) -> list[list[int]]:
    """The prompts' token ids.

    Raises:
        UserError: a prompt cannot be encoded, or leaves the model no position for an answer.
    """
    encoded = [encoder.prompt(prompt) for prompt in prompts]
    most = max_positions(model)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if most is not None and len(ids) >= most:
            raise UserError(
                f"{prompt.where}: the prompt has {len(ids)} tokens, and the model takes {most} of "
                "prompt and answer"
            )
    return encoded


def text_of(example: Example) -> str:
    """The prompt as one line of text, for results."""
    return example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]


def route_of_prompts(model, prompts: list[list[int]], pad: int, batch_size: int = 8) -> list:
    """The route of each prompt, in order: [RoutingState of one prompt, ...]."""
    import torch

    import milora

    routes: list = [None] * len(prompts)
    for places, batch in batches(prompts, batch_size, pad):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.no_grad(), milora.record_routing(model) as states:
            model(**batch, use_cache=True)
        for row, place in enumerate(places):
            routes[place] = states[0].select(row)
    return routes


def batches(prompts: Sequence[list[int]], size: int, pad: int) -> Iterator[tuple[list[int], dict]]:
    """Batches of prompts of like length, padded on the left as `generate` wants it.

    Yields: the prompts' places in the input; {"input_ids", "attention_mask"} [rows, length] int64.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        length = max(len(prompts[i]) for i in places)
        ids = torch.full((len(places), length), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(places):
            ids[row, length - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, length - len(prompts[i]) :] = 1
        yield places, {"input_ids": ids, "attention_mask": mask}
