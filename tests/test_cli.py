"""The command line, run as a user would: results, exit codes, and errors in plain words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from text_model import byte_tokenizer, save_tiny_model, sums, write_jsonl

import milora
import milora.cli
import milora.cli.memory
from milora.cli import COMMANDS, main
from milora.cli.console import check_writable_file, writable_folder
from milora.cli.models import load_model
from milora.cli.plots import check_plot_file, draw_routing
from milora.cli.train_options import parse_expert_options
from milora.cli.train_progress import TrainProgress
from milora.errors import UserError
from milora.nn import MiLoRALinear
from milora.train.interrupt import InterruptCallback
from milora.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG"
SHORT = ["--max-steps", "6", "--eval-every", "2", "--log-every", "1", "--batch-size", "4"]


@pytest.fixture(autouse=True)
def _quiet_is_undone():
    level = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> SimpleNamespace:
    """A model folder, data, and an adapter that `milora train` made."""
    root = tmp_path_factory.mktemp("cli")
    files = SimpleNamespace(
        root=root,
        model=save_tiny_model(root / "model"),
        data=write_jsonl(root / "train.jsonl", sums(40)),
        adapter=str(root / "adapter"),
        summary=str(root / "summary.json"),
    )
    argv = ["train", "--model", files.model, "--data", files.data, "--output", files.adapter]
    assert main([*argv, *SHORT, "--lr", "0.05", "--json", files.summary]) == 0
    return files


def run_json(capsys, argv: list[str]) -> dict:
    capsys.readouterr()
    assert main([*argv, "--json", "-"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# ---- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(capsys, command):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: milora {command}" in out
    assert f"milora {command}" in out.split("usage:")[1].split("\n\n", 1)[1], "no example"


def test_version_and_usage(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"milora {milora.__version__}"
    assert main([]) == 2
    assert main(["trian"]) == 2
    err = capsys.readouterr().err
    assert "invalid choice: 'trian'" in err and "Traceback" not in err


# ---- train --------------------------------------------------------------------------------------


def test_train_leaves_an_adapter_metrics_and_a_plot(home):
    folder = Path(home.adapter)
    summary = json.loads(Path(home.summary).read_text())
    assert summary["steps"] == summary["planned_steps"] == 6
    assert summary["best_perplexity"] > 1
    assert (folder / "training.png").read_bytes().startswith(PNG)
    experts, lines = read_metrics(folder / "metrics.jsonl")
    assert [len(block) for block in experts] == [7, 7]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_perplexity" in line] == [2, 4, 6]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["rank"], config["top_k"], config["pooler"]) == (32, 3, "self_attention")
    assert (config["activation"], config["balance_coef"]) == ("rational", 0.01)


@pytest.mark.parametrize("expert, starts", [("lora_ga", 1), ("lora_sb", 1), ("lora", 0)])
def test_kinds_that_start_from_gradients_get_them(home, tmp_path, monkeypatch, expert, starts):
    """Once, before the first step: a resumed run has its factors."""
    taken = []
    start = milora.init_from_gradients

    def spied(model, batches, **options):
        before = [t.clone() for linear in experts_of(model) for t in tensors_of(linear)]
        start(model, list(batches), **options)
        after = [t for linear in experts_of(model) for t in tensors_of(linear)]
        taken.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))

    def experts_of(model):
        return [module for module in model.modules() if isinstance(module, MiLoRALinear)]

    def tensors_of(linear):
        return [t.detach() for t in linear.tensors("default").values()]

    monkeypatch.setattr(milora, "init_from_gradients", spied)
    output = str(tmp_path / "a")
    argv = ["train", "--model", home.model, "--data", home.data, "--output", output]
    argv += ["--expert", expert, "--rank", "4", "--no-plot", *SHORT]
    assert main(argv) == 0
    assert taken == [True] * starts
    shutil.rmtree(max(Path(output).glob("checkpoint-*"), key=lambda p: int(p.name[11:])))
    assert main(["train", "--resume", "--output", output, "--no-plot"]) == 0
    assert len(taken) == starts


def test_paper_defaults():
    options = milora.cli.train_options.TrainOptions()
    assert (options.lr, options.activation_lr, options.schedule) == (1e-4, 1e-6, "linear")
    assert (options.warmup, options.patience, options.rank, options.top_k) == (0.06, 10, 32, 3)
    assert milora.cli.train_options.TrainOptions().balance_coef == 1e-2


def test_every_adapter_option_reaches_the_config(home, tmp_path):
    argv = ["train", "--model", home.model, "--data", home.data, "--output", str(tmp_path / "a")]
    given = {
        "expert": "dora", "rank": "4", "alpha": "8", "top-k": "2", "pooler": "mean",
        "activation": "gelu", "gate": "renormalized", "router-norm": "rms",
        "balance-coef": "0.1", "dropout": "0.1", "seed": "7",
    }  # fmt: skip
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    flags += ["--target-modules", "q_proj", "v_proj", "--rslora", "--no-plot"]
    assert main([*argv, *flags, "--max-steps", "1", "--dev-share", "0"]) == 0
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    expected = {
        "expert": "dora", "rank": 4, "alpha": 8.0, "top_k": 2, "pooler": "mean",
        "activation": "gelu", "gate": "renormalized", "router_norm": "rms", "rslora": True,
        "balance_coef": 0.1, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "seed": 7,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert not (tmp_path / "a/training.png").exists()


def test_options_of_a_kind(home, tmp_path):
    output = tmp_path / "a"
    argv = ["train", "--model", home.model, "--data", home.data, "--output", str(output)]
    argv += ["--expert", "lorta", "--expert-options", "head_dim=8", "--rank", "4", "--no-plot"]
    assert main([*argv, "--max-steps", "1", "--dev-share", "0"]) == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["expert_options"] == {"head_dim": 8}


@pytest.mark.parametrize(
    "words, options",
    [
        (None, {}),
        (["a=1", "b=1e-3", "c=[1, 2]", "d=true"], {"a": 1, "b": 1e-3, "c": [1, 2], "d": True}),
        (["a=word", "b=", "c=x=y"], {"a": "word", "b": "", "c": "x=y"}),
    ],
)
def test_words_of_expert_options(words, options):
    assert parse_expert_options(words) == options


def test_chat_data_checkpointing_and_the_dev_set_as_activation_data(home, tmp_path):
    chat = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    ] * 4
    data = write_jsonl(tmp_path / "chat.jsonl", chat)
    output = str(tmp_path / "a")
    argv = ["train", "--model", home.model, "--data", data, "--dev-data", data]
    argv += ["--activation-data", "dev", "--gradient-checkpointing", "--output", output]
    assert main([*argv, "--max-steps", "2", "--eval-every", "1", "--rank", "4"]) == 0


def _interrupt(argv: list[str], after: str) -> tuple[int, str]:
    """Run the command in its own process and send it Ctrl-C when it prints `after`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "milora", *argv],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    seen = []
    for line in process.stderr:
        seen.append(line)
        if after in line:
            process.send_signal(signal.SIGINT)
            after = "\0"
    return process.wait(timeout=120), "".join(seen)


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_ends_with_the_same_bits(home, tmp_path):
    argv = ["train", "--model", home.model, "--data", home.data, "--max-steps", "60"]
    argv += ["--eval-every", "25", "--log-every", "1", "--lr", "0.01", "--rank", "4", "--no-plot"]
    parts, whole = str(tmp_path / "parts"), str(tmp_path / "whole")
    code, err = _interrupt([*argv, "--output", parts], after="step 3/60")
    assert code == 130, err
    assert "Traceback" not in err and f"milora train --resume --output {parts}" in err
    (checkpoint,) = Path(parts).glob("checkpoint-*")
    assert 3 <= int(checkpoint.name.rpartition("-")[2]) < 25
    assert not (Path(parts) / "adapter_config.json").exists()
    assert main(["train", "--resume", "--output", parts, "--no-plot"]) == 0
    assert main([*argv, "--output", whole]) == 0
    mine, theirs = (load_file(Path(f) / "adapter_model.safetensors") for f in (parts, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_resumed_run_refuses_changed_data(home, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", sums(8))
    argv = ["train", "--model", home.model, "--data", data, "--output", str(tmp_path / "a")]
    assert main([*argv, "--max-steps", "1", "--rank", "4", "--no-plot"]) == 0
    write_jsonl(tmp_path / "data.jsonl", sums(9))
    assert main(["train", "--resume", "--output", str(tmp_path / "a")]) == 2
    assert f"these files have changed since the run began: {data}" in capsys.readouterr().err


@pytest.mark.parametrize("state", [None, '{"global_step": 6, "log_'])
def test_resuming_leaves_out_a_checkpoint_that_was_not_finished(home, tmp_path, capsys, state):
    """A full disk or a killed process ends a checkpoint anywhere; Trainer writes its state last."""
    copy, output = Path(home.adapter), tmp_path / "copy"
    shutil.copytree(copy, output)
    last = output / "checkpoint-6" / "trainer_state.json"
    last.unlink() if state is None else last.write_text(state)
    assert main(["train", "--resume", "--output", str(output), "--no-plot"]) == 0
    assert f"{last.parent} is incomplete and left out" in capsys.readouterr().err
    mine, theirs = (load_file(f / "adapter_model.safetensors") for f in (output, copy))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert json.loads(last.read_text())["global_step"] == 6


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def finished(home) -> Path:
    """A run whose limit of steps lies within an epoch, where Trainer would take one step more."""
    output = home.root / "finished"
    argv = ["train", "--model", home.model, "--data", home.data, "--output", str(output)]
    assert main([*argv, *SHORT, "--max-steps", "3", "--rank", "4", "--no-plot"]) == 0
    return output


def test_resuming_a_finished_run_leaves_it_as_it_is(finished, capsys):
    before = _contents(finished)
    summary = run_json(capsys, ["train", "--resume", "--output", str(finished)])
    assert (summary["steps"], summary["planned_steps"], summary["train_loss"]) == (3, 3, None)
    assert main(["train", "--resume", "--output", str(finished)]) == 0
    assert f"the run in {finished} is finished, after 3 steps" in capsys.readouterr().err
    assert _contents(finished) == before


@pytest.mark.parametrize("left", [["checkpoint-2", "checkpoint-3"], ["checkpoint-3"]])
def test_a_run_that_was_killed_before_its_adapter_was_saved_is_ended(finished, tmp_path, left):
    """The checkpoint of its last step is there: the one before, or the start, gives the adapter."""
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    (output / "adapter_config.json").unlink()
    for folder in output.glob("checkpoint-*"):
        if folder.name not in left:
            shutil.rmtree(folder)
    assert main(["train", "--resume", "--output", str(output), "--no-plot"]) == 0
    mine, theirs = (load_file(f / "adapter_model.safetensors") for f in (output, finished))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    steps = [line["step"] for line in read_metrics(output / "metrics.jsonl")[1] if "loss" in line]
    assert steps == [1, 2, 3]


def test_a_line_of_progress_has_its_own_steps_numbers_alone(capsys):
    """A log without a number must not show the one of an earlier step."""
    progress = TrainProgress()
    progress.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=9), None)
    logs = [
        ({"loss": 2.0, "balance_loss": 1.5}, "step 1/9: loss 2, balance 1.5"),
        ({"eval_perplexity": 7.0}, "step 2/9: dev perplexity 7"),
        ({"loss": 1.0}, "step 3/9: loss 1"),
        ({"learning_rate": 1.0}, None),
        ({"train_runtime": 1.0}, None),
    ]
    for step, (log, _) in enumerate(logs, start=1):
        progress.on_log(None, SimpleNamespace(global_step=step, max_steps=9), None, logs=log)
    progress.__exit__(None, None, None)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["training (9)", *(line for _, line in logs if line)]


def test_texts_end_where_the_models_positions_do(tmp_path, capsys):
    """Past them a table of positions has no row: an IndexError, on a GPU a lost device."""
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=24, eos_token_id=2
    )
    model, new = str(tmp_path / "gpt2"), str(tmp_path / "new")
    transformers.GPT2LMHeadModel(config).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    rows = [{"prompt": "x" * n, "completion": "y" * 20} for n in (3, 9, 30)]
    data = write_jsonl(tmp_path / "long.jsonl", rows * 4)
    argv = ["train", "--model", model, "--data", data, "--output", new, "--rank", "2", "--no-plot"]
    assert main([*argv, "--max-steps", "2"]) == 0
    err = capsys.readouterr().err
    assert "train: 4 answers cut at 24 tokens, which are all that the model takes" in err
    assert "train: 4 examples left out, whose prompts alone have 24 tokens or more" in err
    argv = ["generate", "--model", model, "--adapter", new, "--prompt"]
    answers = run_json(capsys, [*argv, "x" * 20])["answers"]
    assert answers[0]["new_tokens"] <= 4
    for command in (argv, ["inspect", new, "--model", model, "--prompt"]):
        assert main([*command, "x" * 24]) == 2
        assert "the prompt has 24 tokens, and the model takes 24" in capsys.readouterr().err


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)  # a background job starts with the signal ignored
    stop = InterruptCallback()
    with stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_elsewhere_is_130_too(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("milora.cli.inspect.run", interrupted)
    assert main(["inspect", "somewhere"]) == 130
    assert capsys.readouterr().err == "\nmilora: interrupted\n"


# ---- generate, inspect, export ------------------------------------------------------------------


def _attached(home):
    model, tokenizer = load_model(home.model, device="cpu")
    return milora.load(model, home.adapter), tokenizer


def test_generate_answers_as_the_library_does(home, capsys):
    argv = ["generate", "--model", home.model, "--adapter", home.adapter, "--max-new-tokens", "4"]
    prompts = ["1+1=", "a longer prompt: 20+6="]
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    answers = run_json(capsys, [*argv, *flags, "--routes"])["answers"]
    assert [answer["prompt"] for answer in answers] == prompts
    model, tokenizer = _attached(home)
    for answer, prompt in zip(answers, prompts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        with milora.record_routing(model) as states:
            new = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["completion"] == text
        assert answer["experts"] == [list(states[0].active_names(layer)) for layer in range(2)]


def test_generate_reads_standard_input_and_prints_text(home, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", (tmp_path / "in").open("w+"))
    sys.stdin.write("2+2=")
    sys.stdin.seek(0)
    argv = ["generate", "--model", home.model, "--adapter", home.adapter, "--max-new-tokens", "3"]
    assert main([*argv, "--chat", "--beams", "2", "--json", str(tmp_path / "out.json")]) == 0
    (answer,) = json.loads((tmp_path / "out.json").read_text())["answers"]
    assert answer["prompt"] == "2+2=" and 1 <= answer["new_tokens"] <= 3
    assert capsys.readouterr().out == answer["completion"] + "\n"


def test_inspect_counts_what_the_library_counts(home, capsys):
    parameters = run_json(capsys, ["inspect", home.adapter])["parameters"]
    count = milora.count_parameters(_attached(home)[0])
    assert parameters == {
        "total": count.trainable, "experts": count.experts, "router": count.router,
        "pooler": count.pooler, "activation": count.activation, "activated": count.activated,
        "activated_mean": round(count.activated_mean, 1),
    }  # fmt: skip
    assert main(["inspect", home.adapter]) == 0
    assert f"{count.activated:,}" in capsys.readouterr().out


def test_inspect_draws_where_prompts_go(home, capsys, tmp_path):
    plot = tmp_path / "routing.png"
    argv = ["inspect", home.adapter, "--prompts", home.data, "--prompt", "abc", "--plot", str(plot)]
    result = run_json(capsys, argv)
    assert plot.read_bytes().startswith(PNG)
    assert set(result["routing"]) == {"--prompt", "train"}
    for shares in result["routing"].values():
        assert list(shares) == ["model.layers.0", "model.layers.1"]
        for block in shares.values():
            assert sum(block.values()) == pytest.approx(3, abs=1e-5)  # top_k of them, each prompt


def test_an_exported_route_is_an_ordinary_lora(home, capsys, tmp_path):
    peft = pytest.importorskip("peft")
    output = str(tmp_path / "lora")
    argv = ["export", home.adapter, "--model", home.model, "--prompt", "3+4=", "--output", output]
    experts = run_json(capsys, argv)["experts"]
    assert all(len(names) == 3 for names in experts.values())
    model, tokenizer = _attached(home)
    ids = tokenizer("3+4=", return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids, use_cache=True).logits
        bare, _ = load_model(home.model, device="cpu")
        actual = peft.PeftModel.from_pretrained(bare, output)(**ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ---- mistakes -----------------------------------------------------------------------------------

TRAIN = ["train", "--model", "{model}", "--data", "{data}", "--output", "{tmp}/new"]
MISTAKES = {
    "no model folder": (
        ["train", "--model", "./nowhere", "--data", "{data}", "--output", "{tmp}/new"],
        "no model folder at ./nowhere",
    ),
    "no model": (["train", "--data", "{data}", "--output", "{tmp}/new"], "--model is required"),
    "no option of a kind": (
        [*TRAIN, "--expert-options", "head_dim"],
        "--expert-options must be NAME=VALUE, got head_dim",
    ),
    "an option of another kind": (
        [*TRAIN, "--expert-options", "head_dim=8"],
        "head_dim",
    ),
    "no data file": (
        ["train", "--model", "{model}", "--data", "{tmp}/none.jsonl", "--output", "{tmp}/new"],
        "no such file: {tmp}/none.jsonl",
    ),
    "a bad line": (
        ["train", "--model", "{model}", "--data", "{bad}", "--output", "{tmp}/new"],
        "{bad}:3: not valid JSON: Expecting ',' delimiter at column",
    ),
    "an unknown module": ([*TRAIN, "--target-modules", "qproj"], "q_proj"),
    "an unknown expert": ([*TRAIN, "--expert", "lorra"], "lora"),
    "a rank out of range": ([*TRAIN, "--rank", "0"], "rank must be an integer in [1, 256], got 0"),
    "a batch of nothing": ([*TRAIN, "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    "an unknown schedule": ([*TRAIN, "--schedule", "sideways"], "sideways"),
    "an unknown device": ([*TRAIN, "--device", "gpu"], "--device must be auto, cpu or cuda[:N]"),
    "not a causal model": (
        ["train", "--model", "{bert}", "--data", "{data}", "--output", "{tmp}/new"],
        "is not a causal language model: its class is BertForMaskedLM",
    ),
    "not a model": (
        ["train", "--model", "{tmp}", "--data", "{data}", "--output", "{tmp}/new"],
        "cannot read {tmp} as a model",
    ),
    "pickled weights": (
        ["train", "--model", "{pickled}", "--data", "{data}", "--output", "{tmp}/new"],
        "has no .safetensors weights",
    ),
    "an earlier run": (
        ["train", "--model", "{model}", "--data", "{data}", "--output", "{adapter}"],
        "holds the checkpoints of an earlier run",
    ),
    "nothing to resume": (["train", "--resume", "--output", "{tmp}"], "nothing to resume in {tmp}"),
    "another experiment": (
        ["train", "--resume", "--output", "{adapter}", "--lr", "0.5"],
        "a resumed run keeps its options; these differ: lr 0.05 -> 0.5",
    ),
    "an output that is a file": (
        ["train", "--model", "{model}", "--data", "{data}", "--output", "{data}"],
        "cannot write to folder {data}",
    ),
    "no adapter": (
        ["generate", "--model", "{model}", "--adapter", "{tmp}/none", "--prompt", "x"],
        "no adapter folder at {tmp}/none",
    ),
    "a folder without adapter": (["inspect", "{tmp}"], "no adapter in {tmp}"),
    "a damaged adapter": (
        ["generate", "--model", "{model}", "--adapter", "{damaged}", "--prompt", "x"],
        "the file is damaged",
    ),
    "an empty prompt": (
        ["generate", "--model", "{model}", "--adapter", "{adapter}", "--prompt", " "],
        "--prompt: the prompt is empty",
    ),
    "routes of the bare model": (
        ["generate", "--model", "{model}", "--routes", "--prompt", "x"],
        "--routes needs --adapter",
    ),
    "two prompts to export": (
        ["export", "{adapter}", "--model", "{model}", "--prompt", "a", "--prompt", "b",
         "--output", "{tmp}/new"],
        "give exactly one prompt, or --route",
    ),
    "no route file": (
        ["export", "{adapter}", "--model", "{model}", "--route", "{tmp}/r", "--output", "{tmp}/n"],
        "no file {tmp}/r",
    ),
    "an unwritable result": (
        ["inspect", "{adapter}", "--json", "{tmp}/no/where.json"],
        "cannot write {tmp}/no/where.json",
    ),
    "a result that is a folder": (
        ["generate", "--model", "./nowhere", "--prompt", "x", "--json", "{tmp}"],
        "cannot write {tmp}: Is a directory",
    ),
    "an unknown format of a plot": (
        ["inspect", "{adapter}", "--prompt", "x", "--plot", "{tmp}/x.foo"],
        "cannot draw {tmp}/x.foo: its name must end in one of .",
    ),
    "a plot that is a folder": (
        ["inspect", "{adapter}", "--prompt", "x", "--plot", "{folder}"],
        "cannot write {folder}: Is a directory",
    ),
    "no folder for a plot": (
        ["inspect", "{adapter}", "--prompt", "x", "--plot", "{tmp}/no/x.png"],
        "cannot write {tmp}/no/x.png: there is no such folder",
    ),
    "routers to merge": (
        ["merge", "{adapter}", "{adapter}", "--output", "{tmp}/new/deep"],
        "has a router",
    ),
    "too few weights": (
        ["merge", "{adapter}", "{adapter}", "--weights", "1", "--output", "{tmp}/new"],
        "weights must be 2 finite numbers, one per folder, got [1.0]",
    ),
    "an unknown bench": (
        ["bench", "nothing"],
        "the benches are grouped_lora, prompt_router, multitenant",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken(home, tmp_path_factory) -> dict[str, str]:
    """Folders and files with something wrong in them."""
    root = tmp_path_factory.mktemp("broken")
    bad = root / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a" "completion": "b"}\n')
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(root / "bert")
    (root / "pickled").mkdir()
    Path(root / "pickled/config.json").write_bytes(Path(home.model, "config.json").read_bytes())
    torch.save({}, root / "pickled/pytorch_model.bin")
    (root / "damaged").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = bytearray(Path(home.adapter, name).read_bytes())
        content[-9] ^= name.endswith("safetensors")
        (root / "damaged" / name).write_bytes(content)
    (root / "folder.png").mkdir()
    return {
        "bad": str(bad), "bert": str(root / "bert"), "pickled": str(root / "pickled"),
        "damaged": str(root / "damaged"), "folder": str(root / "folder.png"),
    }  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_message_and_no_traceback(home, broken, capsys, tmp_path, name):
    argv, message = MISTAKES[name]
    values = {
        "model": home.model, "data": home.data, "adapter": home.adapter, "tmp": str(tmp_path),
        **broken,
    }  # fmt: skip
    capsys.readouterr()
    code = main([word.format(**values) for word in argv])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert "milora: error: " in err and "Traceback" not in err
    assert message.format(**values) in err
    assert not list(tmp_path.iterdir()), "a command that failed must leave nothing behind"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
@pytest.mark.parametrize("option", [["--json", "/proc/x.json"], ["--plot", "/proc/x.png"]])
def test_a_folder_that_takes_no_file_is_found_before_the_work(home, capsys, option):
    """Even root can make no file in /proc."""
    argv = ["inspect", home.adapter, "--model", "./nowhere", "--prompt", "x", *option]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"milora: error: cannot write {option[1]}: " in err


def test_every_ending_that_a_plot_may_have_is_drawn(tmp_path):
    """An ending that is let through must not fail when all prompts have been routed."""
    with pytest.raises(UserError) as refused:
        check_plot_file(tmp_path / "x.foo")
    endings = str(refused.value).rpartition(" one of ")[2].split(", ")
    assert {".png", ".pdf", ".svg"} <= set(endings)
    for ending in [*endings, ".PNG"]:
        path = tmp_path / f"x{ending}"
        check_plot_file(path)
        draw_routing(path, [("a group", [[0.1, 0.9]], ["q_proj", "v_proj"])])
        assert path.stat().st_size > 0


def test_a_plot_that_fails_while_drawn_is_said_in_words(home, capsys, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    plot = str(tmp_path / "x.png")
    assert main(["inspect", home.adapter, "--prompts", home.data, "--plot", plot]) == 2
    assert f"cannot write {plot}: Input/output error" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "old"])
def test_trying_a_file_leaves_it_as_it_was(tmp_path, content):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    check_writable_file(path)
    assert (path.read_text() if path.exists() else None) == content
    check_writable_file(Path(os.devnull))


@pytest.mark.parametrize(
    ("there", "written", "left"),
    [
        ([], [], []),
        (["a"], [], ["a"]),
        (["a", "a/b"], [], ["a", "a/b"]),
        ([], ["a/b/file"], ["a", "a/b", "a/b/file"]),
        ([], ["a/file"], ["a", "a/file"]),
    ],
)
def test_an_error_removes_the_empty_folders_that_it_made(tmp_path, there, written, left):
    for folder in there:
        (tmp_path / folder).mkdir()
    with pytest.raises(KeyboardInterrupt), writable_folder(tmp_path / "a/b"):
        for file in written:
            (tmp_path / file).touch()
        raise KeyboardInterrupt
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left


def test_a_folder_that_cannot_be_made_leaves_no_part_of_its_path(tmp_path):
    path = tmp_path / "a" / ("b" * 300)
    with pytest.raises(UserError, match="cannot write to folder"), writable_folder(path):
        pass
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said_before_loading(home, capsys, monkeypatch, tmp_path):
    argv = [word.format(model=home.model, data=home.data, tmp=tmp_path) for word in TRAIN]
    monkeypatch.setattr(milora.cli.memory, "free_bytes", lambda device: 1000)
    assert main(argv) == 2
    assert "too little memory: the model in" in capsys.readouterr().err

    monkeypatch.setattr(milora.cli.memory, "free_bytes", lambda device: 2**40)
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")):
        monkeypatch.setattr("milora.cli.inspect.run", _raiser(error))
        assert main(["inspect", "x"]) == 2
        assert "out of memory" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_full_disk_is_said_in_words(monkeypatch, capsys):
    def full_disk(write):
        with pytest.raises((OSError, RuntimeError)) as caught:
            write()
        return caught.value

    errors = [
        full_disk(lambda: Path("/dev/full").write_text("x")),
        full_disk(lambda: torch.save(torch.zeros(9999), "/dev/full")),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ]
    for error in errors:
        monkeypatch.setattr("milora.cli.inspect.run", _raiser(error))
        assert main(["inspect", "x"]) == 2
        assert "the disk is full" in capsys.readouterr().err


def _raiser(error: Exception):
    def run(namespace):
        raise error

    return run


def test_an_internal_failure_is_1_with_a_traceback_only_for_debug(capsys, monkeypatch):
    monkeypatch.setattr("milora.cli.inspect.run", _raiser(ZeroDivisionError("oops")))
    assert main(["inspect", "x"]) == 1
    err = capsys.readouterr().err
    assert "internal error: ZeroDivisionError: oops" in err and "Traceback" not in err
    assert main(["inspect", "x", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_optional_package_is_named(capsys, monkeypatch):
    monkeypatch.setattr("milora.cli.inspect.run", _raiser(ModuleNotFoundError(name="matplotlib")))
    assert main(["inspect", "x"]) == 2
    err = capsys.readouterr().err
    assert "needs matplotlib" in err and "pip install 'milora[cli]'" in err


def test_a_local_model_makes_no_network_call(home, capsys, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError(f"network call: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    argv = [word.format(model=home.model, data=home.data, tmp=tmp_path) for word in TRAIN]
    assert main([*argv, "--max-steps", "1", "--rank", "4"]) == 0
    argv = ["generate", "--model", home.model, "--adapter", str(tmp_path / "new")]
    assert main([*argv, "--prompt", "x", "--max-new-tokens", "1"]) == 0
