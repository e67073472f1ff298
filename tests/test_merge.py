"""Merging adapters: exactness of each method in float64, and folders in and out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from expert_cases import move
from safetensors.torch import load_file, save_file
from tiny_models import build, prompts, randomize

import milora
from milora import MiLoRAConfig
from milora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, sha256_of
from milora.attach import runtime_of
from milora.cli import main
from milora.merge import METHODS, LowRank, compress, distance, weighted_stack
from milora.merge.methods import fair

D_OUT, D_IN, LENGTH = 24, 20, 7
PLAIN = {"router": False}


def update(rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a = torch.empty(rank, D_IN, dtype=torch.float64).normal_(generator=generator)
    b = torch.empty(D_OUT, rank, dtype=torch.float64).normal_(generator=generator)
    return LowRank(a, b)


def dense(u: LowRank) -> torch.Tensor:
    return u.b @ u.a


def weighted(updates, weights) -> torch.Tensor:
    return sum(w * dense(u) for u, w in zip(updates, weights, strict=True))


MIXED = [update(rank, seed) for seed, rank in enumerate((2, 4, 3))]
EQUAL = [update(3, seed) for seed in range(3, 6)]
WEIGHTS = [0.5, 0.3, 0.2]


# ---- factors ------------------------------------------------------------------------------------


def test_norm_and_distance_keep_their_digits():
    u = MIXED[0]
    assert u.norm() == pytest.approx(dense(u).norm().item(), rel=1e-13)
    near = LowRank(u.a * (1 + 1e-12), u.b)
    assert distance(u, near) == pytest.approx(1e-12 * u.norm(), rel=1e-2)
    assert distance(u, LowRank(u.a.flip(0), u.b.flip(1))) < 1e-13


@pytest.mark.parametrize("rank", [1, 4, 9, None])
def test_compress_is_the_best_approximation(rank):
    stacked = weighted_stack(MIXED, WEIGHTS)
    found = compress(stacked, rank)
    assert found.rank == (9 if rank is None else rank)
    s = torch.linalg.svdvals(dense(stacked))
    assert distance(found, stacked) == pytest.approx(s[found.rank :].norm().item(), abs=1e-12)
    torch.testing.assert_close(found.a.norm(dim=1), found.b.norm(dim=0))


def test_compress_finds_the_rank():
    doubled = weighted_stack([MIXED[0], MIXED[0]], [1.0, 2.0])
    assert compress(doubled).rank == 2
    torch.testing.assert_close(dense(compress(doubled)), 3 * dense(MIXED[0]))
    assert compress(weighted_stack([MIXED[0], MIXED[0]], [1.0, -1.0])).rank <= 1


# ---- methods ------------------------------------------------------------------------------------


def test_stack_is_exact_for_mixed_ranks_and_means_of_factors_are_not():
    merged = METHODS["stack"].apply(MIXED, WEIGHTS, None)
    assert merged.rank == 9
    torch.testing.assert_close(dense(merged), weighted(MIXED, WEIGHTS))
    means = [
        sum(w * getattr(u, side) for u, w in zip(EQUAL, WEIGHTS, strict=True)) for side in "ab"
    ]
    wrong = means[1] @ means[0] - weighted(EQUAL, WEIGHTS)
    assert wrong.norm() > 0.3 * weighted(EQUAL, WEIGHTS).norm()


def test_sum_and_svd():
    torch.testing.assert_close(
        dense(METHODS["sum"].apply(MIXED, WEIGHTS, None)), weighted(MIXED, WEIGHTS)
    )
    assert METHODS["svd"].apply(MIXED, WEIGHTS, None).rank == 4
    exact = METHODS["svd"].apply(MIXED, WEIGHTS, 9)
    torch.testing.assert_close(dense(exact), weighted(MIXED, WEIGHTS))


def test_ffa_is_exact_and_noise_on_b_enters_linearly():
    shared = [LowRank(EQUAL[0].a, u.b) for u in EQUAL]
    merged = METHODS["ffa"].apply(shared, WEIGHTS, None)
    assert merged.rank == 3
    torch.testing.assert_close(dense(merged), weighted(shared, WEIGHTS))
    noise = torch.randn(D_OUT, 3, dtype=torch.float64)
    moved = [(LowRank(u.a, u.b + t * noise)) for u, t in zip(shared, (1.0, 1.0, 1.0), strict=True)]
    twice = [LowRank(u.a, u.b + 2 * noise) for u in shared]
    changes = [
        dense(METHODS["ffa"].apply(x, WEIGHTS, None)) - dense(merged) for x in (moved, twice)
    ]
    torch.testing.assert_close(changes[1], 2 * changes[0])
    with pytest.raises(ValueError, match="ffa: the adapters must share one A"):
        METHODS["ffa"].apply(EQUAL, WEIGHTS, None)


def test_fair_ridge():
    target = weighted(EQUAL, WEIGHTS)
    mean_a, mean_b = (
        sum(w * getattr(u, side) for u, w in zip(EQUAL, WEIGHTS, strict=True)) for side in "ab"
    )
    merged = fair(EQUAL, WEIGHTS, None, regularization=0.01)
    assert torch.equal(merged.a, mean_a)
    before, after = (mean_b @ mean_a - target).norm(), (dense(merged) - target).norm()
    assert after < 0.95 * before

    delta = (merged.b - mean_b).requires_grad_()  # a minimum: the gradient is 0 there
    loss = (target - (mean_b + delta) @ mean_a).square().sum() + 0.01 * delta.square().sum()
    (gradient,) = torch.autograd.grad(loss, delta)
    assert gradient.abs().max() < 1e-10
    stiff = fair(EQUAL, WEIGHTS, None, regularization=1e12)
    torch.testing.assert_close(stiff.b, mean_b)  # FedAvg
    same = fair([EQUAL[0]] * 3, WEIGHTS, None)
    torch.testing.assert_close(same.b, EQUAL[0].b)  # alike clients: nothing to correct


def test_fair_cosine():
    target = weighted(EQUAL, WEIGHTS)

    def objective(merged, regularization):
        product = dense(merged)
        cosine = (product * target).sum() / (product.norm() * target.norm())
        return 1 - cosine + regularization * (merged.b - mean_b).norm()

    mean_b = sum(w * u.b for u, w in zip(EQUAL, WEIGHTS, strict=True))
    start = fair(EQUAL, WEIGHTS, None, solver="cosine", steps=1)
    torch.testing.assert_close(start.b, mean_b)
    merged = fair(EQUAL, WEIGHTS, None, solver="cosine", regularization=0.0)
    assert objective(merged, 0.0) < 0.9 * objective(start, 0.0)
    merged = fair(EQUAL, WEIGHTS, None, solver="cosine", regularization=0.01)
    assert objective(merged, 0.01) <= objective(start, 0.01)


@pytest.mark.parametrize("bad", [{"regularization": -1.0}, {"solver": "sgd"},
                                 {"regularization": math.nan}])  # fmt: skip
def test_fair_refuses(bad):
    with pytest.raises(ValueError, match="regularization must be >= 0 and solver ridge or cosine"):
        fair(EQUAL, WEIGHTS, None, **bad)


def test_fair_needs_one_rank():
    with pytest.raises(ValueError, match=r"fair: the adapters must have one rank, got \[2, 3, 4\]"):
        fair(MIXED, WEIGHTS, None)


def lego(updates, rank, weights=None):
    return METHODS["lego"].apply(updates, weights or [1.0] * len(updates), rank)


def test_lego_with_all_units_is_the_sum():
    for rank in (9, 200):
        torch.testing.assert_close(dense(lego(MIXED, rank)), weighted(MIXED, [1.0] * 3))
    torch.testing.assert_close(dense(lego(MIXED, 9, [0.5, -2.0, 1.0])),
                               weighted(MIXED, [0.5, -2.0, 1.0]))  # fmt: skip


def test_lego_of_copies_is_one_copy():
    scrambled = []
    for seed in range(4):  # the same update with its units in another order, scaled and flipped
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(4, generator=generator)
        factor = torch.empty(4, dtype=torch.float64).uniform_(-3, 3, generator=generator)
        u = MIXED[1]
        scrambled.append(LowRank(factor[:, None] * u.a[order], u.b[:, order] / factor))
    merged = lego(scrambled, 4)
    assert merged.rank == 4
    torch.testing.assert_close(dense(merged), dense(MIXED[1]))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_lego_does_not_depend_on_the_order(rank):
    first = dense(lego(MIXED, rank))
    for order in ((2, 0, 1), (1, 0, 2)):
        torch.testing.assert_close(dense(lego([MIXED[i] for i in order], rank)), first)


def test_lego_centroids_have_the_mean_norm_of_their_members():
    merged = lego(MIXED, 1)
    units = torch.cat([torch.cat([u.a, u.b.T], 1) for u in MIXED])
    norms = [
        math.sqrt(2 * float(unit[:D_IN].norm() * unit[D_IN:].norm())) for unit in units
    ]  # balanced: |a| = |b| = √(|a| |b|)
    length = torch.cat([merged.a, merged.b.T], 1).norm()
    assert float(length) == pytest.approx(sum(norms) / len(norms))


def test_lego_of_nothing():
    zero = LowRank(torch.zeros(2, D_IN).double(), torch.zeros(D_OUT, 2).double())
    assert not dense(lego([zero, zero], None)).any()
    torch.testing.assert_close(dense(lego([zero, MIXED[0]], None)), dense(MIXED[0]))


# ---- folders ------------------------------------------------------------------------------------


def adapter(folder, options=None, *, seed=1, rank=4, model=None):
    """A saved adapter without a router, and the model that carries it."""
    model = milora.attach(build("llama"), MiLoRAConfig(rank=rank, **{**PLAIN, **(options or {})}))
    randomize(model, seed=seed)
    for linears in runtime_of(model).linears:
        for linear in linears:
            move(linear.trained("default"), frozenset(), 0.05, seed=seed)
    milora.save(model, folder)
    return model


def updates_on(model, name="default") -> dict[str, torch.Tensor]:
    runtime = runtime_of(model)
    found = {}
    for block, linears in zip(runtime.blocks, runtime.linears, strict=True):
        for linear in linears:
            if name in linear.specs:
                w = linear.weights(name)
                path = f"{block.path}.{block.experts[linear.column]}"
                found[path] = w.scale * (w.b.double() @ w.a.double()).detach()
    return found


def merged_updates(folder) -> dict[str, torch.Tensor]:
    return updates_on(milora.load(build("llama"), folder))


DIFFERENT = [
    {"alpha": 12.0},
    {"rank_pattern": {"q_proj": 2}, "rslora": True},
    {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"up_proj": 1.5}},
]


@pytest.mark.parametrize("method", ["stack", "sum", "svd"])
def test_folders_of_mixed_ranks_scales_and_modules(tmp_path, method):
    models = [
        adapter(tmp_path / str(i), options, seed=i + 1, rank=3 + i)
        for i, options in enumerate(DIFFERENT)
    ]
    rank = 12 if method == "svd" else None
    report = milora.merge(
        [tmp_path / str(i) for i in range(3)], tmp_path / "out", method, WEIGHTS, rank=rank
    )
    assert report.error < 1e-12
    found = merged_updates(tmp_path / "out")
    every = [updates_on(model) for model in models]
    assert found.keys() == every[0].keys() == report.ranks.keys()
    for path, got in found.items():
        pairs = [(u[path], w) for u, w in zip(every, WEIGHTS, strict=True) if path in u]
        expected = sum(w * u for u, w in pairs)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_peft_reads_and_writes_what_is_merged(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 2},
        init_lora_weights=False, use_rslora=True,
    )  # fmt: skip
    theirs = peft.get_peft_model(build("llama"), config)
    theirs.save_pretrained(tmp_path / "peft")
    ours = adapter(tmp_path / "ours", {"target_modules": ["q_proj", "k_proj"]})
    milora.merge([tmp_path / "peft", tmp_path / "ours"], tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "out")
    mine = updates_on(ours)
    for path in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.k_proj"):
        whole = f"model.layers.1.{path}"
        got = loaded.base_model.model.get_submodule(whole).get_delta_weight("default").double()
        expected = mine.get(whole, torch.zeros(1)) / 2
        if "k_proj" not in path:
            delta = theirs.base_model.model.get_submodule(whole).get_delta_weight("default")
            expected = expected + delta.double() / 2
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


KINDS = {
    "ffa_lora": {"expert": "ffa_lora"},
    "lora_mini": {"expert": "lora_mini", "expert_options": {"inner_in": 6, "inner_out": 5}},
    "loldu": {"expert": "loldu"},
    "melora": {"expert": "melora"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_need_the_model_and_it_may_be_meta(tmp_path, kind):
    models = [adapter(tmp_path / str(seed), KINDS[kind], seed=seed, rank=2) for seed in (1, 2)]
    folders = [tmp_path / "1", tmp_path / "2"]
    with pytest.raises(ValueError, match=f"experts of kind '{kind}'.*give the model"):
        milora.merge(folders, tmp_path / "out")
    method = "ffa" if kind == "ffa_lora" else "stack"
    milora.merge(folders, tmp_path / "out", method, model=build("llama").to("meta"))
    found, every = merged_updates(tmp_path / "out"), [updates_on(model) for model in models]
    for path, got in found.items():
        expected = (every[0][path] + every[1][path]) / 2
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert kind != "ffa_lora" or milora.load(build("llama"), tmp_path / "out")


def test_merging_one_adapter_gives_its_logits(tmp_path):
    model = adapter(tmp_path / "one", {"alpha": 9.0})
    milora.merge([tmp_path / "one"], tmp_path / "out")
    loaded = milora.load(build("llama"), tmp_path / "out")
    with torch.no_grad():
        expected, got = (m(prompts(2, LENGTH)).logits for m in (model, loaded))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_failed_merge_writes_nothing(tmp_path):
    adapter(tmp_path / "a")
    milora.save(milora.attach(build("llama"), MiLoRAConfig(rank=2)), tmp_path / "routed")
    with pytest.raises(milora.AdapterError, match=r"has a router.*export a route first"):
        milora.merge([tmp_path / "a", tmp_path / "routed"], tmp_path / "out")
    adapter(tmp_path / "dora", {"expert": "dora"})
    with pytest.raises(milora.AdapterError, match="dora experts are no low-rank update"):
        milora.merge([tmp_path / "dora"], tmp_path / "out", model=build("llama"))
    adapter(tmp_path / "q", {"target_modules": ["q_proj"]})
    with pytest.raises(ValueError, match="proj is not in all adapters; use stack"):
        milora.merge([tmp_path / "a", tmp_path / "q"], tmp_path / "out", "fair")
    with pytest.raises(ValueError, match=r"q_proj.*: ffa: the adapters must share one A"):
        adapter(tmp_path / "q2", {"target_modules": ["q_proj"], "seed": 9})
        milora.merge([tmp_path / "q", tmp_path / "q2"], tmp_path / "out", "ffa")
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        milora.merge([tmp_path / "nothing"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite(folder, change) -> None:
    """Change a folder's tensors and keep its sum right."""
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["sha256"] = sha256_of(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
DAMAGE = {
    "nan": (lambda t: t[f"{Q}A.weight"].view(-1)[:1].fill_(math.nan), "holds NaN or Inf"),
    "missing": (lambda t: t.pop(f"{Q}A.weight"), r"needs lora_A \[rank, d_in\]"),
    "unknown": (lambda t: t.update(other=torch.ones(2)), "unknown tensor other"),
    "shape": (lambda t: t.update({f"{Q}B.weight": torch.ones(32, 3)}), r"and \[32, 3\]"),
    "rank": (lambda t: t.update({f"{Q}A.weight": torch.ones(3, 32),
                                 f"{Q}B.weight": torch.ones(32, 3)}), "rank must be 4"),
    "dtype": (lambda t: t.update({f"{Q}A.weight": t[f"{Q}A.weight"].double()}),
              "dtype must be one of F32, BF16, F16, got F64"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders(tmp_path, case):
    change, message = DAMAGE[case]
    adapter(tmp_path / "a")
    rewrite(tmp_path / "a", change)
    with pytest.raises(milora.AdapterError, match=message):
        milora.merge([tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "mean"}, "merge: method must be one of stack, sum, svd, ffa, fair, lego"),
        ({"weights": [1.0]}, "merge: weights must be 2 finite numbers, one per folder"),
        ({"weights": [1.0, math.inf]}, "merge: weights must be 2 finite numbers"),
        ({"rank": 4}, "merge: rank is for svd and lego; stack has its own"),
        ({"method": "svd", "rank": 0}, r"merge: rank must be an integer in \[1, 256\], got 0"),
        ({"solver": "ridge"}, r"merge: stack has no options \['solver'\]; known: none"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        milora.merge([tmp_path, tmp_path], tmp_path / "out", **arguments)


def test_a_stack_that_could_not_be_served_is_refused(tmp_path):
    adapter(tmp_path / "wide", {"target_modules": ["q_proj"]}, rank=200)
    with pytest.raises(ValueError, match="would have rank 400, more than the 256"):
        milora.merge([tmp_path / "wide"] * 2, tmp_path / "out")
    assert milora.merge([tmp_path / "wide"] * 2, tmp_path / "out", "sum").error < 1e-12


# ---- the command --------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    for seed in (1, 2):
        adapter(tmp_path / str(seed), seed=seed)
    folders = [str(tmp_path / "1"), str(tmp_path / "2")]
    out = str(tmp_path / "out")
    argv = ["merge", *folders, "--method", "svd", "--rank", "5", "--weights", "0.7", "0.3",
            "--output", out, "--json", "-"]  # fmt: skip
    assert main(argv) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert set(result["ranks"].values()) == {5} and 0 < result["error"] < 1
    assert "14 modules written" in printed.err
    milora.merge(folders, tmp_path / "again", "svd", [0.7, 0.3], rank=5)
    sums = [sha256_of(tmp_path / name / WEIGHTS_FILE) for name in ("out", "again")]
    assert sums[0] == sums[1]
    assert main(argv) == 2 and "is not empty" in capsys.readouterr().err


def test_command_with_a_model(tmp_path, capsys):
    build("llama").config.save_pretrained(tmp_path / "base")  # no weights there, none are needed
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapter(tmp_path / "a", KINDS["lora_mini"])
    argv = ["merge", str(tmp_path / "a"), "--output", str(tmp_path / "out")]
    assert main(argv) == 2 and "give the model" in capsys.readouterr().err
    assert main([*argv, "--model", str(tmp_path / "base")]) == 0
    assert len(merged_updates(tmp_path / "out")) == 14


def test_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["merge", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert "no adapter folder at" in capsys.readouterr().err
    milora.save(milora.attach(build("llama"), MiLoRAConfig(rank=2)), tmp_path / "routed")
    assert main(["merge", str(tmp_path / "routed"), "--output", str(tmp_path / "out")]) == 2
    assert "has a router" in capsys.readouterr().err
