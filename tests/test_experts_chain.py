"""Factor chains: what each paper says of its own start, counts and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from expert_cases import base_weight, move, spec_of, trained, update_of

from milora.experts import get_kind, make_spec
from milora.experts.decompose import leading_lu, top_svd

SHAPE = (40, 28, 5)


def wide(values: dict) -> dict:
    return {name: value.double() for name, value in values.items()}


def start_of(case: str, weight, **changes):
    """Kind, spec and initial values in float64."""
    spec = spec_of(case, SHAPE, **changes)
    kind = get_kind(case.partition("@")[0])
    return kind, spec, wide(kind.init(spec, lambda: weight))


def trainable_count(kind, spec) -> int:
    shapes = kind.tensors(spec)
    return sum(torch.Size(s).numel() for name, s in shapes.items() if name not in kind.fixed)


@pytest.fixture
def weight():
    return base_weight(spec_of("lora", SHAPE))


@pytest.mark.parametrize(
    "kind, count",
    [
        ("lora", 32 * 8192),
        ("ffa_lora", 32 * 4096),
        ("lora_mini", 32 * 128),
        ("lora_xs", 32 * 32),
        ("lora_sb", 32 * 32),
        ("slora", 32 * 8192 + 32 * 32),
        ("nlora", 32 * 8192 + 32 * 32),
        ("inttune", 32 * 32),
        ("loldu", 32),
        ("lora_ga", 32 * 8192),
    ],
)
def test_trainable_counts_of_a_4096_module(kind, count):
    assert trainable_count(get_kind(kind), make_spec(4096, 4096, 32)) == count


# ---- FFA-LoRA -----------------------------------------------------------------------------------


def test_ffa_clients_of_one_seed_share_a_and_average_exactly():
    kind = get_kind("ffa_lora")
    specs = [spec_of("ffa_lora", SHAPE) for _ in range(3)]
    frozen = [kind.frozen(spec)["ffa_lora_A"] for spec in specs]
    assert all(torch.equal(frozen[0], a) for a in frozen)
    bs = [torch.randn(28, 5, dtype=torch.float64) for _ in specs]
    updates = [
        update_of("ffa_lora", {"ffa_lora_B": b}, {"ffa_lora_A": frozen[0].double()}, spec, None)
        for b, spec in zip(bs, specs, strict=True)
    ]
    mean = update_of(
        "ffa_lora", {"ffa_lora_B": sum(bs) / 3}, {"ffa_lora_A": frozen[0].double()}, specs[0], None
    )
    torch.testing.assert_close(mean, sum(updates) / 3)
    other = kind.frozen(spec_of("ffa_lora", SHAPE, seed=4))["ffa_lora_A"]
    assert not torch.equal(other, frozen[0])
    assert frozen[0].std().item() == pytest.approx((1 / 3 / 40) ** 0.5, rel=0.15)  # LoRA's


# ---- LoRA-XS, LoRA-SB ---------------------------------------------------------------------------


def test_xs_factors_are_the_leading_singular_ones(weight):
    _, _, t = start_of("lora_xs", weight)
    s = torch.linalg.svdvals(weight.double())
    best = t["lora_xs_B"] @ t["lora_xs_A"]
    error = torch.linalg.matrix_norm(weight.double() - best)
    torch.testing.assert_close(error, s[5:].norm(), rtol=1e-5, atol=0)
    gram = t["lora_xs_B"].T @ t["lora_xs_B"]
    torch.testing.assert_close(gram, torch.eye(5).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(t["lora_xs_A"].norm(dim=1), s[:5], rtol=1e-5, atol=0)
    assert 0 < t["lora_xs_core"].std() < 3e-5


def test_xs_gradient_of_the_core(weight):
    kind, spec, t = start_of("lora_xs", weight)
    core = t["lora_xs_core"].requires_grad_()
    made = kind.materialise(t, {}, spec)
    g = torch.randn(28, 40, dtype=torch.float64)
    (made.scale * made.b @ made.a * g).sum().backward()
    expected = spec.scale * t["lora_xs_B"].T @ g @ t["lora_xs_A"].T
    torch.testing.assert_close(core.grad, expected)


@pytest.mark.parametrize("name", ["lora_xs", "lora_sb", "loldu", "inttune"])
@pytest.mark.parametrize("sides", [(40, 28), (320, 300)])  # an exact SVD, and an iteration
def test_adapters_of_one_base_share_a_and_b(name, sides):
    """Whatever their seeds: bit for bit, and what inference reads is the same update."""
    torch.manual_seed(0)
    weight = torch.randn(sides[1], sides[0])
    kind = get_kind(name)
    made = []
    for seed in (1, 2):
        spec = make_spec(*sides, 5, seed=seed, path="q_proj")
        tensors = kind.init(spec, lambda: weight)
        move(tensors, kind.fixed, 0.1, seed=seed)
        assert kind.has_fixed_factors(spec)
        made.append(kind.served(tensors, {}, spec))
        whole = kind.materialise(tensors, {}, spec)
        assert whole.core is None and torch.equal(made[-1].a, whole.a)
        torch.testing.assert_close(made[-1].b @ made[-1].core, whole.b)
    assert torch.equal(made[0].a, made[1].a) and torch.equal(made[0].b, made[1].b)
    assert not torch.equal(made[0].core, made[1].core)


@pytest.mark.parametrize(
    "name, options", [("lora", {}), ("slora", {}), ("nlora", {}), ("inttune", {"residual": True})]
)
def test_what_is_trained_or_anchored_is_not_shared(name, options):
    spec = make_spec(40, 28, 5, options=options)
    assert not get_kind(name).has_fixed_factors(spec)


def test_sb_starts_as_the_best_approximation_of_the_first_step(weight):
    kind, spec, _ = start_of("lora_sb", weight)
    g = torch.randn(28, 40, dtype=torch.float64)
    t = wide(kind.init_from_gradient(spec, g, step=1e-3))
    step = -1e-3 * g.sign()
    u, s, vt = torch.linalg.svd(step, full_matrices=False)
    best = u[:, :5] @ torch.diag(s[:5]) @ vt[:5]
    dense = update_of("lora_sb", t, {}, spec, weight)
    torch.testing.assert_close(dense, best, rtol=0, atol=1e-6 * float(s[0]))
    for orthonormal in (t["lora_sb_A"], t["lora_sb_B"].T):
        gram = orthonormal @ orthonormal.T
        torch.testing.assert_close(gram, torch.eye(5).double(), rtol=0, atol=1e-6)
    # A step on R moves dW by the projection P_B G P_A: no (BᵀB)⁻¹ is needed.
    b, a = t["lora_sb_B"], t["lora_sb_A"]
    project = [m @ torch.linalg.pinv(m) for m in (b, a.T)]
    torch.testing.assert_close(b @ (b.T @ g @ a.T) @ a, project[0] @ g @ project[1], rtol=0,
                               atol=1e-5)  # fmt: skip


# ---- NLoRA --------------------------------------------------------------------------------------


def test_nystrom_core_reproduces_the_first_rows_and_columns(weight):
    pinv = {"core": "pinv"}
    _, spec, t = start_of("nlora", weight, options=pinv, alpha=None)
    dense, w = update_of("nlora", t, {}, spec, weight), weight.double()
    torch.testing.assert_close(dense[:5], w[:5], rtol=0, atol=1e-4)
    torch.testing.assert_close(dense[:, :5], w[:, :5], rtol=0, atol=1e-4)
    _, spec, t = start_of("nlora", weight, options={}, alpha=None)
    block = update_of("nlora", t, {}, spec, weight)
    assert (block[:5] - w[:5]).norm() > 0.1 * w[:5].norm(), "the code's core is no Nystrom core"


@pytest.mark.parametrize("kind", ["nlora", "inttune"])
def test_residual_starts_at_zero_and_has_twice_the_rank(kind, weight):
    expert, spec, t = start_of(kind, weight, options={"residual": True})
    assert expert.served_rank(spec) == 10
    assert update_of(kind, t, {}, spec, weight).abs().max() < 1e-6
    assert expert.served_rank(spec_of(kind, SHAPE, options={})) == 5


# ---- LoLDU --------------------------------------------------------------------------------------


def test_loldu_is_the_papers_residual_form(weight):
    """With the base left alone: W + s B diag(z - z0) A = (W - s B diag(z0) A) + s B diag(z) A."""
    _, spec, t = start_of("loldu", weight)
    p, lower, upper = torch.linalg.lu(weight.double())
    z0 = upper.diagonal()[:5]
    a, b = upper[:5] / z0[:, None], (p @ lower)[:, :5]
    torch.testing.assert_close(t["lora_loldu_A"], a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t["lora_loldu_B"], b, rtol=1e-4, atol=1e-4)
    assert not t["lora_loldu_core"].any()
    z = z0 + torch.randn(5).double()
    t["lora_loldu_core"] = z - z0
    residual = weight.double() - spec.scale * b @ torch.diag(z0) @ a
    papers = residual + spec.scale * b @ torch.diag(z) @ a
    ours = weight.double() + update_of("loldu", t, {}, spec, weight)
    torch.testing.assert_close(ours, papers, rtol=0, atol=2e-4)


def test_lu_keeps_its_product_where_a_pivot_vanishes():
    matrix = torch.randn(12, 9, dtype=torch.float64)
    matrix[:, 2] = matrix[:, 0] - matrix[:, 1]  # the third pivot is 0
    lower, diagonal, upper = leading_lu(matrix, 6)
    p, full_l, full_u = torch.linalg.lu(matrix)
    torch.testing.assert_close(
        lower @ torch.diag(diagonal) @ upper, p @ full_l[:, :6] @ full_u[:6], rtol=0, atol=1e-12
    )
    assert diagonal.abs().min() >= 1e-6 * matrix.abs().max()
    assert upper.isfinite().all()


# ---- LoRA-GA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [16.0, 64.0])
def test_ga_first_step_is_along_the_best_approximation(gamma, weight):
    kind, spec, _ = start_of("lora_ga", weight)
    g = torch.randn(28, 40, dtype=torch.float64)
    t = wide(kind.init_from_gradient(spec, g, gamma=gamma))
    made = kind.materialise(t, {}, spec)
    assert not (made.b @ made.a).any(), "the model must not move"
    leaves = {name: t[name].requires_grad_() for name in ("lora_ga_A", "lora_ga_B")}
    made = kind.materialise(t, {}, spec)
    (made.scale * made.b @ made.a * g).sum().backward()
    da, db = leaves["lora_ga_A"].grad, leaves["lora_ga_B"].grad
    first_order = spec.scale * (db @ t["lora_ga_A"] + t["lora_ga_B"] @ da).detach()
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    best = u[:, :10] @ torch.diag(s[:10]) @ vt[:10]
    factor = spec.scale**2 * 28**0.5 / gamma
    torch.testing.assert_close(first_order, factor * best, rtol=0, atol=1e-5 * float(s[0]))


def test_ga_refuses_a_module_with_too_few_directions():
    kind, spec = get_kind("lora_ga"), make_spec(40, 28, 15)
    with pytest.raises(ValueError, match="takes 30 singular directions, a 40 x 28 module has 28"):
        kind.init_from_gradient(spec, torch.randn(28, 40))


# ---- decompositions -----------------------------------------------------------------------------


def test_iterated_svd_is_as_good_as_the_exact_one():
    """300 x 400 of slowly falling spectrum: through subspace iteration."""
    u, _ = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(400, 300, dtype=torch.float64))
    s = torch.linspace(2, 0.5, 300, dtype=torch.float64)
    matrix = u @ torch.diag(s) @ v.T
    found = top_svd(matrix, 8)
    error = torch.linalg.matrix_norm(matrix - found[0] @ torch.diag(found[1]) @ found[2])
    assert error < 1.002 * s[8:].norm()
    assert (found[1] <= s[:8] + 1e-9).all() and (found[1] > 0.97 * s[:8]).all()
    again = top_svd(matrix, 8)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    decaying = u @ torch.diag(2.0 ** -torch.arange(300).double()) @ v.T
    us, ss, vs = top_svd(decaying, 8)
    torch.testing.assert_close(ss, 2.0 ** -torch.arange(8).double())
    exact_u, exact_s, exact_vt = torch.linalg.svd(decaying, full_matrices=False)
    best = exact_u[:, :8] @ torch.diag(exact_s[:8]) @ exact_vt[:8]
    torch.testing.assert_close(us @ torch.diag(ss) @ vs, best)


def test_svd_signs_are_canonical_and_missing_ranks_zero():
    matrix = torch.randn(6, 4)
    u, s, vt = top_svd(-matrix, 7)
    assert u.shape == (6, 7) and s.shape == (7,) and vt.shape == (7, 4)
    assert not u[:, 4:].any() and not s[4:].any() and not vt[4:].any()
    torch.testing.assert_close(u @ torch.diag(s) @ vt, -matrix)
    assert (u[:, :4].gather(0, u[:, :4].abs().argmax(0, keepdim=True)) > 0).all()


def test_slora_moves_all_three_after_the_first_step(weight):
    kind, spec, t = start_of("slora", weight)
    g = torch.randn(28, 40, dtype=torch.float64)

    def gradients(values):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        made = kind.materialise(leaves, {}, spec)
        (made.b @ made.a * g).sum().backward()
        return {name: leaf.grad.abs().max().item() for name, leaf in leaves.items()}

    first = gradients(t)
    assert first["slora_B"] > 0 and first["slora_A"] == first["slora_core"] == 0
    later = gradients(wide(trained("slora", spec, weight)))
    assert all(value > 0 for value in later.values())


def test_a_small_step_away_from_the_start_survives_bf16(weight):
    """B A - B_0 A_0 as two rounded products would lose a step of a thousandth of the factors."""
    kind, spec, _ = start_of("lora_ga", weight)
    t = wide(kind.init_from_gradient(spec, torch.randn(28, 40, dtype=torch.float64)))
    for name in ("lora_ga_A", "lora_ga_B"):
        t[name] = t[name] + 1e-3 * torch.randn_like(t[name])
    expected = update_of("lora_ga", t, {}, spec, weight)
    made = kind.materialise(t, {}, spec)
    rounded = spec.scale * made.b.bfloat16().double() @ made.a.bfloat16().double()
    assert (rounded - expected).norm() < 0.01 * expected.norm()
