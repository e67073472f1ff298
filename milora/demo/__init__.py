"""`milora demo`: MiLoRA against LoRA and a per-token mixture, on real text, in minutes on a CPU."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `milora demo` to `parser`."""
    parser.add_argument("--json", metavar="FILE", help="write the results to FILE; - is stdout")
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="milora-demo",
        help="folder for the adapter and the routing heat map (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="folder of the pre-trained base (default: $MILORA_CACHE, else the user's cache)",
    )
    parser.add_argument("--no-cache", action="store_true", help="pre-train the base anew")
    parser.add_argument("--steps", type=int, metavar="N", help="fine-tuning steps of each method")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of tasks and adapters (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of every stage; its numbers mean nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo; see `milora.demo.command.run`."""
    # Imported here: `milora --help` asks for the options and should not wait for transformers.
    from milora.demo.command import run

    return run(options)
