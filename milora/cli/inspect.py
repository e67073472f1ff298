"""`milora inspect`: what an adapter is, how large, and where it routes prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from milora.cli.adapter_size import read_size
from milora.cli.console import add_json_option, note, print_table, write_json
from milora.cli.models import load_adapter, load_model
from milora.cli.prompts import (
    add_prompt_options,
    encode_prompts,
    make_encoder,
    read_prompt_groups,
    route_of_prompts,
)
from milora.errors import UserError

EPILOG = """examples:
  milora inspect ./adapter
  milora inspect ./adapter --model ./llama --prompts maths.jsonl --prompts law.jsonl
      draws one heat map a file, blocks x experts: the share of its prompts that switch each on
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder that `milora train` wrote")
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="base model, needed with prompts (default: the one that the adapter names)",
    )
    parser.add_argument("--dtype", default="auto", help="of the base model (default: its own)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: auto)")
    add_prompt_options(parser)
    parser.add_argument(
        "--plot", metavar="FILE", default="routing.png", help="heat map (default: routing.png)"
    )
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    groups = read_prompt_groups(namespace)
    if groups:
        from milora.cli.plots import check_plot_file

        check_plot_file(Path(namespace.plot))
    size = read_size(Path(namespace.adapter))
    result: dict[str, Any] = size.to_dict()
    if namespace.json != "-":
        _print_size(size)
    if groups:
        base = namespace.model or _named_base(size.config)
        result["routing"] = _draw_routing(base, groups, namespace)
        result["plot"] = namespace.plot
        note(f"heat map drawn in {namespace.plot}")
    write_json(namespace.json, result)
    return 0


def _named_base(config: dict[str, Any]) -> str:
    """The base model that the adapter names, if it is here: only the user asks for a download."""
    base = config.get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise UserError(f"--model is required: the adapter's base model is {base or 'not named'}")
    return base


def _print_size(size) -> None:
    config = size.config
    rows = [(name, f"{config[name]}") for name in _SHOWN if name in config]
    rows += [
        ("blocks", f"{len(size.blocks)}"),
        ("experts per block", size.experts_per_block),
        ("parameters", f"{size.total:,}"),
        ("  of experts", f"{size.experts:,}"),
        ("  of routers", f"{size.router:,}"),
        ("  of poolers", f"{size.pooler:,}"),
        ("  of activations", f"{size.activation:,}"),
        ("fixed numbers, never trained", f"{size.fixed:,}"),
        ("activated for a prompt, at most", f"{size.activated:,}"),
        ("activated for a prompt, mean", f"{size.activated_mean:,.0f}"),
    ]
    if not size.fixed:
        rows = [row for row in rows if not row[0].startswith("fixed")]
    print_table(size.folder, rows, ("", ""), show_header=False)


_SHOWN = (
    "base_model_name_or_path",
    "expert",
    "rank",
    "r",
    "alpha",
    "lora_alpha",
    "top_k",
    "router",
    "pooler",
    "activation",
    "gate",
    "router_norm",
)


def _draw_routing(base: str, groups: dict[str, list], namespace) -> dict[str, Any]:
    """Route every prompt, draw a heat map for each group, and return the shares behind it."""
    from milora.cli.plots import draw_routing
    from milora.data.collator import pad_token_id
    from milora.train.metrics import short_names

    model, tokenizer = load_model(base, namespace.dtype, namespace.device)
    load_adapter(model, namespace.adapter)
    encoder = make_encoder(namespace, tokenizer)
    panels, shares = [], {}
    for name, prompts in groups.items():
        ids = encode_prompts(model, encoder, prompts)
        routes = route_of_prompts(model, ids, pad_token_id(tokenizer))
        values = sum(route.gates[:, 0] > 0 for route in routes).float() / len(routes)
        shares[name] = {
            block: dict(zip(experts, row.tolist(), strict=False))
            for block, experts, row in zip(routes[0].blocks, routes[0].names, values, strict=True)
        }
        widest = max(routes[0].names, key=len)
        title = f"{name} ({len(prompts)} prompts)"
        panels.append((title, values.tolist(), list(short_names(widest).values())))
    draw_routing(Path(namespace.plot), panels)
    return shares
