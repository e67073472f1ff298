"""DyLoRA and BeamLoRA: ranks that are drawn, cut off, weighed, dropped and copied."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from expert_cases import move
from test_checkpointing import batch, checkpoint, gradients
from tiny_models import build, prompts, randomize
from transformers import Trainer, TrainingArguments

import milora
from milora import MiLoRAConfig
from milora.attach import runtime_of
from milora.experts import get_kind, make_spec
from milora.train import BeamCallback, BeamSearch
from milora.train.beam import kept_ranks

LENGTH = 7


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)


def attached(kind: str, rank: int = 6, **options):
    config = MiLoRAConfig(rank=rank, expert=kind, expert_options=options, router=False)
    model = randomize(milora.attach(build("llama"), config), seed=1)
    for linear in linears_of(model):
        move(linear.trained("default"), frozenset(), 0.05)
    return model


def linears_of(model):
    return [linear for linears in runtime_of(model).linears for linear in linears]


def logits(model) -> torch.Tensor:
    with milora.prompt_lengths(model, LENGTH), torch.no_grad():
        return model(prompts(2, LENGTH)).logits


# ---- DyLoRA -------------------------------------------------------------------------------------


def dylora(n: int | None = None, **options):
    """Tensors that ask for gradients, and the weights of a training forward at rank n."""
    kind = get_kind("dylora")
    spec = make_spec(12, 10, 6, alpha=3.0, options=options)
    tensors = {k: torch.randn(shape).requires_grad_() for k, shape in kind.tensors(spec).items()}
    drawn = {} if n is None else {"dylora_rank": n}
    return tensors, kind.materialise({**tensors, **drawn}, {}, spec)


@pytest.mark.parametrize("n", range(1, 7))
def test_a_training_forward_slices_the_factors(n):
    tensors, made = dylora(n)
    assert made.a.shape == (n, 12) and made.b.shape == (10, n) and made.b.is_contiguous()
    want = 3.0 / n * tensors["dylora_B"][:, :n] @ tensors["dylora_A"][:n]
    torch.testing.assert_close(made.scale * made.b @ made.a, want)
    (made.b @ made.a).sum().backward()
    assert tensors["dylora_A"].grad[:n].abs().sum(1).min() > 0
    assert not tensors["dylora_A"].grad[n:].any() and not tensors["dylora_B"].grad[:, n:].any()


def test_all_ranks_are_a_lora():
    tensors, made = dylora()
    assert torch.equal(made.a, tensors["dylora_A"]) and torch.equal(made.b, tensors["dylora_B"])
    assert made.scale == 0.5


@pytest.mark.parametrize("n", [1, 4, 6])
def test_frozen_trains_the_last_rank_alone(n):
    tensors, made = dylora(n, frozen=True)
    _, whole = dylora(n)
    assert made.a.shape == whole.a.shape
    (made.b @ made.a).sum().backward()
    ga, gb = tensors["dylora_A"].grad, tensors["dylora_B"].grad.T
    for grad in (ga, gb):
        assert grad[n - 1].abs().max() > 0
        assert not grad[: n - 1].any() and not grad[n:].any()


def test_draws_are_uniform_and_follow_torchs_seed():
    kind, spec = get_kind("dylora"), make_spec(4, 4, 6, options={"min_rank": 3})

    def draw(count):
        torch.manual_seed(3)
        return [kind.drawn({}, spec)["dylora_rank"] for _ in range(count)]

    counts = Counter(draw(4000))
    assert sorted(counts) == [3, 4, 5, 6] and min(counts.values()) > 850
    assert draw(20) == draw(20)
    assert kind.drawn({}, make_spec(4, 4, 2, options={"min_rank": 3}))["dylora_rank"] == 2


def test_a_model_serves_any_rank(tmp_path):
    model = attached("dylora")
    whole = logits(model)
    milora.set_rank(model, 2)
    two = logits(model)
    assert not torch.allclose(whole, two)
    for linear in linears_of(model):  # nested: later ranks may hold anything
        tensors = linear.tensors("default")
        with torch.no_grad():
            tensors["dylora_A"][2:] = 7.0
            tensors["dylora_B"][:, 2:] = 7.0
    assert torch.equal(logits(model), two)
    milora.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["expert_options"] == {"rank": 2}
    loaded = milora.load(build("llama"), tmp_path)
    assert torch.equal(logits(loaded), two)
    milora.set_rank(model, 0)
    assert not torch.allclose(logits(model), two)


def test_set_rank_refuses():
    model = attached("dylora")
    with pytest.raises(ValueError, match="dylora: rank must be an integer >= 0, got -1"):
        milora.set_rank(model, -1)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        milora.set_rank(model, 1, "other")
    with pytest.raises(ValueError, match="set_rank: experts must be of kind dylora, got lora"):
        milora.set_rank(attached("lora"), 1)


def test_each_forward_draws_once_and_evaluation_never():
    model = attached("dylora")
    ids = prompts(2, LENGTH)
    state = torch.get_rng_state()
    model.eval()
    model(ids, labels=ids).loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    first = model(ids, labels=ids).loss
    losses = {float(model(ids, labels=ids).loss.detach()) for _ in range(5)}
    assert len(losses) == 5 and float(first.detach()) not in losses
    torch.manual_seed(5)
    again = float(model(ids, labels=ids).loss.detach())
    torch.manual_seed(5)
    assert float(model(ids, labels=ids).loss.detach()) == again


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_block_keeps_its_draw(reentrant):
    model = attached("dylora").train()
    batches = [batch("llama", 3, 9, 4, seed) for seed in (0, 1)]
    expected = gradients(model, batches)
    checkpoint(model, reentrant)
    actual = gradients(model, batches)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# ---- BeamLoRA -----------------------------------------------------------------------------------


def shares_of(model):
    kind = get_kind("beamlora")
    return [kind.shares(n.tensors("default"), n.specs["default"]) for n in linears_of(model)]


def test_starts_as_a_lora_and_shares_sum_to_the_rank():
    kind, spec = get_kind("beamlora"), make_spec(12, 10, 6)
    tensors = kind.init(spec)
    made = kind.materialise(tensors, {}, spec)
    lora = get_kind("lora").init(spec)
    assert torch.equal(made.a, lora["lora_A"]) and torch.equal(made.b, lora["lora_B"])
    tensors["lora_beam_core"] = 0.1 * torch.randn(6)
    tensors["lora_beam_B"] = torch.randn(10, 6)
    shares = kind.shares(tensors, spec)
    assert shares.sum().item() == pytest.approx(6, rel=1e-6) and shares.std() > 0.5
    made = kind.materialise(tensors, {}, spec)
    torch.testing.assert_close(made.b, tensors["lora_beam_B"] * shares)


def test_how_many_ranks_stay_follows_from_p():
    shares = [torch.tensor([4.0, 2.0, 1.0, 1.0]).double(), torch.tensor([3.0, 3.0, 2.0, 0.0])]
    shares[1] = shares[1].double()
    for p, kept in ((1.0, 8), (0.9, 6), (15 / 16, 7), (0.5, 3), (0.1, 1)):
        masks = kept_ranks(shares, p)
        assert sum(int(mask.sum()) for mask in masks) == kept, p
    assert kept_ranks(shares, 0.9)[1].tolist() == [True, True, True, False]


def set_q(model, values):
    with torch.no_grad():
        for linear in linears_of(model):
            linear.tensors("default")["lora_beam_core"].copy_(torch.tensor(values))


Q = [0.1, 0.05, 0.0, 0.0, -0.05, -0.2]


def test_nothing_goes_at_the_start_and_the_least_at_the_end():
    model = attached("beamlora")
    set_q(model, Q)
    search = BeamSearch(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert search.step(None, 0.0) == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    count = search.step(None, 1.0)
    expected = kept_ranks([s.double() for s in map(_softmax6, [Q] * len(search.linears))], 0.95)
    # At most half of a module's six.
    assert count == sum(min(int((~kept).sum()), 3) for kept in expected) > 0


def _softmax6(q):
    return 6 * torch.softmax(torch.tensor(q) / 0.05, 0)


def test_copies_come_from_the_earlier_state_with_their_moments():
    model = attached("beamlora")
    set_q(model, Q)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ids = prompts(2, LENGTH)

    def train():
        optimizer.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()

    train()
    search = BeamSearch(model)
    search.step(optimizer, 0.0)  # keeps this state
    linear = linears_of(model)[0]
    a, b, q = (linear.tensors("default")[f"lora_beam_{n}"] for n in ("A", "B", "core"))
    then = [a.detach().clone(), b.detach().clone(), optimizer.state[a]["exp_avg"].clone()]
    train()
    set_q(model, Q)
    now = a.detach().clone()
    search.step(optimizer, 1.0)
    copied = (a.detach() != now).any(1).nonzero()[:, 0].tolist()
    assert copied == [5] or copied == [4, 5]
    for rank, source in zip(reversed(copied), range(2), strict=False):  # least from best
        assert torch.equal(a[rank], then[0][source]) and torch.equal(b[:, rank], then[1][:, source])
        assert torch.equal(optimizer.state[a]["exp_avg"][rank], then[2][source])
        mean = (Q[source] + Q[rank]) / 2
        assert q[rank].item() == q[source].item() == pytest.approx(mean)
    assert not optimizer.state[q]["exp_avg"].any() and not optimizer.state[q]["exp_avg_sq"].any()
    assert optimizer.state[a]["exp_avg_sq"].any()


def test_copies_of_today_change_the_shares_alone():
    """With the current state as the cached one, a source and its copy share its old direction."""
    model = attached("beamlora")
    set_q(model, Q)
    search = BeamSearch(model)  # remembers what the model is now
    old = [linear.tensors("default") for linear in linears_of(model)]
    old = [{k: v.detach().clone() for k, v in t.items()} for t in old]
    assert search.step(None, 1.0) > 0
    kind = get_kind("beamlora")
    for linear, before in zip(linears_of(model), old, strict=True):
        spec, after = linear.specs["default"], linear.tensors("default")
        made = kind.materialise(after, {}, spec)
        shares = kind.shares(after, spec).detach()
        is_copy = (after["lora_beam_A"] != before["lora_beam_A"]).any(1)
        sources = [
            int((before["lora_beam_A"] == row).all(1).nonzero()[0]) for row in after["lora_beam_A"]
        ]
        merged = torch.zeros(6).index_add(0, torch.tensor(sources), shares)
        assert (merged[is_copy] == 0).all() and merged.sum().item() == pytest.approx(6, rel=1e-6)
        want = before["lora_beam_B"] @ torch.diag(merged) @ before["lora_beam_A"]
        torch.testing.assert_close(made.b @ made.a, want)


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = prompts(16, LENGTH)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def test_in_a_trainer(tmp_path):
    model = attached("beamlora", tau=0.02)
    set_q(model, Q)
    callback = BeamCallback(model, every=2)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=7, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback]).train()
    assert len(callback.replaced) == 3 and callback.replaced[-1] > 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(math.isclose(s.detach().sum().item(), 6, rel_tol=1e-5) for s in shares_of(model))


def test_beam_search_refuses():
    with pytest.raises(ValueError, match="experts must be of kind beamlora, got lora"):
        BeamSearch(attached("lora"))
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0.0"):
        BeamSearch(attached("beamlora"), keep=0.0)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        BeamCallback(attached("beamlora"), every=0)
