"""`milora export`: one prompt's route as an ordinary PEFT adapter, for engines without a router."""

from __future__ import annotations

import argparse
from pathlib import Path

from milora.cli.console import add_json_option, note, writable_folder, write_json
from milora.cli.models import add_model_options, load_adapter, load_model, user_errors
from milora.cli.prompts import (
    add_prompt_options,
    encode_prompts,
    make_encoder,
    read_given_prompts,
    route_of_prompts,
)
from milora.errors import UserError

EPILOG = """A route that is fixed is exactly an ordinary LoRA (a DoRA with DoRA experts): the gates
go into its weights, and modules that are off are left out. It answers other prompts with
this prompt's route, so choose a prompt that stands for the use.

examples:
  milora export ./adapter --model ./llama --prompt "Translate: " --output ./lora
  milora export ./adapter --model ./llama --route route.safetensors --output ./lora
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder that `milora train` wrote")
    add_model_options(parser, adapter=False)
    add_prompt_options(parser)
    parser.add_argument(
        "--route", metavar="FILE", help="a route that RoutingState.save wrote, instead of a prompt"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the new adapter")
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    prompts = read_given_prompts(namespace)
    if len(prompts) + bool(namespace.route) != 1:
        raise UserError("give exactly one prompt, or --route")
    output = Path(namespace.output)
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty")

    import milora
    from milora.routing import RoutingState

    with user_errors(FileNotFoundError, ValueError):
        state = RoutingState.load(namespace.route) if namespace.route else None
    model, tokenizer = load_model(namespace.model, namespace.dtype, namespace.device)
    load_adapter(model, namespace.adapter)
    if state is None:
        ids = encode_prompts(model, make_encoder(namespace, tokenizer), prompts)
        state = route_of_prompts(model, ids, pad=0)[0]
    with writable_folder(output), user_errors(ValueError):
        milora.export_route(model, state, output)
    layers = range(len(state.names))
    experts = {state.blocks[layer]: list(state.active_names(layer)) for layer in layers}
    note(f"{sum(map(len, experts.values()))} modules written to {output}")
    write_json(namespace.json, {"output": str(output), "experts": experts})
    return 0
