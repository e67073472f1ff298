"""The `milora` command: parses, runs one command, turns errors into messages and exit codes.

Exit codes: 0 done; 2 the user's mistake (the message says which); 130 stopped by Ctrl-C;
1 anything else, with a traceback under `--debug`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from milora.errors import UserError

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

# name -> (module with add_arguments(parser) and run(namespace) -> int, one line of help)
COMMANDS = {
    "demo": (
        "milora.demo",
        "train and compare on text that ships with Python, in minutes, on a CPU",
    ),
    "train": ("milora.cli.train", "fine-tune a model on a JSONL file"),
    "generate": ("milora.cli.generate", "answer prompts with a trained adapter"),
    "inspect": ("milora.cli.inspect", "show an adapter's size, and draw where prompts are routed"),
    "export": ("milora.cli.export", "write one prompt's route as an ordinary LoRA adapter"),
    "methods": ("milora.cli.methods", "list the expert kinds and what they would train"),
    "merge": ("milora.cli.merge", "merge adapters into one ordinary LoRA adapter"),
    "eval": ("milora.cli.eval", "run lm-evaluation-harness tasks"),
    "bench": ("milora.cli.bench", "time ops and mixed batches beside PEFT and plain torch"),
}

EPILOG = """examples:
  milora demo
  milora train --model ./llama --data train.jsonl --output ./adapter
  milora generate --model ./llama --adapter ./adapter --prompt "Name a colour."
  milora inspect ./adapter
"""

OPTIONAL = ("accelerate", "matplotlib", "psutil", "rich", "transformers")  # of milora[cli]
DEMO_EPILOG = """examples:
  milora demo                             (a few minutes on two cores)
  milora demo --json demo.json --out demo
"""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser. Only `command`'s own options are built: the others would import their modules."""
    from milora._version import __version__

    parser = argparse.ArgumentParser(
        prog="milora",
        description="MiLoRA: prompt-routed mixtures of low-rank experts (arXiv 2410.18035).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"milora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        module = importlib.import_module(module_name) if name == command else None
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=getattr(module, "EPILOG", DEMO_EPILOG if name == "demo" else None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if module is not None:
            module.add_arguments(sub)
            sub.add_argument("--debug", action="store_true", help="show tracebacks")
            sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        command = next((word for word in argv if not word.startswith("-")), None)
        namespace = build_parser(command).parse_args(argv)
        _check_json_target(getattr(namespace, "json", None))
        return namespace.run(namespace)
    except SystemExit as stop:  # argparse: --help and its own complaints
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    except KeyboardInterrupt:
        print("\nmilora: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"milora: error: {error}", file=sys.stderr)
        if error.hint:
            print(f"milora: hint: {error.hint}", file=sys.stderr)
        return EXIT_USAGE
    except BrokenPipeError:  # `milora ... | head`: the reader left, which is no failure
        sys.stderr.close()
        return EXIT_OK
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in OPTIONAL:
            return _report_failure(error, debug)
        print(f"milora: error: this command needs {error.name}", file=sys.stderr)
        print("milora: hint: pip install 'milora[cli]'", file=sys.stderr)
        return EXIT_USAGE
    except Exception as error:
        return _report_failure(error, debug)


def _check_json_target(target: str | None) -> None:
    if target in (None, "-"):
        return
    from milora.cli.console import check_writable_file

    check_writable_file(Path(target))


def _report_failure(error: Exception, debug: bool) -> int:
    from milora.cli.memory import out_of_disk, out_of_memory

    if debug:
        traceback.print_exc()
    if out_of_disk(error):
        print("milora: error: a file could not be written: the disk is full", file=sys.stderr)
        return EXIT_USAGE
    if out_of_memory(error):
        print(
            "milora: error: out of memory; use a smaller --batch-size or --max-length, "
            "--gradient-checkpointing, or a smaller model",
            file=sys.stderr,
        )
        return EXIT_USAGE
    print(f"milora: internal error: {type(error).__name__}: {error}", file=sys.stderr)
    if not debug:
        print("milora: hint: run again with --debug for the traceback", file=sys.stderr)
    return EXIT_FAILURE
