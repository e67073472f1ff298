"""`milora demo`: its data, its cache, its budgets, and one quick run of every stage."""

from __future__ import annotations

import argparse
import json

import pytest
from transformers import LlamaForCausalLM

from milora.demo import add_arguments, run
from milora.demo.base import BaseConfig, build_model, load_or_pretrain
from milora.demo.chapters import CHAPTER_OF
from milora.demo.command import cache_folder
from milora.demo.corpus import load_corpus, shingles
from milora.demo.measure import DemoConfig
from milora.demo.methods import BASE, LORA, METHODS, MILORA, MIXTURE, attach, count, equal_budgets
from milora.demo.tasks import TASKS, held_out_examples, training_examples
from milora.demo.tokenizer import train_tokenizer
from milora.errors import UserError

TINY = BaseConfig(
    vocab_size=300, hidden_size=16, num_layers=1, num_heads=1, intermediate_size=24, steps=3
)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


# ---- corpus -----------------------------------------------------------------------------------


def test_no_topic_paragraph_or_run_of_words_is_in_both_splits(corpus):
    train = [text for texts in corpus.train.values() for text in texts]
    held_out = [text for texts in corpus.held_out.values() for text in texts]
    assert not set(corpus.train) & set(corpus.held_out)
    assert len(set(train)) == len(train) and not set(train) & set(held_out)
    seen = {shingle for text in train for shingle in shingles(text)}
    assert not any(seen & shingles(text) for text in held_out)


def test_the_split_is_the_same_each_time_and_large_enough(corpus):
    assert load_corpus() == corpus
    sizes = [
        sum(len(t) for ts in split.values() for t in ts)
        for split in (corpus.train, corpus.held_out)
    ]
    assert sizes[0] > 200_000 and 0.08 < sizes[1] / sum(sizes) < 0.25
    assert len(corpus.held_out) > 4


def test_the_tokenizer_gives_back_what_it_read(corpus):
    tokenizer = train_tokenizer(corpus.train_text().splitlines(), vocab_size=512)
    text = 'The "__next__()" method — naïve 漢'
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


# ---- tasks ------------------------------------------------------------------------------------


def _passage(prompt: str) -> str:
    return prompt.split("\n")[1]


def _check_continue(example) -> None:
    assert len(example.completion.split()) == 1


def _check_chapter(example) -> None:
    assert example.completion == f" {CHAPTER_OF[example.where]}"


def _check_blank(example) -> None:
    assert example.prompt.count("____") == 1
    passage, answer = _passage(example.prompt), example.completion.strip()
    before = example.prompt.split("\nBlank: ")[1]
    assert f"{before} ____" in passage.replace("(____", "____") and answer in passage


def _check_identifiers(example) -> None:
    passage, place = _passage(example.prompt), 0
    for name in example.completion.strip().split(", "):
        place = passage.index(name, place) + 1


CHECKS = {
    "continue": _check_continue,
    "chapter": _check_chapter,
    "blank": _check_blank,
    "identifiers": _check_identifiers,
}


@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_answers_follow_from_the_passage_and_splits_stay_apart(corpus, task: str):
    train = [e for name, e in training_examples(corpus.train, 50, seed=0) if name == task]
    held_out = [e for name, e in held_out_examples(corpus.held_out, 50, seed=0) if name == task]
    assert len(train) == 50 and len(held_out) >= 40
    for examples, paragraphs in ((train, corpus.train), (held_out, corpus.held_out)):
        for example in examples:
            assert example.where in paragraphs
            CHECKS[task](example)


def test_every_topic_of_this_python_has_a_chapter(corpus):
    assert {*corpus.train, *corpus.held_out} <= set(CHAPTER_OF)


def test_examples_follow_the_seed(corpus):
    same, again, other = (training_examples(corpus.train, 5, seed) for seed in (1, 1, 2))
    assert same == again and same != other


# ---- base and budgets -------------------------------------------------------------------------


def test_the_base_is_trained_once_and_then_read_from_the_cache(corpus, tmp_path):
    steps: list[int] = []
    first = load_or_pretrain(corpus, TINY, tmp_path, True, steps.append)
    second = load_or_pretrain(corpus, TINY, tmp_path, True, steps.append)
    assert (first.from_cache, second.from_cache, steps) == (False, True, [1, 2, 3])
    assert not any(p.requires_grad for p in second.model.parameters())
    anew = load_or_pretrain(corpus, TINY, tmp_path, False, steps.append)
    assert not anew.from_cache and len(steps) == 6
    for name, tensor in first.model.state_dict().items():
        assert tensor.equal(second.model.state_dict()[name]), name
        assert tensor.equal(anew.model.state_dict()[name]), f"{name}: the seed does not decide it"


def test_an_interrupted_pre_training_leaves_nothing_in_the_cache(corpus, tmp_path):
    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_pretrain(corpus, TINY, tmp_path, True, interrupt)
    assert list(tmp_path.iterdir()) == []


def default_model(corpus) -> LlamaForCausalLM:
    config = DemoConfig().base
    tokenizer = train_tokenizer(corpus.train_text().splitlines(), 300)  # its size has no part here
    return build_model(config, tokenizer)


def test_trainable_parameters_agree_within_two_percent(corpus):
    budgets = equal_budgets(default_model(corpus), DemoConfig().rank, seed=0)
    counts = {}
    for method in METHODS:
        model = attach(default_model(corpus), method, budgets)
        counts[method] = count(model, method)
        # The activation's coefficients ask for a gradient in their own phase only.
        trainable = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad or name.endswith(".theta")
        )
        assert trainable == counts[method].trainable or method == BASE
    sizes = [counts[method].trainable for method in (LORA, MIXTURE, MILORA)]
    assert max(sizes) <= 1.02 * min(sizes), counts
    assert counts[LORA].activated == counts[LORA].trainable
    assert counts[MILORA].activated < 0.75 * counts[MILORA].trainable


# ---- the whole command ------------------------------------------------------------------------


@pytest.mark.slow
def test_quick_run_measures_everything(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--quick", "--out", str(out), "--cache", str(tmp_path / "cache"), "--json", "-"]
    assert run(options(*arguments)) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)  # standard output is JSON and nothing else
    for text in ("Pre-training the base", "trainable parameters", "tokens/s"):
        assert text in printed.err

    assert set(result["methods"]) == set(METHODS)
    for name, method in result["methods"].items():
        assert set(method["tasks"]) == {task.name for task in TASKS}
        for score in method["tasks"].values():
            assert 0 < score["loss"] < 12 and 0 <= score["exact_match"] <= 1
            assert score["num_examples"] == 8
        assert method["tokens_per_second"] > 0
        assert (method["train_seconds"] is None) == (name == BASE)
    routing = result["routing"]
    blocks = routing["num_blocks"]
    assert routing["routed_prompts"] == blocks * routing["num_prompts"]
    assert routing["router_launches"] == blocks * routing["num_prefills"]
    assert routing["num_forwards"] == 8 * routing["num_prefills"]
    for share in routing["shares"].values():
        assert [len(row) for row in share] == [len(routing["experts"])] * blocks
        assert all(sum(row) == pytest.approx(3) for row in share)  # top_k
    assert result["adapter"]["reload_equal"] is True
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "routing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
    ],
)
def test_a_bad_option_is_a_plain_error(arguments: list[str], message: str):
    with pytest.raises(UserError, match=message):
        run(options("--quick", *arguments))


def test_an_output_folder_that_cannot_be_made_is_a_plain_error(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot make the folder"):
        run(options("--quick", "--out", str(tmp_path / "file" / "out")))


def test_the_cache_folder_follows_option_then_environment_then_platform(tmp_path, monkeypatch):
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "named"))
    assert cache_folder("given").name == "given"
    assert cache_folder(None) == tmp_path / "named"
    monkeypatch.delenv("MILORA_CACHE")
    assert cache_folder(None).name in ("milora", "cache")
