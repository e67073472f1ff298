"""FlyLoRA and SMoRA: kinds whose tokens gate single ranks, on modules and on a model.

The reference is an ordinary model in float64 whose linear modules compute the papers' formula for
each token; the product shares no code with it but the stored tensors.
"""

from __future__ import annotations

import copy

import pytest
import torch
from expert_cases import CASES, base_weight, move, spec_of, trained
from pool_tools import new_pool
from test_checkpointing import batch, checkpoint, gradients
from tiny_models import build, prompts, randomize
from tolerance import assert_as_good_as_torch
from torch import nn

import milora
from milora import MiLoRAConfig, ops
from milora.attach import runtime_of
from milora.experts import get_kind, make_spec
from milora.rank_gates import RankGates

LENGTH = 7
KINDS = ["flylora", "smora"]
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)


def linears_of(model):
    return [linear for linears in runtime_of(model).linears for linear in linears]


def attached(kind: str, name: str = "default", model=None, **changes):
    """A tiny model with an adapter that matters, its biases not 0."""
    settings = {"rank": 4, "expert": kind, "expert_options": CASES[kind][1], **changes}
    model = milora.attach(model or build("llama"), MiLoRAConfig(**settings), name)
    randomize(model, seed=1)
    for i, linear in enumerate(linears_of(model)):
        move(linear.trained(name), frozenset(), 0.2, seed=i)
        biases = {k: v for k, v in linear.tensors(name).items() if k.endswith("_bias")}
        move(biases, frozenset(), 0.02, seed=i)
    return model


def formula(kind: str, t: dict, options: dict, scale: float, x: torch.Tensor) -> torch.Tensor:
    """The update of [num_tokens, d_in], at gate 1."""
    k = options.get("top_k", 8)
    if kind == "flylora":
        hidden = x @ t["flylora_A"].T
        scores = hidden + t["flylora_bias"]
        if options.get("absolute", True):
            scores = scores.abs()
        kept = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0)
        return scale * (hidden * kept) @ t["flylora_B"].T
    z = torch.sigmoid(x @ t["lora_smora_router"].T)
    biased = z.repeat_interleave(options.get("partition", 1), 1) + t["lora_smora_bias"]
    values, chosen = biased.topk(k)
    gates = torch.zeros_like(biased).scatter(1, chosen, k * values / values.sum(1, keepdim=True))
    hidden = gates * (x @ t["lora_smora_A"].T)
    return scale * biased.shape[1] / k * hidden @ t["lora_smora_B"].T  # alpha / k


class Gated(nn.Module):
    """A linear module and what `formula` says."""

    def __init__(self, linear, kind, tensors, spec, gate):
        super().__init__()
        self.linear, self.kind, self.spec, self.gate = linear, kind, spec, gate
        self.tensors = tensors

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        update = formula(self.kind, self.tensors, self.spec.options, self.spec.scale, rows)
        return self.linear(x) + self.gate * update.view(*x.shape[:-1], -1)


def plain_model(model, bare, name: str | None, gates, dtype: torch.dtype):
    """What `model` does for a prompt of adapter `name`, and the tensors of each module.

    Args:
        gates: per block [num_experts], or None for 1.
    """
    plain = copy.deepcopy(bare).to(dtype)
    runtime, leaves = runtime_of(model), {}
    for index, (block, linears) in enumerate(zip(runtime.blocks, runtime.linears, strict=True)):
        for linear in linears:
            if name is None or name not in linear.specs:
                continue
            values = {**linear.tensors(name), **linear.frozen(name)}
            tensors = {k: v.detach().clone().to(dtype) for k, v in values.items()}
            for key in linear.trained(name):
                tensors[key].requires_grad_()
            path = f"{block.path}.{block.experts[linear.column]}"
            gate = 1.0 if gates is None else gates[index][linear.column].to(dtype)
            inner, kind, spec = plain.get_submodule(path), linear.kinds[name], linear.specs[name]
            if kind == "lora":
                tensors = {"a": tensors["lora_A"], "b": tensors["lora_B"]}
                with torch.no_grad():
                    inner.weight += gate * spec.scale * tensors["b"] @ tensors["a"]
                continue
            leaves[path] = tensors
            parent, _, last = path.rpartition(".")
            setattr(plain.get_submodule(parent), last, Gated(inner, kind, tensors, spec, gate))
    return plain, leaves


# ---- one expert ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case, options",
    [
        ("flylora", {"top_k": 3}),
        ("flylora", {"top_k": 3, "absolute": False}),
        ("smora", {"top_k": 3}),
        ("smora", {"top_k": 3, "partition": 2}),
    ],
)
def test_gates_of_the_formula(case, options):
    kind, spec = get_kind(case), spec_of(case, (36, 28, 8), options=options)
    tensors = trained(case, spec, base_weight(spec))
    bias = next(key for key in tensors if key.endswith("_bias"))
    tensors[bias] = 0.05 * torch.randn(8)
    values = {**kind.frozen(spec), **tensors}
    x = torch.randn(50, 36)
    made = kind.materialise(tensors, kind.frozen(spec), spec)
    gates = kind.rank_gates(x, values, spec)
    assert gates.dtype == torch.float32 and ((gates != 0).sum(1) == 3).all()
    actual = made.scale * (gates * (x @ made.a.T)) @ made.b.T

    def expected(dtype):
        wide = {key: value.to(dtype) for key, value in values.items()}
        return formula(case, wide, options, spec.scale, x.to(dtype))

    assert_as_good_as_torch(actual, expected(torch.float64), expected(torch.float32), case)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tokens_gates_do_not_depend_on_the_others(kind, dtype):
    expert, spec = get_kind(kind), spec_of(kind, (65, 28, 8))
    values = {**expert.frozen(spec), **trained(kind, spec, base_weight(spec))}
    x = torch.randn(70, 65).to(dtype)
    together = expert.rank_gates(x, values, spec)
    for count in (1, 2, 7, 33):
        tokens = torch.randperm(70)[:count]
        assert torch.equal(expert.rank_gates(x[tokens], values, spec), together[tokens])
    assert expert.rank_gates(x[:0], values, spec).shape == (0, 8)


@kinds
def test_all_ranks_and_equal_scores_are_a_lora(kind):
    """top_k above the rank takes all; SMoRA's gates sum to the rank and are 1 where z is one."""
    expert, spec = get_kind(kind), make_spec(20, 16, 6)  # top_k 8
    tensors = expert.init(spec)
    if kind == "smora":
        tensors["lora_smora_router"].zero_()
    gates = expert.rank_gates(torch.randn(9, 20), {**expert.frozen(spec), **tensors}, spec)
    torch.testing.assert_close(gates, torch.ones(9, 6))


@kinds
def test_the_bias_moves_towards_even_use(kind):
    expert, spec = get_kind(kind), spec_of(kind, (16, 8, 4), options={"bias_step": 0.25})
    tensors = expert.init(spec)
    name = next(key for key in tensors if key.endswith("_bias"))
    used = torch.tensor([[1.0, 2.0, 0.0, 0.0], [1.0, 0.0, 3.0, 0.0]])
    expert.rebalance(tensors, used, spec)  # counts 2, 1, 1, 0
    assert tensors[name].tolist() == [-0.25, 0.0, 0.0, 0.25]
    expert.rebalance(tensors, torch.ones(5, 4), spec)
    assert tensors[name].tolist() == [-0.25, 0.0, 0.0, 0.25]


def test_smora_gates_sum_to_the_rank_and_ties_take_lower_ranks():
    expert, spec = get_kind("smora"), make_spec(20, 16, 6, options={"top_k": 2, "partition": 3})
    tensors = expert.init(spec)
    gates = expert.rank_gates(torch.randn(30, 20), tensors, spec)
    torch.testing.assert_close(gates.sum(1), torch.full((30,), 6.0))
    assert tensors["lora_smora_router"].shape == (2, 20)
    assert {tuple(row.nonzero()[:, 0].tolist()) for row in gates} == {(0, 1), (3, 4)}


def test_fly_factor_is_sparse_random_and_of_the_papers_size():
    expert, spec = get_kind("flylora"), make_spec(512, 64, 32)
    a = expert.frozen(spec)["flylora_A"]
    assert ((a != 0).sum(1) == 512 * 8 // 32).all()
    assert a[a != 0].std().item() == pytest.approx(1 / 32, rel=0.05)
    gram = (a @ a.T).double()
    off = gram - torch.diag(gram.diagonal())
    assert off.pow(2).mean().sqrt() < 0.1 * gram.diagonal().mean()
    columns = (a != 0).sum(0).float()
    assert columns.mean() == 8 and columns.max() < 25
    assert expert.checksum(spec) != expert.checksum(make_spec(512, 64, 32, seed=1))
    # A change here breaks every FlyLoRA adapter that was ever saved.
    assert expert.checksum(make_spec(48, 40, 4, seed=0)) == "549f2094cdb612eb"


def test_fly_updates_of_two_seeds_hardly_meet():
    b, cosines = torch.randn(64, 32).double(), []
    for seed in range(4):
        first, second = (
            b @ get_kind("flylora").frozen(make_spec(512, 64, 32, seed=s))["flylora_A"].double()
            for s in (seed, seed + 10)
        )
        cosines.append(((first * second).sum() / first.norm() / second.norm()).abs())
    assert max(cosines) < 0.05


# ---- inference ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together():
    """Two rank-gated adapters, one of a higher rank than the others, and a LoRA."""
    torch.manual_seed(0)
    model = attached("flylora", "fly", rank=5)
    attached("smora", "smora", model)
    attached("lora", "lora", model, rank=7, expert_options={})
    return model


ROWS = ["fly", "lora", None, "smora", "fly"]


def test_mixed_batch_against_plain_models(together):
    bare, ids = build("llama"), prompts(5, LENGTH, seed=5)
    lengths = milora.prompt_lengths(together, LENGTH)
    with milora.record_routing(together) as states, lengths, torch.no_grad():
        got = together(ids, adapter_names=ROWS).logits
    for row, name in enumerate(ROWS):
        gates = [block[row] for block in states[0].block_gates]
        with torch.no_grad():
            expected, same = (
                plain_model(together, bare, name, gates, dtype)[0](ids[row : row + 1]).logits
                for dtype in (torch.float64, torch.float32)
            )
        assert_as_good_as_torch(got[row : row + 1], expected, same, f"row {row}: {name}")
        if name is not None:
            assert (got[row] - bare(ids[row : row + 1]).logits[0]).abs().max() > 1e-3


def test_rows_are_those_of_a_batch_of_their_own(together):
    ids = prompts(5, LENGTH, seed=5)

    def run(rows):
        names = [ROWS[row] for row in rows]
        with milora.prompt_lengths(together, LENGTH), torch.no_grad():
            return together(ids[rows], adapter_names=names).logits

    whole = run([0, 1, 2, 3, 4])
    for rows in ([4, 3, 2, 1, 0], [0, 0, 0, 0, 0], [3, 3, 1, 1, 2]):
        assert torch.equal(run(rows), whole[rows])


def test_new_tokens_get_gates_of_their_own(together):
    """Decode steps with a cache against one forward over everything, on the prompts' routes."""
    ids = prompts(5, LENGTH, seed=5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with milora.record_routing(together) as states:
        out = together.generate(ids, adapter_names=ROWS, **options)
    with milora.pin_route(together, states[0]), torch.no_grad():
        whole = together(out.sequences, use_cache=True).logits
    steps = torch.stack(out.logits, 1)
    torch.testing.assert_close(steps, whole[:, LENGTH - 1 : -1], rtol=1e-4, atol=1e-5)


def test_nothing_is_computed_where_no_adapter_gates_ranks(together, monkeypatch):
    seen = []
    op = ops._grouped_lora_
    monkeypatch.setattr(ops, "_grouped_lora_", lambda *a: seen.append(a[-1]) or op(*a))
    ids = prompts(2, LENGTH)

    def run(names):
        seen.clear()
        with milora.prompt_lengths(together, LENGTH), torch.no_grad():
            together(ids, adapter_names=names)
        return seen

    assert all(gates is not None for gates in run(["fly", "lora"])) and seen
    with monkeypatch.context() as patch:
        patch.setattr(RankGates, "of", None)
        assert all(gates is None for gates in run(["lora", None])) and seen


def test_bf16_serves_what_training_computes():
    # All ranks on: in bf16 the two round differently, and next to a tie they would part.
    options = {"expert_options": {"top_k": 4}, "router": False}
    model = attached("smora", model=build("llama").bfloat16(), **options)
    ids = prompts(2, LENGTH)
    with milora.prompt_lengths(model, LENGTH):
        with torch.no_grad():
            served = model(ids).logits
        composed = model(ids).logits
    assert composed.requires_grad
    served, composed = served.float(), composed.detach().float()
    assert (served - composed).norm() < 0.02 * composed.norm()


# ---- training -----------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_training_gradients_are_those_of_the_formula(kind, mode):
    """Every tensor of every module, and through x the modules before it."""
    model = attached(kind, router=False)
    bare, ids = build("llama"), prompts(3, LENGTH, seed=2)
    plain, leaves = plain_model(model, bare, "default", None, torch.float64)
    plain(ids, labels=ids).loss.backward()
    getattr(model, mode)()
    model(ids, labels=ids).loss.backward()
    runtime = runtime_of(model)
    for block, linears in zip(runtime.blocks, runtime.linears, strict=True):
        for linear in linears:
            path = f"{block.path}.{block.experts[linear.column]}"
            for key, parameter in linear.trained("default").items():
                wide = leaves[path][key].grad
                error = (parameter.grad - wide).norm() / wide.norm()
                assert error < 1e-4, f"{path}.{key}"  # roundings of all the layers behind it


def test_each_row_trains_its_own_adapter(together):
    """A mixed batch's loss and gradients: those of its rows one by one."""
    model = copy.deepcopy(together).eval()
    ids = prompts(3, LENGTH, seed=2)

    def run(rows):
        names = [["fly", "lora", "smora"][row] for row in rows]
        model.zero_grad(set_to_none=True)
        with milora.prompt_lengths(model, LENGTH):
            model(ids[rows], adapter_names=names).logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole = run([0, 1, 2])
    alone = [run([row]) for row in range(3)]
    for name, grad in whole.items():
        parts = [grads[name] for grads in alone if name in grads]
        total = sum(parts, torch.zeros_like(grad))
        torch.testing.assert_close(grad, total, rtol=1e-3, atol=1e-4, msg=name)
    for adapter in ("fly", "lora", "smora"):
        assert any(f".{adapter}." in name and grad.any() for name, grad in whole.items())


@kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_choice_and_counts_once(kind, reentrant):
    options = {**CASES[kind][1], "bias_step": 0.05}  # a choice made twice would differ
    results = []
    for mode in (None, reentrant):
        model = attached(kind, expert_options=options).train()
        checkpoint(model, mode)
        batches = [batch("llama", 3, 9, 4, seed) for seed in (0, 1)]
        grads = gradients(model, batches)
        biases = [
            t
            for linear in linears_of(model)
            for key, t in linear.tensors("default").items()
            if key.endswith("_bias")
        ]
        results.append((grads, biases))
    (expected, biases), (actual, others) = results
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert all(torch.equal(a, b) for a, b in zip(biases, others, strict=True))


@kinds
def test_only_training_moves_the_bias(kind):
    model = attached(kind, router=False)
    linear = linears_of(model)[0]
    name = next(key for key in linear.tensors("default") if key.endswith("_bias"))
    bias = linear.tensors("default")[name]
    before = bias.clone()
    ids = prompts(3, LENGTH)
    model.eval()(ids, labels=ids).loss.backward()
    assert torch.equal(bias, before) and not bias.requires_grad
    model.train()(ids, labels=ids)
    step = (bias - before).abs()
    want = get_kind(kind).defaults["bias_step"]
    assert step.any() and torch.all((step < 1e-9) | ((step - want).abs() < 0.01 * want))


def test_a_prompt_gate_of_zero_gives_no_gradient():
    model = attached("smora", top_k=1).train()
    inputs = batch("llama", 1, LENGTH, 4)
    with milora.record_routing(model) as states:
        model(**inputs).loss.backward()
    for index, linears in enumerate(runtime_of(model).linears):
        for linear in linears:
            is_on = states[0].block_gates[index][0, linear.column] != 0
            grad = linear.tensors("default")["lora_smora_B"].grad
            assert (grad is not None and bool(grad.any())) == bool(is_on)


# ---- what is refused ----------------------------------------------------------------------------


@kinds
def test_pools_merging_and_export_refuse(kind, tmp_path):
    model = attached(kind)
    milora.save(model, tmp_path / "routed")
    bare = build("llama")
    with (
        new_pool(bare) as pool,
        pytest.raises(milora.AdapterError, match=f"kind {kind} gate each rank by the token"),
    ):
        pool.register("a", tmp_path / "routed")
    lengths = milora.prompt_lengths(model, LENGTH)
    with milora.record_routing(model) as states, lengths, torch.no_grad():
        model(prompts(1, LENGTH))
    with pytest.raises(ValueError, match=f"_proj has an expert of kind {kind}, which gates"):
        milora.export_route(model, states[0], tmp_path / "exported")
    plain = attached(kind, router=False)
    milora.save(plain, tmp_path / "plain")
    with pytest.raises(milora.AdapterError, match=f"{kind} experts are no low-rank update"):
        milora.merge([tmp_path / "plain"], tmp_path / "out", model=build("llama").to("meta"))
