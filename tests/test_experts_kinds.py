"""What holds for every expert kind: its formula, its start, files, serving, training, counting."""

from __future__ import annotations

import json

import plain_model as plain
import pytest
import torch
from expert_cases import (
    CASES,
    GATED,
    MOVES_THE_BASE,
    base_weight,
    move,
    spec_of,
    trained,
    update_of,
)
from pool_tools import new_pool
from safetensors.torch import load_file
from tiny_models import build, prompts, randomize
from tolerance import assert_as_good_as_torch

import milora
from milora import MiLoRAConfig, _build
from milora.adapter_files import WEIGHTS_FILE, sha256_of
from milora.attach import runtime_of
from milora.cli.adapter_size import read_size
from milora.experts import REGISTRY, get_kind
from milora.random import uniform

SHAPES = [(36, 100, 4), (64, 48, 8), (8, 4, 1), (12, 16, 20)]
LENGTH = 7
cases = pytest.mark.parametrize("case", CASES)
matrices = pytest.mark.parametrize("case", [case for case in CASES if case not in GATED])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def config_of(case: str, **changes) -> MiLoRAConfig:
    kind, options = CASES[case]
    return MiLoRAConfig(**{"rank": 4, "expert": kind, "expert_options": options, **changes})


def attached(case: str, name: str = "default", model=None, **changes):
    """A tiny model with an adapter that matters."""
    model = milora.attach(model or build("llama"), config_of(case, **changes), name)
    randomize(model, seed=1)
    for linears in runtime_of(model).linears:
        for i, linear in enumerate(linears):
            move(linear.trained(name), frozenset(), 0.05, seed=i)
    return model


def logits(model, **options) -> torch.Tensor:
    with milora.prompt_lengths(model, LENGTH), torch.no_grad():
        return model(prompts(2, LENGTH), **options).logits


def test_every_kind_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(REGISTRY)
    for kind in REGISTRY.values():
        names = kind.tensors(spec_of("lora", (16, 16, 4)))
        assert all("lora_" in name for name in names), "PEFT finds ours by this"
        assert kind.summary and len(kind.summary) < 40 and "[" not in kind.summary


@cases
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_start(case, shape, dtype):
    spec = spec_of(case, shape)
    weight = base_weight(spec, dtype)
    expert = get_kind(CASES[case][0])
    expert.check(spec)
    tensors, frozen = expert.init(spec, lambda: weight), expert.frozen(spec)
    for values, shapes in ((tensors, expert.tensors(spec)), (frozen, expert.frozen_shapes(spec))):
        assert {k: tuple(v.shape) for k, v in values.items()} == shapes
        assert all(v.dtype == torch.float32 and v.is_contiguous() for v in values.values())
        assert all(v.isfinite().all() and v.device.type == "cpu" for v in values.values())
    made = expert.materialise(tensors, frozen, spec, lambda: weight)
    rank = expert.served_rank(spec)
    assert made.a.shape == (rank, spec.d_in) and made.b.shape == (spec.d_out, rank)
    assert made.scale == spec.scale
    assert (made.output is not None) == expert.has_output
    start = (made.b.double() @ made.a.double()).abs().max()
    assert start <= MOVES_THE_BASE.get(case, 0.0)


@cases
@pytest.mark.parametrize("shape", SHAPES)
def test_materialised_matches_the_formula(case, shape):
    spec, kind = spec_of(case, shape), CASES[case][0]
    weight, x = base_weight(spec), torch.randn(5, spec.d_in)
    expert, frozen = get_kind(kind), get_kind(kind).frozen(spec)
    tensors = trained(case, spec, weight)
    made = expert.materialise(tensors, frozen, spec, lambda: weight)
    actual = made.scale * x @ made.a.T @ made.b.T
    if made.output is not None:
        actual = actual + made.output * (x @ weight.T)

    def expected(dtype):
        cast = [{k: v.to(dtype) for k, v in group.items()} for group in (tensors, frozen)]
        return x.to(dtype) @ update_of(kind, *cast, spec, weight.to(dtype)).T

    assert expected(torch.float64).abs().max() > 0
    assert_as_good_as_torch(actual, expected(torch.float64), expected(torch.float32), case)


@matrices
def test_gradients_are_those_of_the_formula(case):
    spec, kind = spec_of(case, (12, 8, 2)), CASES[case][0]
    expert, weight = get_kind(kind), base_weight(spec, torch.float64)
    frozen = {k: v.double() for k, v in expert.frozen(spec).items()}
    tensors = trained(case, spec, weight, torch.float64)
    leaves = {k: v.requires_grad_() for k, v in tensors.items() if k not in expert.fixed}
    direction = torch.randn(spec.d_out, spec.d_in, dtype=torch.float64)
    made = expert.materialise(tensors, frozen, spec, lambda: weight)
    loss = (made.scale * made.b @ made.a * direction).sum()
    actual = torch.autograd.grad(loss, list(leaves.values()))
    if kind == "dora":  # the norm is a constant there: test_experts.py
        return
    loss = (update_of(kind, tensors, frozen, spec, weight) * direction).sum()
    expected = torch.autograd.grad(loss, list(leaves.values()))
    for name, got, want in zip(leaves, actual, expected, strict=True):
        assert want.abs().max() > 0, name
        torch.testing.assert_close(got, want, msg=name)


@cases
def test_initial_values_follow_from_seed_and_path_only(case):
    expert, shape = get_kind(CASES[case][0]), (36, 100, 4)
    weight = base_weight(spec_of(case, shape))

    def draw(spec):
        return {**expert.init(spec, lambda: weight), **expert.frozen(spec)}

    first = draw(spec_of(case, shape))
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # where and how models are built while they load
            again = draw(spec_of(case, shape))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert expert.checksum(spec_of(case, shape)) == expert.checksum(spec_of(case, shape))
    assert (expert.checksum(spec_of(case, shape)) is None) == (not expert.frozen_shapes(
        spec_of(case, shape)))  # fmt: skip


# ---- on a model ---------------------------------------------------------------------------------


@cases
def test_round_trip(case, tmp_path, monkeypatch):
    model = attached(case)
    milora.save(model, tmp_path)
    with monkeypatch.context() as patch:  # loading draws no initial values: that can take minutes
        patch.setattr(type(get_kind(CASES[case][0])), "init", None)
        loaded = milora.load(build("llama"), tmp_path, "other")
    assert torch.equal(logits(loaded), logits(model))
    milora.save(loaded, tmp_path / "again", "other")
    assert sha256_of(tmp_path / WEIGHTS_FILE) == sha256_of(tmp_path / "again" / WEIGHTS_FILE)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    count = milora.count_parameters(model)
    size = read_size(tmp_path)
    assert (size.total, size.experts, size.activated) == (
        count.trainable, count.experts, count.activated,
    )  # fmt: skip
    assert size.total + size.fixed == sum(tensor.numel() for tensor in stored.values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    theta = sum(p.numel() for p in milora.activation_parameters(model))
    assert count.trainable == trainable + theta


@cases
def test_training_changes_what_it_should(case):
    model = attached(case)
    linears = [linear for linears in runtime_of(model).linears for linear in linears]
    before = [
        {k: v.detach().clone() for k, v in {**n.tensors("default"), **n.frozen("default")}.items()}
        for n in linears
    ]
    ids = prompts(2, LENGTH)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    labels = ids.clone()
    labels[:, :3] = -100
    model.train()
    model(ids, labels=labels).loss.backward()
    optimizer.step()
    changed = set()
    for linear, old in zip(linears, before, strict=True):
        trained_names = set(linear.trained("default"))
        for name, tensor in {**linear.tensors("default"), **linear.frozen("default")}.items():
            is_bias = case in GATED and name.endswith("_bias")  # moved by the forward itself
            if not torch.equal(tensor, old[name]) and not is_bias:
                assert name in trained_names, name
                changed.add(name)
    assert changed == trained_names


@matrices
def test_mixed_batch_attached_and_pooled(case, tmp_path, monkeypatch):
    """One batch: this kind, a LoRA, the bare base, this kind again; against float64 plain models,
    and the same bits from a pool."""
    bare = build("llama")
    model = attached(case, "kind")
    attached("lora", "lora", model, rank=3)
    for name in ("kind", "lora"):
        milora.save(model, tmp_path / name, name)
    rows, ids = ["kind", "lora", None, "kind"], prompts(4, LENGTH, seed=5)

    def run(target):
        lengths = milora.prompt_lengths(target, LENGTH)
        with milora.record_routing(target) as states, lengths, torch.no_grad():
            return target(ids, adapter_names=rows).logits, states[0]

    got, state = run(model)
    pooled = build("llama")
    with new_pool(pooled) as pool:
        for name in ("kind", "lora"):
            pool.register(name, tmp_path / name)
        with pool.acquire(["kind", "lora"]):
            assert torch.equal(run(pooled)[0], got)

    def formula(linear, adapter, weight):
        groups = (linear.tensors(adapter), linear.frozen(adapter))
        values = [{k: v.detach().double() for k, v in group.items()} for group in groups]
        return update_of(linear.kinds[adapter], *values, linear.specs[adapter], weight)

    monkeypatch.setattr(plain, "update_of", formula)
    for row in range(4):
        expected, same = (
            plain.plain_model(model, bare, state, row, dtype)(ids[row : row + 1]).logits
            for dtype in (torch.float64, torch.float32)
        )
        assert_as_good_as_torch(got[row : row + 1], expected, same, f"{case} row {row}")
        if row == 0:
            away = (expected - bare.double()(ids[:1]).logits).abs().max()
            bare.float()
            assert away > 1e-3, "the adapter does not matter"


@pytest.mark.parametrize(
    "case",
    [
        *("ffa_lora", "lora_xs", "loldu", "nola", "melora", "mora"),
        *("dylora_rank", "beamlora", "flylora", "smora"),
    ],
)
def test_peft_life_cycle(case, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), config_of(case))
    for linears in runtime_of(model).linears:
        for linear in linears:
            move(linear.trained("default"), frozenset(), 0.05)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(milora.load(build("llama"), tmp_path)), logits(model))


@cases
def test_counts_on_the_meta_device_without_making_anything(case, monkeypatch):
    kind = get_kind(CASES[case][0])
    count = milora.count_parameters(milora.attach(build("llama"), config_of(case)))
    for name in ("frozen", "init"):
        monkeypatch.setattr(type(kind), name, None)
    model = milora.attach(build("llama").to("meta"), config_of(case))
    assert milora.count_parameters(model) == count


# ---- what is refused ----------------------------------------------------------------------------

REFUSED = {
    "randlora": (300, 4096, 32, {}, "randlora: rank 32 on a 300 x 4096 module makes an update of "
                 "rank 320; kernels take at most 256"),
    "mora": (4096, 11008, 8, {}, "mora: rank 8 on a 4096 x 11008 module makes an update of rank "
             "348; kernels take at most 256"),
    "melora": (30, 32, 4, {}, "melora: num_blocks must divide d_in and d_out, got 4 on a 30 x 32 "
               "module"),
    "lora_ga": (512, 512, 129, {}, "lora_ga: rank 129 on a 512 x 512 module makes an update of "
                "rank 258; kernels take at most 256"),
    "prolora": (32, 32, 4, {"unshared": 5}, "prolora: unshared must be at most the rank, 4, got 5"),
    "smora": (32, 32, 4, {"partition": 3}, "smora: partition must divide the rank 4, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_modules_that_a_kind_cannot_serve(kind):
    d_in, d_out, rank, options, message = REFUSED[kind]
    spec = spec_of("lora", (d_in, d_out, rank), options=options)
    with pytest.raises(ValueError) as error:
        get_kind(kind).check(spec)
    assert str(error.value) == message


def test_attach_and_load_name_the_module_that_is_refused(tmp_path):
    model = build("llama")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: melora: num_blocks must"):
        milora.attach(model, MiLoRAConfig(expert="melora", expert_options={"num_blocks": 5}))
    assert not hasattr(model, "_milora_runtime") and "_milora_runtime" not in vars(model)
    milora.save(attached("melora"), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "expert_options": {"num_blocks": 5}}))
    for load in (
        lambda: milora.load(model, tmp_path),
        lambda: new_pool(model).register("a", tmp_path),
    ):
        with pytest.raises(milora.AdapterError, match="q_proj: melora: num_blocks must divide"):
            load()


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("lora_xs", {"factors": "qr"}, "lora_xs: factors must be one of svd, random, got 'qr'"),
        ("nlora", {"core": 1}, "nlora: core must be one of block, pinv, got 1"),
        ("inttune", {"residual": "yes"}, "inttune: residual must be one of False, True, got 'yes'"),
        ("nola", {"num_basis": 1 << 20}, "nola: num_basis must be at most 16384, got 1048576"),
        ("melora", {"num_blocks": True}, "melora: num_blocks must be a positive integer, got True"),
        ("prolora", {"unshared": -1}, "prolora: unshared must be an integer >= 0, got -1"),
        ("randlora", {"layout": []}, "randlora: layout must be one of paper, peft, got []"),
        ("dylora", {"rank": -1}, "dylora: rank must be an integer >= 0, got -1"),
        ("dylora", {"min_rank": 0}, "dylora: min_rank must be a positive integer, got 0"),
        ("dylora", {"frozen": 2}, "dylora: frozen must be one of False, True, got 2"),
        ("beamlora", {"tau": 0}, "beamlora: tau must be a number above 0, got 0"),
        ("flylora", {"top_k": 0}, "flylora: top_k must be a positive integer, got 0"),
        ("flylora", {"absolute": None}, "flylora: absolute must be one of False, True, got None"),
        ("smora", {"bias_step": -1.0}, "smora: bias_step must be a number >= 0, got -1.0"),
        ("smora", {"partition": 300}, "smora: partition must be at most 256, got 300"),
        ("bone", {"r": 1}, "bone: unknown options ['r']; known options: none"),
    ],
)
def test_options(kind, options, message):
    with pytest.raises(ValueError) as error:
        get_kind(kind).validate(options)
    assert str(error.value) == message


# ---- on a GPU -----------------------------------------------------------------------------------


def _gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    if not _build.cuda_archs():
        pytest.skip("milora was built without CUDA")
    return "cuda"


@pytest.mark.cuda
def test_frozen_numbers_have_the_same_bits_on_a_gpu():
    gpu = _gpu()
    for shape in ((300, 401), (3,)):
        for dtype in (torch.float32, torch.float64):
            options = {"seed": 2**63 + 5, "stream": 7, "dtype": dtype}
            here, there = uniform(shape, **options), uniform(shape, device=gpu, **options)
            assert torch.equal(here, there.cpu())


@pytest.mark.cuda
@matrices
def test_on_a_gpu(case, tmp_path):
    """Trained on the CPU, served by a GPU: attached and from a pool the same bits."""
    gpu = _gpu()
    cpu = attached(case)
    milora.save(cpu, tmp_path)
    model = milora.load(build("llama").to(gpu), tmp_path)
    ids = prompts(2, LENGTH).to(gpu)
    with milora.prompt_lengths(model, LENGTH), torch.no_grad():
        got = model(ids, adapter_names=["default"] * 2).logits
    torch.testing.assert_close(got.cpu(), logits(cpu), rtol=1e-3, atol=1e-3)
    pooled = build("llama").to(gpu)
    with new_pool(pooled) as pool:
        pool.register("kind", tmp_path)
        with pool.acquire(["kind"]), milora.prompt_lengths(pooled, LENGTH), torch.no_grad():
            assert torch.equal(pooled(ids, adapter_names=["kind"] * 2).logits, got)
    milora.detach(model)
    fresh = milora.attach(model, config_of(case))  # initial values from a base on the GPU
    milora.save(fresh, tmp_path / "fresh")
    assert milora.load(build("llama"), tmp_path / "fresh")
