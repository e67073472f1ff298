"""Kinds that are no chain of factors but become (A, B): the properties their papers claim."""

from __future__ import annotations

import pytest
import torch
from expert_cases import base_weight, spec_of, trained, update_of

from milora.experts import get_kind, make_spec
from milora.random import uniform


def count(kind: str, spec) -> int:
    return sum(torch.Size(shape).numel() for shape in get_kind(kind).tensors(spec).values())


def dense(case: str, spec, tensors=None):
    """dW in float64 of tensors that were trained a little."""
    kind = get_kind(case)
    tensors = tensors or trained(case, spec, base_weight(spec))
    made = kind.materialise(
        {k: v.double() for k, v in tensors.items()},
        {k: v.double() for k, v in kind.frozen(spec).items()},
        spec,
    )
    return made.scale * made.b @ made.a


def rank_of(matrix) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-7))


# ---- MELoRA -------------------------------------------------------------------------------------


def test_melora_has_n_times_the_rank_of_a_lora_of_its_size():
    spec = make_spec(48, 64, 2)
    assert count("melora", spec) == count("lora", spec) == 2 * (48 + 64)
    assert rank_of(dense("melora", spec)) == get_kind("melora").served_rank(spec) == 8


def test_melora_slices_are_apart():
    spec = make_spec(48, 64, 2)
    x = torch.zeros(48, dtype=torch.float64)
    x[12:24] = 1.0  # the second of four slices
    y = dense("melora", spec) @ x
    assert y[16:32].abs().min() > 0 and not y[:16].any() and not y[32:].any()


def test_melora_of_one_block_is_lora():
    spec = make_spec(24, 16, 3, options={"num_blocks": 1}, seed=5)
    lora, melora = (get_kind(name).init(spec) for name in ("lora", "melora"))
    assert torch.equal(lora["lora_A"], melora["melora_A"])
    assert count("melora", spec) == count("lora", spec)


# ---- PRoLoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, n, u", [(4, 4, 1), (3, 5, 0), (1, 1, 2), (2, 3, 6)])
def test_prolora_count_and_rank(m, n, u):
    options = {"chunks_in": m, "chunks_out": n, "unshared": u}
    spec = spec_of("prolora", (50, 37, 6), options=options)
    shared = 6 - u
    expected = shared * (-(-50 // m) + -(-37 // n)) + u * (50 + 37)
    assert count("prolora", spec) == expected
    assert rank_of(dense("prolora", spec)) == 6


@pytest.mark.parametrize("options", [{"chunks_in": 1, "chunks_out": 1, "unshared": 0},
                                     {"unshared": 5}])  # fmt: skip
def test_prolora_without_sharing_is_lora(options):
    spec = spec_of("prolora", (20, 14, 5), options=options)
    t = trained("prolora", spec, None)
    a, b = t.values() if "prolora_A" in t else (t["prolora_unshared_A"], t["prolora_unshared_B"])
    torch.testing.assert_close(dense("prolora", spec, t), spec.scale * b.double() @ a.double())


def test_prolora_rotation_gives_rank_that_plain_copies_do_not_have():
    """A_0 of width 2 repeated as it is would have rank 2."""
    spec = spec_of("prolora", (8, 8, 4), options={"chunks_in": 4, "chunks_out": 4, "unshared": 0})
    assert rank_of(dense("prolora", spec)) == 4
    t = trained("prolora", spec, None)
    tiled = t["prolora_B"].double().repeat(4, 1) @ t["prolora_A"].double().repeat(1, 4)
    assert rank_of(tiled) == 2


def test_prolora_starts_with_the_fan_of_the_whole_matrix():
    spec = spec_of("prolora", (4000, 40, 8), options={"chunks_in": 8, "unshared": 0})
    a = get_kind("prolora").init(spec)["prolora_A"]
    assert a.shape == (8, 500) and a.abs().max() <= 4000**-0.5
    assert a.abs().max() > 0.99 * 4000**-0.5


# ---- NOLA ---------------------------------------------------------------------------------------


def test_nola_count_does_not_depend_on_the_module():
    options = {"num_basis": 64}
    for shape in ((33, 100, 4), (4096, 11008, 32)):
        assert count("nola", spec_of("nola", shape, options=options)) == 128


def test_nola_is_linear_in_one_side_and_gradients_are_inner_products():
    spec = spec_of("nola", (12, 10, 3), options={"num_basis": 5})
    alpha, beta = torch.randn(2, 5, dtype=torch.float64)
    parts = [
        dense("nola", spec, {"lora_nola_A": alpha, "lora_nola_B": b}) for b in (beta, 2 * beta)
    ]
    torch.testing.assert_close(parts[1], 2 * parts[0])
    leaf = alpha.clone().requires_grad_()
    made = get_kind("nola").materialise(
        {"lora_nola_A": leaf, "lora_nola_B": beta},
        {k: v.double() for k, v in get_kind("nola").frozen(spec).items()},
        spec,
    )
    g = torch.randn(3, 12, dtype=torch.float64)
    (made.a * g).sum().backward()
    bases = [uniform((3, 12), spec.seed, 1 + 2 * j) / 5**0.5 for j in range(5)]
    torch.testing.assert_close(leaf.grad, torch.stack([(g * basis).sum() for basis in bases]))


def test_nola_bases_do_not_depend_on_the_dtype():
    spec = spec_of("nola", (12, 10, 3), options={"num_basis": 1})
    a = [
        uniform((3, 12), spec.seed, 1, dtype=dtype).double()
        for dtype in (torch.float32, torch.float64)
    ]
    assert torch.equal(a[0], a[1])


# ---- RandLoRA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 32, 6), (32, 20, 6), (24, 24, 24)])
@pytest.mark.parametrize("layout", ["paper", "peft"])
def test_randlora_has_full_rank(shape, layout):
    spec = spec_of("randlora", shape, options={"layout": layout})
    assert rank_of(dense("randlora", spec)) == min(shape[:2])
    n = -(-min(shape[:2]) // shape[2])
    assert count("randlora", spec) == shape[2] * n + n * min(shape[:2])


def test_randlora_layouts_differ():
    spec = [spec_of("randlora", (20, 32, 6), options={"layout": x}) for x in ("paper", "peft")]
    t = trained("randlora", spec[0], None)
    paper, peft = (dense("randlora", s, t) for s in spec)
    assert (paper - peft).norm() > 0.5 * paper.norm()


# ---- MoRA, Bone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, q", [((30, 20, 2), 10), ((7, 9, 1), 4), ((4096, 4096, 8), 256)])
def test_mora_square(shape, q):
    spec = make_spec(*shape)
    assert get_kind("mora").served_rank(spec) == q and count("mora", spec) == q * q
    get_kind("mora").check(spec)
    if q < 256:
        assert rank_of(dense("mora", spec)) == q
    assert spec.scale == 1.0  # MoRA has no alpha


def test_mora_sums_chunks_and_tiles():
    spec = make_spec(10, 11, 1)  # q = 5: no padding
    m = torch.randn(5, 5, dtype=torch.float64)
    x = torch.randn(10, dtype=torch.float64)
    y = dense("mora", spec, {"lora_mora_M": m}) @ x
    torch.testing.assert_close(y, (m @ (x[:5] + x[5:])).repeat(3)[:11])


def test_bone_sums_chunks():
    spec = make_spec(7, 6, 3)
    d = torch.randn(6, 3, dtype=torch.float64)
    x = torch.randn(7, dtype=torch.float64)
    sums = x[:3] + x[3:6]
    sums[0] += x[6]
    torch.testing.assert_close(dense("bone", spec, {"lora_bone_B": d}) @ x, d @ sums)
    assert count("bone", make_spec(4096, 4096, 32)) == 32 * 4096


def test_formulas_of_the_cases_agree_with_materialise():
    """The two ways to dW, here in float64 throughout."""
    for kind in ("melora", "prolora", "nola", "randlora", "mora", "bone"):
        spec = spec_of(kind, (24, 36, 4))
        t = {k: v.double() for k, v in trained(kind, spec, None).items()}
        f = {k: v.double() for k, v in get_kind(kind).frozen(spec).items()}
        expected = update_of(kind, t, f, spec, torch.zeros(36, 24).double())
        torch.testing.assert_close(dense(kind, spec, t), expected, msg=kind)
