"""`milora merge`: several adapters into one ordinary LoRA."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from milora.cli.console import add_json_option, note, writable_folder, write_json
from milora.cli.models import is_local, meta_model, user_errors
from milora.errors import UserError

METHOD_NAMES = ("stack", "sum", "svd", "ffa", "fair", "lego")

EPILOG = """methods:
  stack  the exact weighted sum; ranks add up (FLoRA)
  sum    the same at the smallest rank that holds it
  svd    its best approximation of --rank
  ffa    the mean of B, for adapters that share A (FFA-LoRA); exact
  fair   the means of A and B, corrected towards the mean update (LoRA-FAIR)
  lego   --rank clusters of the adapters' rank-one units (LoRA-LEGO)

Adapters need no router: of one that has, export a route first. The result is a LoRA that
milora, PEFT and other engines load.

examples:
  milora merge ./maths ./law --output ./both
  milora merge ./maths ./law ./code --method svd --rank 16 --weights 0.5 0.3 0.2 --output ./all
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapters", metavar="ADAPTER", nargs="+", help="folders of adapters without a router"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the new adapter")
    parser.add_argument("--method", choices=METHOD_NAMES, default="stack", help="default: stack")
    parser.add_argument(
        "--weights",
        metavar="X",
        nargs="+",
        type=float,
        help="one number an adapter (default: 1 / their number each; lego: 1 each)",
    )
    parser.add_argument(
        "--rank", metavar="R", type=int, help="of svd and lego (default: the adapters' largest)"
    )
    parser.add_argument("--regularization", metavar="X", type=float, help="of fair (default: 0.01)")
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="folder of the base model, for expert kinds other than lora; only its config is read",
    )
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    output = Path(namespace.output)
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty")
    for adapter in namespace.adapters:
        if not Path(adapter).is_dir():
            raise UserError(f"no adapter folder at {adapter}")
    options = {}
    if namespace.regularization is not None:
        options["regularization"] = namespace.regularization
    if namespace.model is not None and not is_local(namespace.model):
        raise UserError(f"no model folder at {namespace.model}")

    from milora.merge import merge

    model = None if namespace.model is None else meta_model(namespace.model)
    with writable_folder(output), user_errors(FileNotFoundError, ValueError):
        report = merge(
            namespace.adapters,
            output,
            namespace.method,
            namespace.weights,
            rank=namespace.rank,
            model=model,
            **options,
        )
    ranks = sorted(Counter(report.ranks.values()).items())
    listed = ", ".join(f"{count} of rank {rank}" for rank, count in ranks)
    note(f"{len(report.ranks)} modules written to {output}: {listed}")
    note(f"distance from the exact weighted sum: {report.error:.2e} of its norm")
    write_json(
        namespace.json,
        {
            "output": str(output),
            "method": namespace.method,
            "error": report.error,
            "ranks": report.ranks,
        },
    )
    return 0
