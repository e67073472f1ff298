"""`milora eval`: lm-evaluation-harness tasks, with the candidate answers kept out of the router."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from milora.cli.console import add_json_option, print_table, write_json
from milora.cli.models import add_model_options, load_adapter, load_model, user_errors
from milora.errors import UserError, suggestion

EPILOG = """examples:
  milora eval --model ./llama --adapter ./adapter --tasks boolq,piqa
  milora eval --model ./llama --adapter ./adapter --tasks mine --include-path ./my_tasks --limit 100

A local model and a task on local files make no network call. A task whose data set lives on the
Hugging Face Hub downloads it (pass --download).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, adapter=True)
    parser.add_argument(
        "--tasks", required=True, metavar="A,B", help="task names of lm-evaluation-harness"
    )
    parser.add_argument("--include-path", metavar="DIR", help="folder with task files of your own")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="default: the task's own")
    parser.add_argument("--limit", type=int, metavar="N", help="first N documents of each task")
    parser.add_argument("--batch-size", default="8", metavar="N", help="or auto (default: 8)")
    parser.add_argument("--max-length", type=int, metavar="N", help="default: the model's own")
    parser.add_argument(
        "--answer-room",
        type=int,
        metavar="N",
        help="tokens kept free for answers when a context is cut (default: a quarter, up to 256)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of few-shot choices")
    parser.add_argument(
        "--chat", action="store_true", help="put prompts through the tokenizer's chat template"
    )
    parser.add_argument(
        "--download", action="store_true", help="let tasks download their data sets"
    )
    add_json_option(parser)


def run(namespace: argparse.Namespace) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "milora eval needs lm-evaluation-harness", hint="pip install 'lm_eval>=0.4.13,<0.5'"
        )
    if namespace.include_path and not Path(namespace.include_path).is_dir():
        raise UserError(f"no folder at --include-path {namespace.include_path}")
    batch_size = _batch_size(namespace.batch_size)
    model, tokenizer = load_model(namespace.model, namespace.dtype, namespace.device)
    if namespace.adapter:
        load_adapter(model, namespace.adapter)
    if not namespace.download:
        _datasets_offline()

    import lm_eval
    from lm_eval.tasks import TaskManager

    from milora.integrations.lm_eval import MiLoRALM

    manager = TaskManager(include_path=namespace.include_path)
    tasks = _known_tasks(namespace.tasks, manager)
    with user_errors(ValueError):
        harness = MiLoRALM(
            model,
            tokenizer,
            batch_size=batch_size,
            max_length=namespace.max_length,
            answer_room=namespace.answer_room,
        )
    try:
        report = lm_eval.simple_evaluate(
            model=harness,
            tasks=tasks,
            num_fewshot=namespace.num_fewshot,
            limit=namespace.limit,
            task_manager=manager,
            log_samples=False,
            apply_chat_template=namespace.chat,
            random_seed=namespace.seed,
            numpy_random_seed=namespace.seed,
            torch_random_seed=namespace.seed,
            fewshot_random_seed=namespace.seed,
        )
    except (ConnectionError, FileNotFoundError) as error:
        hint = None if namespace.download else "pass --download if the task's data is on the Hub"
        raise UserError(f"cannot read a task's data: {error}", hint) from error
    result = {"results": _clean(report["results"]), "versions": dict(report["versions"])}
    if namespace.json != "-":
        _print(result["results"])
    write_json(namespace.json, result)
    return 0


def _batch_size(text: str) -> int | str:
    if text == "auto" or text.startswith("auto:"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch-size must be a positive number or auto, got {text!r}")
    return int(text)


def _datasets_offline() -> None:
    import datasets

    from milora.cli.models import go_offline

    go_offline()
    datasets.config.HF_HUB_OFFLINE = True


def _known_tasks(names: str, manager) -> list[str]:
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    known = manager.all_tasks
    for name in tasks:
        if name not in known:
            raise UserError(f"unknown task {name!r}.{suggestion(name, known)}")
    if not tasks:
        raise UserError("--tasks names no task")
    return tasks


def _clean(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{"acc,none": 0.5, "alias": ...} -> {"acc": 0.5}; filters stay where there are several."""
    return {
        task: {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if isinstance(value, int | float)
        }
        for task, values in results.items()
    }


def _print(results: dict[str, dict[str, float]]) -> None:
    rows = []
    for task, values in results.items():
        for metric, value in values.items():
            name, _, rest = metric.partition(",")
            if not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr" + (f",{rest}" if rest else ""))
                shown = "" if error is None else f"{error:.4f}"
                rows.append((task, metric, f"{value:.4f}", shown))
    print_table("lm-evaluation-harness", rows, ("task", "metric", "value", "std. error"))
