"""Expert kinds: shapes, starting point, the formula of each, and what follows from a seed alone."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_as_good_as_torch

from milora import random
from milora.experts import REGISTRY, dora, get_kind, make_spec

# (d_in, d_out, rank): odd sizes, a rank of 1, a rank above both dimensions
SHAPES = [(33, 100, 4), (64, 48, 8), (7, 5, 1), (6, 9, 16)]
KINDS = ["dora", "lora", "lora_mini"]  # all kinds: test_experts_kinds.py


def spec_of(kind: str, shape=(33, 100, 4), **changes):
    options = {"inner_in": 12, "inner_out": 10} if kind == "lora_mini" else {}
    settings = {"alpha": 6.0, "options": options, "seed": 3, "path": "layers.0.q_proj", **changes}
    return make_spec(*shape, **settings)


def trained(kind: str, spec, weight, dtype=torch.float32):
    """Tensors that are no longer at their start."""
    tensors = get_kind(kind).init(spec, lambda: weight)
    return {k: (v + 0.1 * torch.randn_like(v)).to(dtype) for k, v in tensors.items()}


def base_weight(spec, dtype=torch.float32):
    return (torch.randn(spec.d_out, spec.d_in) / math.sqrt(spec.d_in)).to(dtype)


def dense_update(kind, tensors, frozen, spec, weight):
    """W' - W at gate 1, from the formulas of the papers, in the dtype of the arguments."""
    if kind == "lora_mini":
        inner = tensors["lora_mini_B"] @ tensors["lora_mini_A"]
        return spec.scale * frozen["outer_out"] @ inner @ frozen["outer_in"]
    update = spec.scale * tensors["lora_B"] @ tensors["lora_A"]
    if kind == "lora":
        return update
    total = weight + update
    c = tensors["lora_magnitude_vector"] / total.norm(dim=1)
    return c[:, None] * total - weight


# ---- every kind -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_starts_as_the_base(kind, shape, dtype):
    spec = spec_of(kind, shape)
    weight = base_weight(spec, dtype)
    expert = get_kind(kind)
    tensors, frozen = expert.init(spec, lambda: weight), expert.frozen(spec)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == expert.tensors(spec)
    assert all(v.dtype == torch.float32 for v in [*tensors.values(), *frozen.values()])
    made = expert.materialise(tensors, frozen, spec, lambda: weight)
    assert made.a.shape == (spec.rank, spec.d_in) and made.b.shape == (spec.d_out, spec.rank)
    assert made.scale == spec.scale
    assert not made.b.any() and made.a.abs().min() > 0
    assert made.output is None or not made.output.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", [0.0, 0.3, 1.0])
def test_materialised_matches_the_formula(kind, shape, gate):
    spec = spec_of(kind, shape)
    weight, bias, x = base_weight(spec), torch.randn(spec.d_out), torch.randn(5, spec.d_in)
    expert, frozen = get_kind(kind), get_kind(kind).frozen(spec)
    tensors = trained(kind, spec, weight)
    made = expert.materialise(tensors, frozen, spec, lambda: weight)
    base = torch.nn.functional.linear(x, weight, bias)
    update = made.scale * x @ made.a.T @ made.b.T
    if made.output is not None:
        update = update + made.output * (base - bias)
    actual = base + gate * update

    def expected(dtype):
        cast = [{k: v.to(dtype) for k, v in group.items()} for group in (tensors, frozen)]
        w = weight.to(dtype)
        full = w + gate * dense_update(kind, *cast, spec, w)
        return torch.nn.functional.linear(x.to(dtype), full, bias.to(dtype))

    assert_as_good_as_torch(actual, expected(torch.float64), expected(torch.float32), kind)
    if gate == 0.0:
        assert torch.equal(actual, base)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_follow_from_seed_and_path_only(kind):
    expert = get_kind(kind)
    weight = base_weight(spec_of(kind))

    def draw(spec):
        return {**expert.init(spec, lambda: weight), **expert.frozen(spec)}

    first = draw(spec_of(kind))
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # where and how models are built while they load
            again = draw(spec_of(kind))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert all(torch.equal(first[k], again[k]) for k in first)
    random_keys = [k for k in first if k.endswith("_A") or k.startswith("outer")]
    for change in ({"seed": 4}, {"path": "layers.1.q_proj"}):
        other = draw(spec_of(kind, **change))
        assert not any(torch.equal(first[k], other[k]) for k in random_keys)


@pytest.mark.parametrize(
    "arguments, scale",
    [({}, 1.0), ({"alpha": 32}, 2.0), ({"alpha": 32, "rslora": True}, 8.0)],
)
def test_scale(arguments, scale):
    assert make_spec(8, 8, 16, **arguments).scale == scale


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: get_kind("adalora"),
            f"expert: must be one of {', '.join(REGISTRY)}, got 'adalora'",
        ),
        (lambda: make_spec(8, 8, 0), "make_spec: rank must be a positive integer, got 0"),
        (lambda: make_spec(8.0, 8, 1), "make_spec: d_in must be a positive integer, got 8.0"),
        (
            lambda: get_kind("lora").validate({"p": 1}),
            "lora: unknown options ['p']; known options: none",
        ),
        (
            lambda: get_kind("lora_mini").validate({"inner_in": 0}),
            "lora_mini: inner_in must be a positive integer, got 0",
        ),
        (
            lambda: get_kind("dora").init(make_spec(4, 3, 1)),
            "dora: weight must give the base weight, got None",
        ),
        (
            lambda: get_kind("dora").init(make_spec(4, 3, 1), lambda: torch.ones(4, 3)),
            "dora: weight must be [d_out, d_in] = [3, 4], got [4, 3]",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


# ---- DoRA -------------------------------------------------------------------------------------


def test_dora_rows_have_norm_m():
    spec = spec_of("dora")
    weight = base_weight(spec)
    tensors = trained("dora", spec, weight)
    made = get_kind("dora").materialise(tensors, {}, spec, lambda: weight)
    merged = weight + made.output[:, None] * weight + made.scale * made.b @ made.a
    magnitudes = tensors["lora_magnitude_vector"]

    def expected(dtype):
        wide = {k: v.to(dtype) for k, v in tensors.items()}
        w = weight.to(dtype)
        return (w + dense_update("dora", wide, {}, spec, w)).norm(dim=1)

    torch.testing.assert_close(expected(torch.float64), magnitudes.double().abs())
    assert_as_good_as_torch(merged.norm(dim=1), expected(torch.float64), expected(torch.float32))


def test_dora_norm_has_no_gradient():
    """Gradients are those of a constant norm, and finite differences show that it does matter."""
    spec = spec_of("dora")
    weight = base_weight(spec, torch.float64)
    tensors = trained("dora", spec, weight, torch.float64)
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    direction = torch.randn(spec.d_out, spec.d_in, dtype=torch.float64)

    def loss(values, norm=None):
        total = weight + spec.scale * values["lora_B"] @ values["lora_A"]
        norm = total.norm(dim=1) if norm is None else norm
        return ((values["lora_magnitude_vector"] / norm)[:, None] * total * direction).sum()

    def gradients(value):
        return torch.autograd.grad(value, list(leaves.values()))

    made = get_kind("dora").materialise(leaves, {}, spec, lambda: weight)
    merged = weight + made.output[:, None] * weight + made.scale * made.b @ made.a
    actual = gradients((merged * direction).sum())
    norm = (weight + spec.scale * tensors["lora_B"] @ tensors["lora_A"]).norm(dim=1)
    detached, full = gradients(loss(leaves, norm)), gradients(loss(leaves))
    for name, got, want, other in zip(leaves, actual, detached, full, strict=True):
        torch.testing.assert_close(got, want, msg=name)
        assert got.abs().max() > 0
        if name != "lora_magnitude_vector":
            assert (got - other).norm() > 0.05 * other.norm(), f"{name}: norm differentiated"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_row_norm(dtype, monkeypatch):
    weight, a, b = torch.randn(50, 37).to(dtype), torch.randn(3, 37), torch.randn(50, 3)

    def expected(wide):
        return (weight.to(wide) + 0.5 * b.to(wide) @ a.to(wide)).norm(dim=1)

    whole = dora.row_norm(weight, a, b, 0.5)
    assert_as_good_as_torch(whole, expected(torch.float64), expected(torch.float32))
    assert torch.equal(dora.row_norm(weight), dora.row_norm(weight, a, 0 * b, 0.5))
    monkeypatch.setattr(dora, "_CPU_CHUNK", 37 * 7)  # bands of 7 rows, the last one of 1
    assert_as_good_as_torch(
        dora.row_norm(weight, a, b, 0.5), expected(torch.float64), expected(torch.float32)
    )
    assert torch.equal(dora.row_norm(weight), dora.row_norm(weight, a, 0 * b, 0.5))


def test_dora_keeps_a_zero_row():
    spec = spec_of("dora")
    weight = base_weight(spec)
    weight[2] = 0
    made = get_kind("dora").materialise(
        get_kind("dora").init(spec, lambda: weight), {}, spec, lambda: weight
    )
    assert made.output[2] == -1.0  # y - bias is 0 there, so the row stays what it was
    made.output[2] = 0.0
    assert not made.output.any()


# ---- LoRA-Mini --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 320, 4), (64, 96, 16)])
def test_lora_mini_rank_and_count(shape):
    spec = spec_of("lora_mini", shape)
    expert = get_kind("lora_mini")
    tensors = trained("lora_mini", spec, None)
    made = expert.materialise(tensors, expert.frozen(spec), spec)
    rank = torch.linalg.matrix_rank(made.b.double() @ made.a.double(), rtol=1e-6)
    assert rank == min(spec.rank, 12, 10)
    assert sum(v.numel() for v in tensors.values()) == spec.rank * (12 + 10)


def test_lora_mini_first_gradients():
    """At step 0: dM_2 = scale · N_2ᵀ G Aᵀ, not zero; dM_1 = 0."""
    spec = spec_of("lora_mini")
    expert = get_kind("lora_mini")
    frozen = expert.frozen(spec)
    tensors = {k: v.requires_grad_() for k, v in expert.init(spec).items()}
    made = expert.materialise(tensors, frozen, spec)
    g = torch.randn(spec.d_out, spec.d_in)
    (made.scale * (made.b @ made.a) * g).sum().backward()

    def expected(dtype):
        projected = frozen["outer_out"].T.to(dtype) @ g.to(dtype)
        return spec.scale * projected @ made.a.detach().to(dtype).T

    actual = tensors["lora_mini_B"].grad
    assert actual.abs().max() > 0
    assert_as_good_as_torch(actual, expected(torch.float64), expected(torch.float32))
    assert not tensors["lora_mini_A"].grad.any()


def test_lora_mini_outer_factors_are_frozen_and_remade_bit_for_bit():
    spec = spec_of("lora_mini")
    expert = get_kind("lora_mini")
    frozen = expert.frozen(spec)
    assert not any(v.requires_grad for v in frozen.values())
    checksum = expert.checksum(spec, frozen)
    tensors = {k: v.requires_grad_() for k, v in expert.init(spec).items()}
    optimizer = torch.optim.AdamW(tensors.values(), lr=0.1)
    for _ in range(2):
        made = expert.materialise(tensors, frozen, spec)
        (made.b @ made.a).square().sum().add(made.b.sum()).backward()
        optimizer.step()
    assert expert.checksum(spec, frozen) == checksum
    torch.set_num_threads(1)
    assert all(torch.equal(frozen[k], v) for k, v in expert.frozen(spec).items())
    assert expert.checksum(spec) == checksum
    assert expert.checksum(spec_of("lora_mini", seed=4)) != checksum
    assert get_kind("lora").checksum(spec_of("lora")) is None


def test_lora_mini_outer_factors_are_nearly_orthonormal():
    spec = make_spec(2048, 1536, 8)
    frozen = get_kind("lora_mini").frozen(spec)
    for rows, length in ((frozen["outer_in"], 2048), (frozen["outer_out"].T, 1536)):
        assert rows.shape == (64, length)
        gram = rows.double() @ rows.T.double()
        # six standard deviations: √(0.8 / d) of a squared norm, 1 / √d of a scalar product
        assert (gram.diagonal() - 1).abs().max() < 6 * math.sqrt(0.8 / length)
        assert gram.fill_diagonal_(0.0).abs().max() < 6 / math.sqrt(length)
    a = get_kind("lora_mini").materialise(get_kind("lora_mini").init(spec), frozen, spec).a
    assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 2048), rel=0.1)  # LoRA's own


# ---- the generator ----------------------------------------------------------------------------

# Known answers of philox4x32-10, from Random123's kat_vectors: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, result):
    words = [torch.tensor([int(w, 16)]) for w in counter.split()]
    key0, key1 = (int(w, 16) for w in key.split())
    made = random.philox(words, (key0, key1))
    assert " ".join(f"{int(w):08x}" for w in made) == result


def test_uniform(monkeypatch):
    values = random.uniform((300, 401), seed=2**63 + 5)
    assert values.dtype == torch.float64 and values.shape == (300, 401)
    assert torch.equal(values, values.float().double()), "not exact in float32"
    assert values.abs().min() > 0 and values.abs().max() < 1
    assert abs(values.mean()) < 0.01 and values.var().item() == pytest.approx(1 / 3, rel=0.02)
    assert not torch.equal(values, random.uniform((300, 401), seed=2**63 + 5, stream=1))
    assert not torch.equal(values, random.uniform((300, 401), seed=5))
    monkeypatch.setattr(random, "_CHUNK", 97)
    assert torch.equal(values, random.uniform((300, 401), seed=2**63 + 5))
    assert random.uniform((0, 3), seed=1).shape == (0, 3)


def test_saved_adapters_depend_on_these_values():
    """A change here breaks every LoRA-Mini adapter that was ever saved."""
    assert random.derive_seed(0, "layers.0.q_proj") == 759803634776031504
    # counter 0, key 0: the first known answer above, its upper 24 bits
    words = [0x6627E8, 0xE169C5, 0xBC57AC, 0x9B00DB]
    expected = torch.tensor([(2 * w + 1 - 2**24) / 2**24 for w in words], dtype=torch.float64)
    assert torch.equal(random.uniform((4,), seed=0), expected)
    assert get_kind("lora_mini").checksum(make_spec(48, 40, 4, seed=0)) == "3d2ecd840c16cba6"
