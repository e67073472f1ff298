"""lm-evaluation-harness: candidate answers, their lengths and padding stay out of the router."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from text_model import save_tiny_model, tiny_llama, write_jsonl

import milora
from milora.cli import main
from milora.cli.models import load_model

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> SimpleNamespace:
    """A model folder, and an adapter whose experts and router do something."""
    root = tmp_path_factory.mktemp("lm_eval")
    path = save_tiny_model(root / "model")
    model = milora.attach(tiny_llama(), milora.MiLoRAConfig(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("w_r"):
                parameter.normal_(std=0.2)
    milora.save(model, root / "adapter")
    return SimpleNamespace(model=path, adapter=str(root / "adapter"))


def attached(home):
    model, tokenizer = load_model(home.model, device="cpu")
    return milora.load(model, home.adapter), tokenizer


def run_json(capsys, argv: list[str]) -> dict:
    capsys.readouterr()
    assert main([*argv, "--json", "-"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{choices}
metric_list: [{{metric: {metric}}}]
"""
LONG = "a question that is far too long for this model, which has room for few tokens: x"
QUESTIONS = ["2+2=", "is it late?", LONG, "name it:"]
CANDIDATES = {"one": ["yes", "no"], "two": ["a longer one", "x", "another"]}


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """Two multiple-choice tasks, of the same questions with other answers; and a rolling one."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, choices in CANDIDATES.items():
        rows = [{"question": q, "choices": choices, "answer": 0} for q in QUESTIONS]
        text = TASK.format(
            name=name, data=write_jsonl(tmp_path / f"{name}.jsonl", rows), kind="multiple_choice",
            target="answer", choices='doc_to_choice: "{{choices}}"', metric="acc",
        )  # fmt: skip
        (folder / f"{name}.yaml").write_text(text)
    rows = [{"question": "", "text": "some running text"}, {"question": "", "text": "more " * 30}]
    text = TASK.format(
        name="rolling", data=write_jsonl(tmp_path / "rolling.jsonl", rows), choices="",
        kind="loglikelihood_rolling", target='"{{text}}"', metric="word_perplexity",
    )  # fmt: skip
    (folder / "rolling.yaml").write_text(text)
    return folder


def _routes(home, tasks: Path, name: str, **options) -> dict[tuple[int, ...], torch.Tensor]:
    """Evaluate a task; the gates of each context that a forward saw, by its tokens."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from milora.integrations.lm_eval import MiLoRALM

    model, tokenizer = attached(home)
    harness = MiLoRALM(model, tokenizer, batch_size=3, max_length=48, **options)
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    call = harness._model_call

    def watched(inps, *args, **kwargs):
        with milora.record_routing(model) as states:
            logits = call(inps, *args, **kwargs)
        for row, length in enumerate(states[0].prompt_lengths.tolist()):
            seen[tuple(inps[row, :length].tolist())] = states[0].gates[:, row]
        return logits

    harness._model_call = watched
    lm_eval.simple_evaluate(
        model=harness, tasks=[name], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )  # fmt: skip
    return seen


def test_another_candidate_answer_never_changes_a_route(home, tasks):
    first, second = _routes(home, tasks, "one"), _routes(home, tasks, "two")
    assert set(first) == set(second) and len(first) == len(QUESTIONS)
    for context, gates in first.items():
        assert torch.equal(gates > 0, second[context] > 0)
        # Equal but for the base's own rounding, which changes with the padded length.
        torch.testing.assert_close(gates, second[context], rtol=1e-4, atol=1e-6)
    tokenizer = load_model(home.model, device="cpu")[1]
    long = tokenizer(LONG)["input_ids"]
    assert tuple(long[-36:]) in first  # 48 less a quarter, whatever the answers' lengths


def test_rolling_perplexity_routes_on_what_is_not_scored(home, tasks):
    contexts = set(_routes(home, tasks, "rolling"))
    assert (1,) in contexts  # <s>, the prefix of each first window
    # 150 tokens in windows of 48: the last one scores 6, behind 48 - 6 + 1 that were scored before.
    assert {len(context) for context in contexts} == {1, 43}


def test_without_our_subclass_the_harness_is_refused(home, tasks):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = attached(home)
    harness = HFLM(pretrained=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="prompt_lengths"):
        harness._loglikelihood_tokens([(("a", "b"), [5, 6], [7])])


def test_an_answer_without_room_and_a_changed_order_are_errors(home, tasks):
    from milora.integrations.lm_eval import MiLoRALM

    model, tokenizer = attached(home)
    harness = MiLoRALM(model, tokenizer, max_length=32, answer_room=4)
    with pytest.raises(ValueError, match="an answer of 9 tokens does not fit behind its context"):
        harness._loglikelihood_tokens([(("a", "b"), [5] * 40, [7] * 9)])
    with (
        harness._expecting([(None, [5, 6], [7])]),
        pytest.raises(RuntimeError, match="another order"),
    ):
        harness._model_call(torch.tensor([[9, 9]]))
    with pytest.raises(ValueError, match=r"answer_room must be in \[1, 31\], got 32"):
        MiLoRALM(model, tokenizer, max_length=32, answer_room=32)


def test_eval_command(home, tasks, capsys):
    argv = ["eval", "--model", home.model, "--adapter", home.adapter]
    argv += ["--tasks", "one,two", "--include-path", str(tasks), "--max-length", "48"]
    results = run_json(capsys, argv)["results"]
    assert set(results) == {"one", "two"} and 0 <= results["one"]["acc"] <= 1
    assert main([*argv, "--limit", "2", "--batch-size", "auto"]) == 0
    assert "acc" in capsys.readouterr().out
    for extra, message in {
        ("--tasks", "onee"): "unknown task 'onee'. Did you mean one",
        ("--include-path", "/nowhere"): "no folder at --include-path /nowhere",
        ("--answer-room", "2"): "tokens does not fit behind its context of 46 tokens",
        ("--batch-size", "many"): "--batch-size must be a positive number or auto, got 'many'",
    }.items():
        assert main([*argv, *extra]) == 2
        assert message in capsys.readouterr().err


def test_eval_without_the_harness_says_how_to_get_it(home, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None)
    assert main(["eval", "--model", home.model, "--tasks", "x"]) == 2
    assert "pip install 'lm_eval" in capsys.readouterr().err
