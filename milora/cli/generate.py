"""`milora generate`: answer prompts with a trained adapter."""

from __future__ import annotations

import argparse
from typing import Any

from milora.cli.console import add_json_option, note, progress, write_json
from milora.cli.models import add_model_options, load_adapter, load_model, max_positions
from milora.cli.prompts import (
    add_prompt_options,
    batches,
    encode_prompts,
    make_encoder,
    read_given_prompts,
    text_of,
)
from milora.errors import UserError

EPILOG = """examples:
  milora generate --model ./llama --adapter ./adapter --prompt "Name a colour."
  milora generate --model ./llama --adapter ./adapter --prompts questions.jsonl --json answers.json
  echo "Name a colour." | milora generate --model ./llama --adapter ./adapter --chat
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, adapter=True)
    add_prompt_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="default: 1")
    parser.add_argument(
        "--beams", type=int, default=1, metavar="N", help="beam search (default: 1)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")
    parser.add_argument(
        "--routes", action="store_true", help="add the experts that each prompt switched on"
    )
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    for name in ("max_new_tokens", "beams", "batch_size"):
        if getattr(namespace, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if namespace.temperature < 0 or not 0 < namespace.top_p <= 1:
        raise UserError("--temperature must be at least 0, and --top-p in (0, 1]")
    if namespace.routes and not namespace.adapter:
        raise UserError("--routes needs --adapter: the bare model routes nothing")
    prompts = read_given_prompts(namespace, stdin=True)
    if not prompts:
        raise UserError("no prompt: give --prompt, --prompts or standard input")

    import transformers

    transformers.set_seed(namespace.seed)
    model, tokenizer = load_model(namespace.model, namespace.dtype, namespace.device)
    if namespace.adapter:
        load_adapter(model, namespace.adapter)
    encoded = encode_prompts(model, make_encoder(namespace, tokenizer), prompts)
    answers = _answer(model, tokenizer, encoded, namespace)
    for prompt, answer in zip(prompts, answers, strict=True):
        answer["prompt"] = text_of(prompt)
    if namespace.json != "-":
        _print(answers)
    write_json(namespace.json, {"model": namespace.model, "answers": answers})
    return 0


def _answer(model, tokenizer, prompts: list[list[int]], namespace) -> list[dict[str, Any]]:
    from milora.data.collator import pad_token_id

    pad = pad_token_id(tokenizer)
    asked, most = namespace.max_new_tokens, max_positions(model)
    if most is not None and max(map(len, prompts)) + asked > most:
        note(f"the model takes {most} tokens of prompt and answer; answers may be shorter for it")
    options: dict[str, Any] = {
        "num_beams": namespace.beams,
        "do_sample": namespace.temperature > 0,
        "pad_token_id": pad,
    }
    if namespace.temperature > 0:
        options |= {"temperature": namespace.temperature, "top_p": namespace.top_p}
    answers: list[dict[str, Any]] = [{} for _ in prompts]
    with progress("answering", len(prompts)) as bar:
        for places, batch in batches(prompts, namespace.batch_size, pad):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            room = asked if most is None else most - batch["input_ids"].shape[1]
            options["max_new_tokens"] = min(asked, room)
            tokens, state = _generate(model, batch, options, record=namespace.routes)
            new = tokens[:, batch["input_ids"].shape[1] :].tolist()
            for row, place in enumerate(places):
                answers[place] = _result(tokenizer, new[row], state, row)
            bar.advance(bar.task_ids[0], len(places))
    return answers


def _generate(model, batch, options: dict[str, Any], *, record: bool):
    """The generated tokens, and the batch's route if it is to be recorded."""
    if not record:
        return model.generate(**batch, **options), None
    import milora

    with milora.record_routing(model) as states:
        tokens = model.generate(**batch, **options)
    return tokens, states[0]


def _result(tokenizer, new: list[int], state, row: int) -> dict[str, Any]:
    if tokenizer.eos_token_id in new:  # what follows is padding
        new = new[: new.index(tokenizer.eos_token_id) + 1]
    result: dict[str, Any] = {
        "completion": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": len(new),
    }
    if state is not None:
        result["experts"] = [state.active_names(layer, row) for layer in range(len(state.names))]
    return result


def _print(answers: list[dict[str, Any]]) -> None:
    # Not through rich: it would drop control characters from the model's text.
    for number, answer in enumerate(answers, start=1):
        if len(answers) > 1:
            print(f"--- {number}: {answer['prompt']}")
        print(answer["completion"])
        for layer, names in enumerate(answer.get("experts", [])):
            print(f"    block {layer}: {', '.join(names)}")
