"""The quality bench: what is held out is held out, budgets are equal, runs resume, reports follow.

The end-to-end run is of a model that learns nothing; no test looks at a score.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from text_model import save_tiny_model, write_jsonl

import milora
from milora.cli import main as milora_command
from milora.demo.base import build_model
from milora.demo.evaluate import prompt_of

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))
pytest.importorskip("peft")

from quality import compare, plan, report, run  # noqa: E402
from quality.evaluate import score  # noqa: E402
from quality.experiment import Experiment  # noqa: E402
from quality.lines import LAST_METRIC, Writer, read  # noqa: E402
from quality.methods import BASE, METHODS, attach, budget_of  # noqa: E402
from quality.presets import PRESETS  # noqa: E402
from quality.simple_forms import all_templates, pretraining_examples  # noqa: E402
from quality.tasks import SPLITS, TASK_NAMES, TASKS, examples, mixed  # noqa: E402
from quality.words import make_tokenizer, tokens_of  # noqa: E402

TINY = PRESETS["tiny"]


def small_base(preset: str) -> torch.nn.Module:
    """Without memory for its weights: only shapes are counted."""
    tokenizer = make_tokenizer(all_templates())
    with torch.device("meta"):
        return build_model(PRESETS[preset].base, tokenizer)


# ---- tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=TASK_NAMES)
def test_values_and_templates_of_the_splits_are_disjoint(task):
    rng = random.Random(1)
    keys = {split: {task.draw_from(split, rng).key for _ in range(400)} for split in SPLITS}
    assert keys["train"].isdisjoint(keys["dev"] | keys["test"])
    assert keys["dev"].isdisjoint(keys["test"])
    assert set(task.templates_of("train")).isdisjoint(task.templates_of("test"))
    assert task.templates_of("train") == task.templates_of("dev") == task.templates_of("test_seen")
    assert len(set(task.templates)) == len(task.templates)


def test_prompts_of_the_splits_are_disjoint_and_held_out_prompts_do_not_repeat():
    prompts = {
        split: [e.prompt for e in mixed(TASK_NAMES, split, 8 * 60, seed=3)] for split in SPLITS
    }
    for split in ("dev", "test_seen", "test"):
        assert len(set(prompts[split])) == len(prompts[split])
        assert set(prompts[split]).isdisjoint(prompts["train"])
    assert set(prompts["test"]).isdisjoint(prompts["test_seen"])


def test_the_base_is_taught_none_of_the_tasks():
    taught = {e.prompt for e in pretraining_examples(4000, seed=0)}
    asked = {e.prompt for split in SPLITS for e in mixed(TASK_NAMES, split, 800, seed=0)}
    assert taught.isdisjoint(asked)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("last digit of 58 plus 67 :", "5"),
        ("rotate ABCD :", "BCDA"),
        ("sort 394 down :", "943"),
        ("march 14 plus 5 days :", "march 19"),
        ("37 km in m :", "37000"),
        ("37000 m in km :", "37"),
        ("close ( if [ ] :", "fi )"),
        ("ann 3 red ; bob 7 blue ; cat 1 pink ; color of 7 :", "blue"),
        ("bob likes cat ; ann likes bob ; cat likes dan ; two steps from ann :", "cat"),
    ],
)
def test_rules_give_the_answer_that_a_person_would(prompt, answer):
    """Checked by an independent reading of the prompt, and on real draws of the same task."""
    assert solve(prompt) == answer


@pytest.mark.parametrize("task", TASKS, ids=TASK_NAMES)
def test_every_answer_is_right(task):
    for split in SPLITS:
        for example in examples(task, split, 40, seed=5):
            assert solve(example.prompt) == example.completion, example


def solve(prompt: str) -> str:
    """Answers any prompt of the eight tasks, written apart from the rules that make them."""
    words = tokens_of(prompt.removesuffix(" :"))
    text = prompt.removesuffix(" :")
    numbers = [word for word in text.replace(",", " ").split() if word.isdigit()]
    if "likes" in words:
        pairs = text.replace(";", " ").replace(",", " ").split()
        likes = {a: c for a, b, c in zip(pairs, pairs[1:], pairs[2:], strict=False) if b == "likes"}
        rest = [w for w in text.split() if w in likes or w in likes.values()]
        start = next(n for n in set(rest) if rest.count(n) != text.count(f"{n} likes")
                     + text.count(f"likes {n}"))  # fmt: skip
        return likes[likes[start]]
    if "color" in words:
        number = next(n for n in numbers if numbers.count(n) == 2)
        rows = text.replace(";", " ").replace(",", " ").split()
        return next(rows[i + 1] for i, w in enumerate(rows[:-1]) if w == number
                    and rows[i + 1] in COLOR_WORDS)  # fmt: skip
    if "digit" in words:
        return str(sum(map(int, numbers)))[-1]
    if "days" in words:
        month = next(w for w in words if w in MONTH_WORDS)
        return f"{month} {sum(map(int, numbers))}"
    if any(w.isupper() for w in words):
        string = next(w for w in text.split() if w.isupper())
        return string[1:] + string[:1]
    if set("([{") & set(text) or {"if", "do", "case"} & set(words):
        closer, waiting = dict(zip("([{", ")]}", strict=True)), []
        closer |= {"if": "fi", "do": "done", "case": "esac"}
        for word in words:
            if word in closer:
                waiting.append(closer[word])
            elif word in closer.values():
                assert waiting.pop() == word
        return " ".join(reversed(waiting))
    if {"sort", "order", "high"} & set(words):
        return "".join(sorted(numbers[0], reverse=True))
    factors = {"mm": 1, "cm": 10, "dm": 100, "m": 1000, "km": 10**6, "grams": 1, "kg": 1000,
               "tons": 10**6, "ares": 1, "ha": 100, "cents": 1, "euro": 100}  # fmt: skip
    place = text.split().index(numbers[0])
    given = text.split()[place + 1]
    wanted = next(w for w in words if w in factors and w != given)
    return str(int(numbers[0]) * factors[given] // factors[wanted])


COLOR_WORDS = ("red", "blue", "green", "black", "white", "gray", "pink", "gold")
MONTH_WORDS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
)  # fmt: skip


def test_more_examples_than_there_are_values_are_refused():
    with pytest.raises(ValueError, match=r"date has only \d+ values for dev, got 1000"):
        examples(TASKS[TASK_NAMES.index("date")], "dev", 1000, seed=0)


# ---- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["cpu-small", "gpu"])
@pytest.mark.parametrize("method", METHODS)
def test_budgets_agree_within_two_percent(method, preset):
    base = small_base(preset)
    budget = budget_of(base, PRESETS[preset].rank)
    attached = attach(base, method, PRESETS[preset].rank, seed=0, steps=100)
    assert attached.trainable == pytest.approx(budget, rel=0.02)
    assert 0 < attached.activated <= attached.trainable


@pytest.mark.parametrize("preset", ["cpu-small", "gpu"])
def test_controls_have_the_sizes_that_their_names_say(preset):
    rank, sizes = PRESETS[preset].rank, {}
    for name, (method, changes) in plan.controls().items():
        sizes[name] = attach(small_base(preset), method, rank, seed=0, steps=100, **changes)
    milora_ = sizes["MiLoRA"]
    same = sizes["LoRA, as many as MiLoRA activates"]
    assert same.activated == same.trainable == pytest.approx(milora_.activated, rel=0.02)
    whole = sizes["MiLoRA, hard gate, top_k 7"]
    assert whole.activated == whole.trainable == milora_.trainable
    fixed = sizes["MiLoRA, hard gate, router untrained"]
    assert 0.9 * milora_.trainable < fixed.trainable < milora_.trainable
    assert not [n for n, p in fixed.model.named_parameters() if "router" in n and p.requires_grad]


def test_a_method_without_that_option_is_refused():
    with pytest.raises(ValueError, match="MOELoRA takes no changes"):
        attach(small_base("tiny"), "MOELoRA", 2, 0, 10, gate="hard")
    with pytest.raises(ValueError, match="method must be one of"):
        attach(small_base("tiny"), "none", 2, 0, 10)


# ---- scores -----------------------------------------------------------------------------------


def test_exact_match_is_what_generate_would_say(tmp_path):
    """Answers that the model itself gave, every other one with its last token changed."""
    experiment = Experiment(TINY, tmp_path, "cpu")
    model = milora.attach(experiment.base.model, milora.MiLoRAConfig(rank=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith("w_r"):
                parameter.normal_(std=0.5)
    rows = experiment.encode(mixed(TASK_NAMES, "test", 32, seed=0))
    for number, row in enumerate(rows):
        prompt, length = prompt_of(row), 1 + number % 4
        said = model.generate(
            torch.tensor([prompt]), max_new_tokens=length, min_new_tokens=length, do_sample=False
        )
        answer = said[0, len(prompt) :].tolist()
        answer[-1] = (answer[-1] + number % 2) % len(experiment.base.tokenizer)
        row.update(input_ids=prompt + answer, labels=[-100] * len(prompt) + answer)
    assert score(model, rows, experiment.collate, "cpu").exact_match == 0.5


# ---- comparisons ------------------------------------------------------------------------------


def test_a_paired_comparison():
    found = compare.paired({0: 3.0, 1: 5.0, 2: 4.0, 7: 9.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert (found.mean, found.up, found.down, found.num_seeds) == (2.0, 3, 0, 3)
    assert found.low >= 1.0 and found.high <= 3.0 and found.direction == 1
    assert found.sign_p == 0.25
    assert compare.paired({0: 1.0, 1: 0.0}, {0: 0.0, 1: 1.0}).direction == 0
    assert compare.sign_test(6, 0) == 2**-5 and compare.sign_test(0, 0) == 1.0
    with pytest.raises(ValueError, match="share a seed"):
        compare.paired({0: 1.0}, {1: 1.0})


# ---- lines, resuming, report ------------------------------------------------------------------


def record(**changes) -> dict:
    common = {"preset": "tiny", "stage": "grid", "method": "LoRA", "trained_on": "all",
              "setting": "lr=0.002", "seed": 0, "task": "mean", "learning_rate": 0.002}  # fmt: skip
    return {**common, "metric": LAST_METRIC, "value": 1.0, **changes}


def test_only_whole_runs_count_and_a_cut_off_line_is_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    Writer(path, {}).add([record(metric="dev/loss"), record()])
    Writer(path, {}).add([record(seed=1, metric="dev/loss")])  # interrupted before its last line
    with path.open("a") as file:
        file.write('{"preset": "ti')
    assert {r["seed"] for r in read([path])} == {0}
    Writer(path, {}).add([record(seed=2)])
    assert {r["seed"] for r in read([path])} == {0, 2}
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match=r"lines\.jsonl:1: not valid JSON"):
        read([path])


def test_later_stages_ask_for_the_grid():
    rates = (0.1, 0.2)
    losses = {"metric": "dev/loss"}
    records = [
        record(method=m, learning_rate=r, value=abs(r - 0.2), **losses)
        for m in METHODS
        for r in rates
    ]
    assert run.best_rates(records) == dict.fromkeys(METHODS, 0.2)
    with pytest.raises(ValueError, match="--stage grid first"):
        run.best_rates(records[:2])


def test_every_run_of_a_preset_has_a_key_of_its_own():
    for preset in PRESETS.values():
        best = dict.fromkeys(METHODS, preset.learning_rates[0])
        runs = [
            *plan.grid_runs(preset), *plan.main_runs(preset, best),
            *plan.ablation_runs(preset, best), *plan.routing_runs(preset, best),
        ]  # fmt: skip
        assert len({one.key() for one in runs}) == len(runs)
        assert BASE in {one.method for one in runs}


def run_script(*arguments: object) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_stages_end_to_end_then_nothing_is_repeated_then_a_report(tmp_path, capsys):
    lines = tmp_path / "results" / "tiny.jsonl"
    options = ["--preset", "tiny", "--json", str(lines), "--cache", str(tmp_path / "cache")]
    assert run.main(options) == 0
    written = lines.read_text()
    capsys.readouterr()
    assert run.main(options) == 0
    assert lines.read_text() == written
    assert capsys.readouterr().out.count(": 0 runs") == len(plan.STAGES)

    fields = {"preset", "stage", "method", "trained_on", "setting", "seed", "task", "metric",
              "value", "trainable", "activated", "hardware", "versions", "commit",
              "date"}  # fmt: skip
    assert all(fields <= set(json.loads(line)) for line in written.splitlines())

    assert report.main(["--results", str(lines.parent), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    for heading in ("wins, ties and loses", "By task", "Where the difference", "Ablations",
                    "What the routers do"):  # fmt: skip
        assert heading in text
    for method in METHODS:
        assert f"| {method} |" in text
    for picture in ("methods", "ablations", "entropy", "experts"):
        assert (tmp_path / "plots" / f"tiny-{picture}.png").stat().st_size > 1000


@pytest.mark.slow
def test_two_processes_and_one_writer(tmp_path):
    lines = tmp_path / "tiny.jsonl"
    options = ["--preset", "tiny", "--json", lines, "--cache", tmp_path / "cache"]
    run_script(BENCH / "quality/run.py", *options, "--jobs", 2, "--stage", "grid")
    assert {r["method"] for r in read([lines])} == set(METHODS)


# ---- the paper's tables -----------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {train}, test: {test}}}}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
@pytest.mark.parametrize("table", [1, 2, 3])
def test_the_recipe_of_the_papers_tables_runs(table, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    for name in ("one", "two"):
        rows = [{"question": f"{name} {i}:", "choices": ["yes", "no"], "answer": i % 2}
                for i in range(24)]  # fmt: skip
        text = TASK.format(
            name=name,
            train=write_jsonl(tmp_path / f"{name}.train", rows),
            test=write_jsonl(tmp_path / f"{name}.test", rows[:4]),
        )
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    paper, common = paper_scripts(monkeypatch), ["--tasks", "one,two", "--include-path"]
    common.append(str(tmp_path / "tasks"))
    data, out = tmp_path / "data", tmp_path / "out"
    assert paper.prepare.main(["--data", str(data), *common]) == 0
    first = json.loads((data / "one.train.jsonl").read_text().splitlines()[0])
    assert first["prompt"].startswith("one ") and first["completion"] in (" yes", " no")

    command = ["--table", str(table), "--model", model, "--data", str(data), "--output", str(out)]
    command += ["--seeds", "0", "--methods", "LoRA", "MiLoRA", *common]
    command += ["--train", "--max-steps 2 --batch-size 2 --no-plot --dtype float32"]
    assert paper.run.main(command) == 0
    scores = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {(s["method"], s["task"]) for s in scores} == {
        (m, t) for m in ("LoRA", "MiLoRA") for t in ("one", "two")
    }
    assert "| MiLoRA |" in (out / f"table{table}.md").read_text()
    paper.run.milora = None  # all is there already: no command may run
    assert paper.run.main(command) == 0


def paper_scripts(monkeypatch) -> SimpleNamespace:
    """prepare.py and run.py; `milora` commands run in this process, which spares imports."""
    monkeypatch.syspath_prepend(str(BENCH / "quality/paper"))
    found = SimpleNamespace()
    for name in ("prepare", "run"):
        path = BENCH / f"quality/paper/{name}.py"
        spec = importlib.util.spec_from_file_location(f"quality_paper_{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        setattr(found, name, module)

    def command(words: list[str]) -> None:
        assert milora_command(words) == 0

    found.run.milora = command
    return found
