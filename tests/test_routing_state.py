"""RoutingState: read, compare, save, load, pin; adapters chosen per row."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from test_routing import LENGTHS, NUM_BLOCKS, make_model, pad, randomize, route_of
from tiny_models import ragged_prompts

import milora
from milora import RoutingState


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def prompts():
    return ragged_prompts(LENGTHS, seed=7)


@pytest.fixture(scope="module")
def state(model, prompts):
    batch = pad(prompts, "left")
    return route_of(model, batch["input_ids"], attention_mask=batch["attention_mask"])


def test_shapes_and_names(model, state):
    assert state.gates.shape == state.probabilities.shape == (NUM_BLOCKS, len(LENGTHS), 7)
    assert state.names[0] == tuple(
        f"self_attn.{n}_proj" for n in "qkvo"
    ) + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))  # fmt: skip
    assert state.adapters == ("default",) * 3
    assert state.prompt_lengths.tolist() == list(LENGTHS)
    torch.testing.assert_close(state.probabilities.sum(-1), torch.ones(NUM_BLOCKS, 3))
    assert ((state.gates > 0).sum(-1) == 3).all()
    kept = set(state.active_names(1, 2))
    assert kept == {n for n, g in zip(state.names[1], state.gates[1, 2], strict=True) if g > 0}


def test_margin_is_between_last_kept_and_first_dropped(state):
    ordered = state.probabilities.sort(-1, descending=True).values
    torch.testing.assert_close(state.margins, ordered[..., 2] - ordered[..., 3])


def test_margin_is_infinite_where_nothing_was_dropped(prompts):
    everything = route_of(make_model(top_k=7), prompts[0][None])
    assert everything.margins.isinf().all()


def test_save_and_load(state, tmp_path):
    path = tmp_path / "route.safetensors"
    state.save(path)
    loaded = RoutingState.load(path)
    assert loaded.same_route(state)
    assert torch.equal(loaded.probabilities, state.probabilities)
    assert (loaded.names, loaded.blocks, loaded.adapters) == (
        state.names,
        state.blocks,
        state.adapters,
    )
    assert loaded.prompt_lengths.tolist() == list(LENGTHS)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_is_not_there_is_named(state, tmp_path):
    with pytest.raises(IndexError, match=rf"layer must be in \[0, {NUM_BLOCKS}\), got 9"):
        state.active_names(layer=9)
    with pytest.raises(IndexError, match=r"row must be in \[0, \d\), got -9"):
        state.active_names(layer=0, row=-9)
    with pytest.raises(FileNotFoundError, match=r"RoutingState\.save: no folder .*nowhere"):
        state.save(tmp_path / "nowhere" / "route.safetensors")


def test_load_refuses_other_files(state, tmp_path):
    with pytest.raises(FileNotFoundError):
        RoutingState.load(tmp_path / "none")
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x00" * 64)
    with pytest.raises(ValueError, match="no routing state"):
        RoutingState.load(garbage)
    foreign = tmp_path / "foreign"
    save_file({"gates": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="must hold milora_routing_state version 1"):
        RoutingState.load(foreign)
    state.save(tmp_path / "route")
    whole = (tmp_path / "route").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="no routing state"):
        RoutingState.load(tmp_path / "cut")


def test_same_route_sees_choice_and_strength(model, prompts, state):
    assert state.same_route(state)
    assert not state.select(0).same_route(state.select(1))
    near = state.select(0)
    near.block_gates = [gates * 1.01 for gates in near.block_gates]
    assert not near.same_route(state.select(0))
    assert near.same_route(state.select(0), tolerance=0.02)
    assert not state.same_route(state.select(0))


def test_a_pinned_route_serves_every_row(model, prompts, state):
    ids = prompts[1][None]
    mine = route_of(model, ids)
    with torch.no_grad():
        own = model(ids, use_cache=True).logits
    milora.reset_stats(model)
    with milora.pin_route(model, mine), torch.no_grad():
        pinned = model(ids.expand(2, -1)).logits  # no cache, no labels: nothing is routed
    assert milora.stats(model) == milora.Stats(0, 0)
    torch.testing.assert_close(pinned, own.expand(2, -1, -1), rtol=1e-5, atol=1e-5)
    with milora.pin_route(model, state.select(0)), torch.no_grad():
        assert (model(ids).logits - own).abs().max() > 1e-2
    with milora.pin_route(model, state), pytest.raises(ValueError, match="2 rows cannot follow"):
        model(ids.expand(2, -1))


def test_a_pinned_route_survives_a_file(model, prompts, tmp_path):
    ids = prompts[1][None]
    route_of(model, ids).save(tmp_path / "route")
    want = model.generate(ids, max_new_tokens=5, do_sample=False)
    with milora.pin_route(model, RoutingState.load(tmp_path / "route")):
        got = model.generate(ids, max_new_tokens=5, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(got, want), "with a known route even chunked prefill is exact"


def test_a_route_of_another_model_is_refused(model, prompts):
    other = make_model(target_modules=["q_proj", "v_proj"])
    foreign = route_of(other, prompts[0][None])
    with pytest.raises(ValueError, match="other modules"), milora.pin_route(model, foreign):
        pass


# ---- several adapters ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tenants():
    """Adapters of three kinds, with other ranks, routers, and modules, on one model."""
    model = make_model()
    configs = {
        "dora": milora.MiLoRAConfig(rank=3, expert="dora", top_k=2, pooler="mean"),
        "plain": milora.MiLoRAConfig(rank=5, router=False),
        "narrow": milora.MiLoRAConfig(
            rank=2, target_modules=["v_proj", "down_proj"], top_k=1, activation="relu"
        ),
    }
    for seed, (name, config) in enumerate(configs.items()):
        milora.attach(model, config, name)
        randomize(model, seed)
    return model.eval()


NAMES = ["default", "dora", None, "plain", "narrow", "__base__"]


def test_each_row_is_its_own_tenant(tenants, prompts):
    rows = [prompts[i % 3] for i in range(len(NAMES))]
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    mixed = tenants.generate(**pad(rows, "left"), adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        alone = tenants.generate(rows[row][None], adapter_names=[name], **options)
        torch.testing.assert_close(
            torch.stack(mixed.logits, 1)[row],
            torch.stack(alone.logits, 1)[0],
            rtol=1e-4,
            atol=1e-4,
        )
    with milora.disabled(tenants):
        base = tenants.generate(**pad(rows, "left"), **options)
    for row, name in enumerate(NAMES):
        same = torch.equal(torch.stack(base.logits)[:, row], torch.stack(mixed.logits)[:, row])
        assert same == (name in (None, "__base__")), "bare rows are the bare model bit for bit"


def test_mixed_beams_follow_their_prompt(tenants, prompts):
    rows = [prompts[i % 3] for i in range(3)]
    names = ["default", None, "narrow"]
    mixed = tenants.generate(
        **pad(rows, "left"), adapter_names=names, num_beams=3, max_new_tokens=4, do_sample=False
    )
    for row, name in enumerate(names):
        alone = tenants.generate(
            rows[row][None], adapter_names=[name], num_beams=3, max_new_tokens=4, do_sample=False
        )
        assert torch.equal(mixed[row, -4:], alone[0, -4:])


def test_unknown_or_missing_names_are_refused(tenants, prompts):
    with pytest.raises(ValueError, match=r"unknown \['nobody'\]"):
        tenants.generate(prompts[0][None], adapter_names=["nobody"], max_new_tokens=1)
    with pytest.raises(ValueError, match="one adapter per prompt"):
        tenants.generate(**pad(prompts, "left"), adapter_names=["dora"] * 2, max_new_tokens=1)


def test_several_adapters_train_in_one_batch(tenants, prompts):
    """Each row trains its own adapter; gradients equal those of separate runs."""
    rows = [torch.cat([p, p[:4]]) for p in prompts]
    batch = pad(rows, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, length in enumerate(LENGTHS):
        labels[row, :length] = -100
    names = ["default", "dora", "narrow"]
    tenants.train()
    for config in milora.adapters(tenants).values():
        config.balance_coef = 0.0  # its window mixes rows by design
    count = (labels[:, 1:] != -100).sum()

    def gradients() -> dict[str, torch.Tensor]:
        found = {n: p.grad.clone() for n, p in tenants.named_parameters() if p.grad is not None}
        tenants.zero_grad(set_to_none=True)
        return found

    tenants(**batch, labels=labels, adapter_names=names, num_items_in_batch=count).loss.backward()
    together = gradients()
    for row, name in enumerate(names):
        tenants(
            rows[row][None],
            labels=labels[row : row + 1, : len(rows[row])],
            adapter_names=[name],
            num_items_in_batch=count,
        ).loss.backward()
        separate = {n: g for n, g in gradients().items() if g.abs().max() > 0}
        assert any(f".{name}." in key for key in separate)
        for key, gradient in separate.items():
            torch.testing.assert_close(together[key], gradient, rtol=1e-4, atol=1e-6)
    tenants.eval()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_model_is_independent(prompts, how):
    model = make_model()
    want = model.generate(prompts[0][None], max_new_tokens=4, do_sample=False)
    twin = how(model)
    milora.reset_stats(model)
    assert torch.equal(twin.generate(prompts[0][None], max_new_tokens=4, do_sample=False), want)
    assert milora.stats(model) == milora.Stats(0, 0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    milora.detach(twin)
    assert milora.adapters(twin) == {}
    assert torch.equal(model.generate(prompts[0][None], max_new_tokens=4, do_sample=False), want)
