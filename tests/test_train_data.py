"""JSONL reading, encoding and batching: what the trainer is fed, and what a bad file says."""

from __future__ import annotations

import pytest
import torch
from text_model import CHAT_TEMPLATE, byte_tokenizer, sums, write_jsonl

from milora.data import CompletionCollator, Encoder, encode_examples, read_examples, read_prompts
from milora.errors import UserError, suggestion
from milora.train.stream import BatchStream

GOOD = '{"prompt": "a", "completion": "b"}\n'
BAD_LINES = {
    "no JSON": ('{"prompt": ', "2: not valid JSON: Expecting value at column"),
    "a list": ("[1]", "2: expected a JSON object, got list"),
    "other keys": (
        '{"text": "x"}',
        "2: expected the keys 'prompt' and 'completion', or 'messages'",
    ),
    "a number": ('{"prompt": 3, "completion": "x"}', "2: 'prompt' must be a string, got int"),
    "empty prompt": ('{"prompt": "", "completion": "x"}', "2: 'prompt' is empty"),
    "no answer": ('{"prompt": "x", "completion": ""}', "2: 'completion' is empty"),
    "messages no list": ('{"messages": "hi"}', "2: 'messages' must be a non-empty list"),
    "a bad role": (
        '{"messages": [{"role": "robot", "content": "x"}]}',
        r"2: messages\[0\]: 'role' must be one of system, developer, user, assistant, tool",
    ),
    "content no text": (
        '{"messages": [{"role": "user", "content": ["x"]}]}',
        r"2: messages\[0\]: 'content' must be a string, got list",
    ),
    "no assistant": (
        '{"messages": [{"role": "user", "content": "x"}]}',
        "2: 'messages' holds no assistant turn",
    ),
    "too deep": ("[" * 100_000, "2: not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(tmp_path, name):
    line, message = BAD_LINES[name]
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD + line + "\n" + GOOD)
    with pytest.raises(UserError, match=rf"data\.jsonl:{message}"):
        read_examples(path)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_examples(tmp_path / "missing.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(UserError, match="no example in this file"):
        read_examples(empty)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(GOOD.encode() + b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"binary\.jsonl:2: not UTF-8"):
        read_examples(binary)


def test_blank_lines_and_a_byte_order_mark_are_no_error(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode())
    assert [example.where for example in read_examples(path)] == [f"{path}:1", f"{path}:3"]


CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "u2"},
        {"role": "assistant", "content": "a2"},
    ]
}


def test_a_chat_is_one_example_per_assistant_turn(tmp_path):
    examples = read_examples(write_jsonl(tmp_path / "chat.jsonl", [CHAT]))
    encoder = Encoder(byte_tokenizer(CHAT_TEMPLATE))
    texts = []
    for example in examples:
        prompt = encoder.prompt(example)
        answer = encoder.answer(example, prompt)
        texts.append((encoder.tokenizer.decode(prompt), encoder.tokenizer.decode(answer)))
    assert texts == [
        ("<system>s<e><user>u1<e><assistant>", "a1<e>"),
        ("<system>s<e><user>u1<e><assistant>a1<e><user>u2<e><assistant>", "a2<e>"),
    ]


def test_prompts_drop_a_chats_last_answer(tmp_path):
    (prompt,) = read_prompts(write_jsonl(tmp_path / "chat.jsonl", [CHAT]))
    assert [m["content"] for m in prompt.prompt] == ["s", "u1", "a1", "u2"]


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    # Reasoning models' templates drop earlier thoughts once an answer follows; then nobody can
    # say which tokens of the whole are the prompt.
    template = "{{ messages | length }}" + CHAT_TEMPLATE
    examples = read_examples(write_jsonl(tmp_path / "chat.jsonl", [CHAT]))
    encoder = Encoder(byte_tokenizer(CHAT_TEMPLATE), template)
    with pytest.raises(UserError, match="end of the prompt is unknown"):
        encode_examples(examples, encoder, 128)


def test_chat_without_a_template_says_what_to_do(tmp_path):
    examples = read_examples(write_jsonl(tmp_path / "chat.jsonl", [CHAT]))
    with pytest.raises(UserError, match="this tokenizer has none") as caught:
        encode_examples(examples, Encoder(byte_tokenizer()), 128)
    assert "--chat-template" in caught.value.hint


def test_labels_mark_the_prompt_and_end_with_the_end_token(tmp_path):
    examples = read_examples(write_jsonl(tmp_path / "d.jsonl", sums(3)))
    tokenizer = byte_tokenizer()
    (first, *_) = encode_examples(examples, Encoder(tokenizer), 128)
    prompt = tokenizer("0+0=")["input_ids"]
    answer = [*tokenizer("0")["input_ids"], tokenizer.eos_token_id]
    assert first == {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def test_long_examples_are_cut_or_left_out_but_never_lose_prompt_tokens(tmp_path):
    records = [
        {"prompt": "p" * 4, "completion": "c" * 20},
        {"prompt": "p" * 10, "completion": "c"},
        {"prompt": "p" * 9, "completion": "c" * 9},
    ]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    encoded = encode_examples(read_examples(path), Encoder(byte_tokenizer()), 10)
    assert [len(row["input_ids"]) for row in encoded.rows] == [10, 10]
    assert [row["labels"].count(-100) for row in encoded.rows] == [4, 9]
    assert (encoded.truncated, encoded.dropped) == (2, [f"{path}:2"])
    with pytest.raises(UserError, match="every prompt is as long as the limit of 3 tokens"):
        encode_examples(read_examples(path), Encoder(byte_tokenizer()), 3)


def test_batches_are_padded_on_the_right():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8], "labels": [8]},
    ]
    batch = CompletionCollator(pad_token_id=9, multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [8, -100, -100, -100]]


def test_a_name_close_to_a_known_one_is_suggested():
    assert suggestion("qproj", ["q_proj", "v_proj", "mlp"]).startswith(" Did you mean q_proj")
    assert suggestion("zzz", ["q_proj"]) == ""


# ---- the activation batches ---------------------------------------------------------------------


def _stream(**options) -> BatchStream:
    return BatchStream(list(range(10)), collate=list, batch_size=3, seed=5, **options)


def test_each_pass_of_the_stream_sees_every_item_once():
    items = [item for batch in _stream().take(10) for item in batch]
    for start in range(0, 30, 10):
        assert sorted(items[start : start + 10]) == list(range(10))
    assert items[:10] != items[10:20]


def test_ranks_share_out_what_one_process_would_take():
    alone = _stream().take(8)
    first, second = _stream(rank=0, world_size=2), _stream(rank=1, world_size=2)
    assert [
        batch for pair in zip(first.take(4), second.take(4), strict=True) for batch in pair
    ] == alone


def test_a_stream_goes_on_from_its_position_and_leaves_torchs_generator_alone():
    before = torch.random.get_rng_state()
    whole = _stream().take(9)
    resumed = _stream()
    resumed.position = 5
    assert resumed.take(4) == whole[5:]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="dataset must not be empty"):
        BatchStream([], collate=list, batch_size=1, seed=0)
