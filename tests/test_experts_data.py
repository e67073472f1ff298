"""Starts that are made from data: gradients (LoRA-GA, LoRA-SB) and inputs (EVA)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import build, prompts

import milora
from milora import MiLoRAConfig
from milora.attach import runtime_of
from milora.eva import IncrementalPCA, redistribute
from milora.experts.decompose import top_svd

PLAIN = {"router": False, "rank": 3}
PATH = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def batches(count: int = 3, length: int = 9) -> list[dict]:
    found = []
    for seed in range(count):
        ids = prompts(2, length, seed=seed)
        labels = ids.clone()
        labels[:, :4] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def true_gradients(model) -> dict[str, torch.Tensor]:
    """Mean dL/dW of every linear in the blocks, by plain autograd on the bare model."""
    model = copy.deepcopy(model).requires_grad_(True)
    for batch in batches():
        (model(**batch).loss / 3).backward()
    return {
        name.removesuffix(".weight"): p.grad
        for name, p in model.named_parameters()
        if "proj" in name
    }


def dense_updates(model) -> dict[str, torch.Tensor]:
    found = {}
    for block, linears in zip(runtime_of(model).blocks, runtime_of(model).linears, strict=True):
        for linear in linears:
            w = linear.weights("default")
            path = f"{block.path}.{block.experts[linear.column]}"
            found[path] = w.scale * (w.b.double() @ w.a.double())
    return found


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("modules_per_pass", [None, 5])
def test_ga_starts_from_the_gradient_and_leaves_the_model_as_it_is(modules_per_pass):
    bare = build("llama")
    gradients = true_gradients(bare)
    model = milora.attach(copy.deepcopy(bare), MiLoRAConfig(expert="lora_ga", **PLAIN))
    milora.init_from_gradients(model, batches(), modules_per_pass=modules_per_pass, gamma=4.0)
    ids = prompts(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bare(ids).logits)
    linear = model.get_submodule(PATH)
    t = linear.tensors("default")
    u, _, vt = top_svd(gradients[PATH].double(), 6)
    c = linear.d_out**0.25 / 2
    got = t["lora_ga_B"].double() @ t["lora_ga_A"].double()
    torch.testing.assert_close(got, c * c * u[:, 3:] @ vt[:3], rtol=0, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())

    # One SGD step on A and B moves every dW along the best rank-6 approximation of its gradient.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches():
        (model(**batch).loss / 3).backward()
    optimizer.step()
    for path, update in dense_updates(model).items():
        u, s, vt = top_svd(gradients[path].double(), 6)
        best = u @ torch.diag(s) @ vt
        cosine = -(update * best).sum() / (update.norm() * best.norm())
        assert cosine > 0.999, path


def test_sb_starts_as_the_first_step():
    bare = build("llama")
    gradients = true_gradients(bare)
    model = milora.attach(copy.deepcopy(bare), MiLoRAConfig(expert="lora_sb", alpha=6.0, **PLAIN))
    assert not any(update.any() for update in dense_updates(model).values())
    milora.init_from_gradients(model, batches(), step=1e-2)
    for path, update in dense_updates(model).items():
        step = -1e-2 * gradients[path].double().sign()
        s = torch.linalg.svdvals(step)
        assert (update - step).norm().item() == pytest.approx(s[3:].norm().item(), rel=1e-3), path
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_sb_core" in name for name in trainable)


def test_own_loss_with_a_router_and_a_second_adapter():
    model = milora.attach(build("llama"), MiLoRAConfig(rank=2), "other")
    milora.attach(model, MiLoRAConfig(expert="lora_ga", rank=2), "ga")
    model.train()
    flags = [p.requires_grad for p in model.parameters()]
    seen = []

    def loss(model, batch):
        seen.append(model.training)
        return model(batch).logits.square().mean()

    milora.init_from_gradients(model, (prompts(2, 5, seed=s) for s in (1, 2)), "ga", loss=loss)
    assert seen == [False, False] and model.training
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(linear.weights("ga").a.any() for row in runtime_of(model).linears for linear in row)
    assert not any(len(module._forward_hooks) for name, module in model.named_modules() if
                   name.endswith("base_layer"))  # fmt: skip


def test_gradients_are_refused_by_name(tmp_path):
    model = milora.attach(build("llama"), MiLoRAConfig(rank=2))
    with pytest.raises(ValueError, match="expert must be lora_ga or lora_sb, got lora"):
        milora.init_from_gradients(model, batches())
    model = milora.attach(build("llama"), MiLoRAConfig(rank=2, expert="lora_ga"))
    with pytest.raises(ValueError, match="no adapter 'x'"):
        milora.init_from_gradients(model, batches(), "x")
    with pytest.raises(ValueError, match="must hold one or more, got none"):
        milora.init_from_gradients(model, [])
    with pytest.raises(ValueError, match="must have labels, or give a loss"):
        milora.init_from_gradients(model, [{"input_ids": prompts(1, 4)}])

    def embedding_only(model, batch):
        return model.get_input_embeddings()(batch["input_ids"]).sum() + torch.zeros(
            (), requires_grad=True
        )

    with pytest.raises(ValueError, match=r"no gradient reached model\.layers\.0\.self_attn"):
        milora.init_from_gradients(model, batches(), loss=embedding_only)


# ---- EVA ----------------------------------------------------------------------------------------


def inputs_of(model, path: str, given: list[dict]) -> torch.Tensor:
    """What a module of the bare model reads, at the tokens that have labels."""
    rows = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: rows.append(args[0].detach())
    )
    with torch.no_grad():
        for batch in given:
            model(**batch)
    handle.remove()
    counted = [(batch["labels"] != -100) for batch in given]
    return torch.cat([x[mask] for x, mask in zip(rows, counted, strict=True)]).double()


def test_incremental_pca_is_exact_when_it_drops_nothing():
    x = torch.randn(50, 8, dtype=torch.float64) @ torch.diag(torch.linspace(3, 0.3, 8).double())
    x = x + torch.randn(8).double()
    pca = IncrementalPCA(8)
    for rows in x.split((3, 20, 1, 26)):
        pca.update(rows)
    centred = x - x.mean(0)
    _, s, vt = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(pca.ratios, s.square() / centred.square().sum())
    torch.testing.assert_close(pca.deviations, s / 7)
    torch.testing.assert_close((pca.components * vt).sum(1).abs(), torch.ones(8).double())
    assert pca.seen == 50


def test_incremental_pca_notices_that_it_has_settled():
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    pca = IncrementalPCA(2)
    scales = torch.tensor([8.0, 4.0, *[0.1] * 10], dtype=torch.float64)
    for _ in range(6):
        pca.update(torch.randn(200, 12, dtype=torch.float64) * scales @ basis)
    assert pca.turned < 0.01
    assert (pca.components @ basis[:2].T).abs().diagonal().min() > 0.99


def test_redistribute_keeps_the_total_and_prefers_large_shares():
    ratios = {
        "a": torch.tensor([0.9, 0.05, 0.01]),
        "b": torch.tensor([0.3, 0.3, 0.2]),
        "c": torch.tensor([0.04]),
    }
    assert redistribute(ratios, 4) == {"a": 1, "b": 3, "c": 0}
    assert sum(redistribute(ratios, 6).values()) == 6
    assert sum(redistribute(ratios, 99).values()) == 7


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("options", [{}, {"rslora": True, "alpha": 5.0}])
def test_eva(kind, options):
    bare = build("llama")
    model = copy.deepcopy(bare)
    config = MiLoRAConfig(router=False, rank=3, expert=kind, **options)
    old = config.to_dict()
    new = milora.attach_eva(model, config, batches(), tau=1.0)
    assert config.to_dict() == old and milora.adapters(model)["default"] is new
    ids = prompts(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, bare(ids).logits)  # dW = 0
    scale = (5.0 / math.sqrt(3)) if options else 1.0
    ranks, every = {}, {}
    for block, linears in zip(runtime_of(model).blocks, runtime_of(model).linears, strict=True):
        for linear in linears:
            path = f"{block.path}.{block.experts[linear.column]}"
            spec = linear.specs["default"]
            a = linear.tensors("default")["lora_A"].detach().double()
            ranks[path], every[path] = spec.rank, a
            assert spec.scale == pytest.approx(scale)
            torch.testing.assert_close(a @ a.T, torch.eye(len(a)).double(), rtol=0, atol=1e-5)
            x = inputs_of(bare, path, batches())
            x = x - x.mean(0)
            kept = (x @ a.T).square().sum()
            for seed in range(5):
                generator = torch.Generator().manual_seed(seed)
                q = torch.randn(linear.d_in, len(a), generator=generator).double()
                assert kept > (x @ torch.linalg.qr(q).Q).square().sum()
    assert sum(ranks.values()) == 14 * 3 and max(ranks.values()) > 3
    block = "model.layers.0.self_attn"
    common = min(len(every[f"{block}.{name}_proj"]) for name in "qkv")
    first = [every[f"{block}.{name}_proj"][:common] for name in "qkv"]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])


def test_eva_may_leave_modules_out_and_the_file_says_so(tmp_path):
    model = build("llama")
    config = MiLoRAConfig(rank=1, target_modules=["q_proj", "down_proj"])
    new = milora.attach_eva(model, config, batches(), rho=4.0, trainable=False)
    assert sum(new.rank_pattern.values()) == 4 and len(new.rank_pattern) < 4
    assert set(new.target_modules) == set(new.rank_pattern)
    assert not any(p.requires_grad for p in model.parameters())
    milora.save(model, tmp_path)
    loaded = milora.load(build("llama"), tmp_path)
    assert milora.adapters(loaded)["default"] == new


def test_eva_without_redistribution_and_whitened():
    model = build("llama")
    config = MiLoRAConfig(rank=2, target_modules=["v_proj"])
    new = milora.attach_eva(model, config, batches(), rho=1, whiten=True, tau=1.0)
    assert set(new.rank_pattern.values()) == {2}
    path = "model.layers.1.self_attn.v_proj"
    a = model.get_submodule(path).tensors("default")["lora_A"].detach().double()
    x = inputs_of(build("llama"), path, batches())
    projected = (x - x.mean(0)) @ a.T
    torch.testing.assert_close(projected.std(0), torch.ones(2).double(), rtol=0, atol=0.05)


def test_eva_stops_when_components_have_settled():
    read = []

    def stream():
        for batch in batches(6):
            read.append(1)
            yield batch

    milora.attach_eva(build("llama"), MiLoRAConfig(rank=1), stream(), tau=-1.0)
    assert len(read) == 2


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"expert": "bone"}, {}, "attach_eva: expert must be lora or dora, got 'bone'"),
        ({}, {"rho": 0.5}, "attach_eva: rho must be at least 1, got 0.5"),
        ({}, {"batches": []}, "no token reached model.layers.0.self_attn.q_proj"),
    ],
)
def test_eva_refuses(changes, options, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        milora.attach_eva(
            model, MiLoRAConfig(rank=2, **changes), **{"batches": batches(1), **options}
        )
    assert milora.adapters(model) == {}
