"""Reading JSONL: one prompt with its answer a line; an error names the file and the line.

Two forms, told apart by their keys:
    {"prompt": "2+2=", "completion": "4"}
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from milora.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, both text or both chat messages, and where it was read.

    Args:
        prompt: text, or the messages before the answer.
        completion: text, or the one assistant message that answers. Empty for a bare prompt.
        where: "file:line", for errors that are found later.
    """

    prompt: str | tuple[Message, ...]
    completion: str | Message
    where: str


def read_examples(path: str | Path) -> list[Example]:
    """Read training examples. A chat gives one example per assistant turn, since MiLoRA routes
    an answer on everything that precedes it.

    Raises:
        UserError: the file is missing, empty or not UTF-8, or a line does not fit.
    """
    examples: list[Example] = []
    for where, record in _records(path):
        if "messages" in record:
            examples.extend(_chat_examples(record["messages"], where))
        elif "prompt" in record and "completion" in record:
            prompt = _text(record, "prompt", where)
            examples.append(Example(prompt, _text(record, "completion", where), where))
        else:
            raise UserError(
                f"{where}: expected the keys 'prompt' and 'completion', or 'messages', "
                f"got {sorted(record)}"
            )
    if not examples:
        raise UserError(f"{path}: no example in this file")
    return examples


def read_prompts(path: str | Path) -> list[Example]:
    """Read prompts to answer: {"prompt": ...} or {"messages": [...]}; answers are ignored.

    Raises:
        UserError: as in `read_examples`.
    """
    prompts: list[Example] = []
    for where, record in _records(path):
        if "messages" in record:
            messages = _messages(record["messages"], where)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise UserError(f"{where}: 'messages' holds no turn before the assistant's")
            prompts.append(Example(tuple(messages), {}, where))
        elif "prompt" in record:
            prompts.append(Example(_text(record, "prompt", where), "", where))
        else:
            raise UserError(f"{where}: expected 'prompt' or 'messages', got {sorted(record)}")
    if not prompts:
        raise UserError(f"{path}: no prompt in this file")
    return prompts


def _records(path: str | Path) -> Iterator[tuple[str, dict]]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 ({error.reason})") from None
            if not line:
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: not valid JSON: {error.msg} at column {error.colno}"
                ) from None
            except RecursionError:
                raise UserError(f"{where}: not valid JSON: nested too deeply") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield where, record


def _text(record: dict, key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: '{key}' must be a string, got {type(value).__name__}")
    if not value:
        raise UserError(f"{where}: '{key}' is empty")
    return value


def _messages(value: object, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: 'messages' must be a non-empty list")
    messages = []
    for position, message in enumerate(value):
        at = f"{where}: messages[{position}]"
        if not isinstance(message, dict):
            raise UserError(f"{at} must be an object, got {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{at}: 'role' must be one of {', '.join(ROLES)}, got {role!r}")
        if not isinstance(content, str):
            raise UserError(f"{at}: 'content' must be a string, got {type(content).__name__}")
        messages.append({"role": role, "content": content})
    return messages


def _chat_examples(value: object, where: str) -> list[Example]:
    messages = _messages(value, where)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if not answers:
        raise UserError(f"{where}: 'messages' holds no assistant turn that answers something")
    return [Example(tuple(messages[:i]), messages[i], where) for i in answers]
