"""The load-balance loss: its formula, its window, its weight beside the task loss."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tolerance import assert_as_good_as_torch
from torch import Tensor

import milora
from milora.attach import runtime_of
from milora.balance import BalanceWindow


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def formula(shares: list[Tensor], probabilities: list[Tensor], weights: Tensor) -> Tensor:
    """mean over blocks of N · Σ_i f_i · Σ_r w_r p_ri, in the dtype of the arguments."""
    losses = [
        p.shape[1] * (f * (weights[:, None] * p).sum(0)).sum()
        for f, p in zip(shares, probabilities, strict=True)
    ]
    return torch.stack(losses).mean()


def one_hot_shares(probabilities: list[Tensor]) -> list[Tensor]:
    return [
        torch.nn.functional.one_hot(p.argmax(1), p.shape[1]).to(p).mean(0) for p in probabilities
    ]


def random_probabilities(rows: int, widths: tuple[int, ...] = (7, 7, 4)) -> list[Tensor]:
    return [torch.randn(rows, width).mul(2).softmax(-1) for width in widths]


@pytest.mark.parametrize("rows", [1, 5, 64, 200])
@pytest.mark.parametrize("weighted", [False, True])
def test_first_batch_is_the_papers_formula(rows, weighted):
    probabilities = random_probabilities(rows)
    weights = torch.rand(rows) / rows if weighted else torch.full((rows,), 1 / rows)
    loss = BalanceWindow(64).loss(probabilities, weights if weighted else None)
    exact = [p.double() for p in probabilities]
    expected = formula(one_hot_shares(exact), exact, weights.double())
    plain = formula(one_hot_shares(probabilities), probabilities, weights)
    assert_as_good_as_torch(loss, expected, plain)


def test_is_one_for_uniform_shares_and_probabilities():
    """Every expert leads once; the probabilities are as good as equal."""
    nearly = torch.full((7, 7), 1 / 7).add(torch.eye(7) * 1e-6)
    loss = BalanceWindow(64).loss([nearly, nearly])
    assert_as_good_as_torch(loss, torch.ones((), dtype=torch.float64), nearly.sum(1).mean())


def test_is_n_when_one_expert_takes_all():
    sure = torch.zeros(8, 7).index_fill(1, torch.tensor([3]), 1.0)
    assert BalanceWindow(64).loss([sure]).item() == 7.0


def test_a_micro_batch_of_one_reads_the_window():
    """A confident router that serves every expert equally is balanced, one prompt at a time."""
    sure = [torch.full((1, 7), 0.04).index_fill(1, torch.tensor([i]), 0.76) for i in range(7)]
    window = BalanceWindow(63)
    losses = [window.loss([sure[step % 7]]).item() for step in range(70)]
    assert losses[0] == pytest.approx(0.76 * 7, rel=1e-6)  # f alone would say this for ever
    assert losses[62:] == pytest.approx([1.0] * 8, rel=1e-6)


@pytest.mark.parametrize(
    ("size", "batches", "kept"),
    [
        (64, [1] * 100, 64),
        (64, [8] * 20, 64),
        (64, [30] * 5, 90),
        (4, [16, 16], 16),
        (1, [1, 1], 1),
    ],
)
def test_window_holds_at_least_its_size_and_no_more_batches(size, batches, kept):
    window = BalanceWindow(size)
    for rows in batches:
        window.loss([torch.rand(rows, 7)])
    assert sum(prompts for prompts, _ in window.steps) == kept
    assert sum(window.shares()[0]) == pytest.approx(1.0)


def test_only_the_probabilities_have_a_gradient():
    probabilities = [p.requires_grad_() for p in random_probabilities(5)]
    window = BalanceWindow(64)
    window.loss([p.detach() for p in random_probabilities(20)])
    window.loss(probabilities).backward()
    shares = [torch.tensor(share) for share in window.shares()]
    for p, f in zip(probabilities, shares, strict=True):
        expected = (f * p.shape[1] / 5 / len(probabilities)).expand_as(p)
        assert_as_good_as_torch(p.grad, expected.double(), expected)


def test_state_survives_a_file():
    window = BalanceWindow(64)
    for rows in (3, 5):
        window.loss(random_probabilities(rows))
    copy = BalanceWindow(64)
    copy.load_state_dict(window.state_dict(), torch.device("cpu"))
    batch = random_probabilities(2)
    assert torch.equal(copy.loss(batch), window.loss(batch))


# ---- beside the task loss ---------------------------------------------------------------------


def make(family: str = "llama", **options):
    options = {"rank": 4, "balance_coef": 0.1, **options}
    model = milora.attach(tiny_models.build(family), milora.MiLoRAConfig(**options))
    return tiny_models.randomize(model).train()


def rows_with_answers(answers: list[int], prompt: int = 6) -> dict[str, Tensor]:
    """Right-padded rows of one prompt length and these numbers of answer tokens."""
    inputs = tiny_models.left_padded([prompt + n for n in answers], side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :prompt] = -100
    return {**inputs, "labels": labels}


def task_and_balance(model, inputs: dict) -> tuple[Tensor, Tensor]:
    """The task loss alone, and what the model adds to it."""
    coefs = [config.balance_coef for config in runtime_of(model).configs.values()]
    for config in runtime_of(model).configs.values():
        config.balance_coef = 0.0
    task = model(**inputs).loss
    for config, coef in zip(runtime_of(model).configs.values(), coefs, strict=True):
        config.balance_coef = coef
    return task, model(**inputs).loss - task


def test_the_model_adds_it_in_training_only():
    model = make()
    inputs = rows_with_answers([3, 5, 2])
    with milora.record_routing(model) as states:
        task, added = task_and_balance(model, inputs)
    probabilities = list(states[-1].probabilities)
    weights = torch.full((3,), 1 / 3)
    expected = 0.1 * formula(one_hot_shares(probabilities), probabilities, weights)
    assert added.item() == pytest.approx(expected.item(), abs=1e-6)
    assert milora.balance_report(model)["balance_loss"] == pytest.approx(expected.item() * 10)
    model.eval()
    assert torch.equal(model(**inputs).loss, task)
    with torch.no_grad():
        assert torch.equal(model.train()(**inputs).loss, task)


def test_a_tuple_output_gets_it_too():
    model = make()
    inputs = rows_with_answers([3, 5])
    window = runtime_of(model).windows["default"]
    expected = model(**inputs).loss
    window.load_state_dict({"widths": [], "steps": []}, torch.device("cpu"))
    assert torch.equal(model(**inputs, return_dict=False)[0], expected)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_accumulated_micro_batches_add_up_to_the_whole_batch(family):
    """Four micro-batches of one row and one of four, with 1, 9, 4 and 2 answer tokens.

    T5 and BERT know no `num_items_in_batch`: Trainer takes the mean of their losses.
    """
    without_dropout = {
        "t5": {"dropout_rate": 0.0},
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    }
    model = tiny_models.build(family, **without_dropout.get(family, {}))
    milora.attach(model, milora.MiLoRAConfig(rank=4, balance_coef=0.1))
    tiny_models.randomize(model).train()
    inputs = rows_with_answers([1, 9, 4, 2] if family == "llama" else [4, 4, 4, 4])
    if family == "bert":
        inputs["labels"] = torch.tensor([0, 1, 1, 0])
    num_items = (inputs["labels"] != -100).sum()
    window = runtime_of(model).windows["default"]
    # So long a history that these four prompts do not move the shares.
    history = [[4_000_000, (torch.arange(sum(widths_of(model))) % 5 * 100_000 + 10**6).tolist()]]

    def total(batches: list[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
        window.load_state_dict({"widths": [], "steps": history}, torch.device("cpu"))
        model.zero_grad(set_to_none=True)
        loss = sum(
            model(**batch, num_items_in_batch=num_items).loss
            if family == "llama"
            else model(**batch).loss / len(batches)
            for batch in batches
        )
        loss.backward()
        return loss.item(), [r.w_r.grad for r in runtime_of(model).routers_of("default")]

    whole_loss, whole = total([inputs])
    split_loss, split = total([{k: v[i : i + 1] for k, v in inputs.items()} for i in range(4)])
    assert split_loss == pytest.approx(whole_loss, rel=1e-5)
    for actual, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def widths_of(model) -> list[int]:
    return [len(names) for names in runtime_of(model).names]


def test_packed_segments_weigh_as_their_rows_would():
    model = make()
    inputs = rows_with_answers([2, 7, 4])
    num_items = (inputs["labels"] != -100).sum()
    attended = inputs["attention_mask"].bool()
    lengths = inputs["attention_mask"].sum(1)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    packed = {
        "input_ids": inputs["input_ids"][attended][None],
        "labels": inputs["labels"][attended][None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        "use_cache": False,  # with a cache, transformers does not look for packed segments
    }
    model.eval()
    with milora.record_routing(model) as states, torch.no_grad():
        model(**inputs)
        model(**packed)
    assert states[1].same_route(states[0], tolerance=1e-5)
    model.train()
    model(**inputs, num_items_in_batch=num_items)
    expected = milora.balance_report(model)["balance_loss"]
    runtime_of(model).windows["default"].steps.clear()
    model(**packed, num_items_in_batch=num_items)
    assert milora.balance_report(model)["balance_loss"] == pytest.approx(expected, rel=1e-5)


def test_each_adapter_of_a_mixed_batch_has_its_own_window():
    model = make()
    milora.attach(model, milora.MiLoRAConfig(rank=2, balance_coef=0.1), "other")
    inputs = rows_with_answers([3, 5, 2])
    model(**inputs, adapter_names=["default", "other", "default"]).loss.backward()
    windows = runtime_of(model).windows
    assert [windows[name].steps[0][0] for name in ("default", "other")] == [2, 1]
