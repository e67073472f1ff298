"""Every expert kind with its options, and its update from the paper's formula, for any test."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from milora.experts import ExpertSpec, RankGated, get_kind, make_spec
from milora.random import uniform

# case -> (kind, options); the sizes suit the tiny models of tests/tiny_models.py
CASES: dict[str, tuple[str, dict]] = {
    "lora": ("lora", {}),
    "dora": ("dora", {}),
    "lora_mini": ("lora_mini", {"inner_in": 6, "inner_out": 5}),
    "ffa_lora": ("ffa_lora", {}),
    "lora_xs": ("lora_xs", {}),
    "lora_xs_random": ("lora_xs", {"factors": "random"}),
    "lora_sb": ("lora_sb", {}),
    "slora": ("slora", {}),
    "nlora": ("nlora", {}),
    "nlora_residual": ("nlora", {"core": "pinv", "residual": True}),
    "inttune": ("inttune", {"residual": True}),
    "loldu": ("loldu", {}),
    "lora_ga": ("lora_ga", {}),
    "melora": ("melora", {}),
    "prolora": ("prolora", {"chunks_in": 3, "stride_in": 2}),
    "nola": ("nola", {"num_basis": 5}),
    "randlora": ("randlora", {}),
    "randlora_peft": ("randlora", {"layout": "peft"}),
    "mora": ("mora", {}),
    "bone": ("bone", {}),
    "lorta": ("lorta", {"head_dim": 4}),
    "dylora": ("dylora", {}),
    "dylora_rank": ("dylora", {"rank": 2, "min_rank": 2}),
    "beamlora": ("beamlora", {"tau": 0.5}),
    "flylora": ("flylora", {"top_k": 2}),
    "smora": ("smora", {"top_k": 2}),
}
# Tokens gate their ranks: no (A, B) says what these compute. Their own tests: test_rank_gated.py.
GATED = {case for case, (kind, _) in CASES.items() if isinstance(get_kind(kind), RankGated)}
# What these start with is not 0.
MOVES_THE_BASE = {"lora_xs": 1e-3, "lora_xs_random": 1e-3, "nlora": math.inf}


def spec_of(case: str, shape: tuple[int, int, int], **changes) -> ExpertSpec:
    options = CASES[case][1]
    settings = {"alpha": 6.0, "options": options, "seed": 3, "path": "layers.0.q_proj", **changes}
    return make_spec(*shape, **settings)


def move(tensors: dict[str, Tensor], fixed: frozenset[str], std: float, seed: int = 0) -> None:
    """Add noise to what training would change, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name not in fixed:
            noise = torch.empty(tensor.shape).normal_(0.0, std, generator=generator)
            with torch.no_grad():
                tensor.add_(noise.to(tensor.dtype))


def trained(case: str, spec: ExpertSpec, weight: Tensor, dtype=torch.float32) -> dict[str, Tensor]:
    """Tensors that are no longer at their start."""
    kind = get_kind(CASES[case][0])
    tensors = kind.init(spec, lambda: weight)
    move(tensors, kind.fixed, 0.1)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def base_weight(spec: ExpertSpec, dtype=torch.float32) -> Tensor:
    return (torch.randn(spec.d_out, spec.d_in) / math.sqrt(spec.d_in)).to(dtype)


def update_of(
    kind: str, t: dict[str, Tensor], f: dict[str, Tensor], spec: ExpertSpec, weight: Tensor
) -> Tensor:
    """dW [d_out, d_in] as the papers write it, in the dtype of the tensors; of `GATED` with all
    gates 1."""
    return _DENSE[kind](t, f, spec, weight)


def _dora(t, f, spec, weight):
    total = weight + spec.scale * t["lora_B"] @ t["lora_A"]
    c = t["lora_magnitude_vector"] / total.norm(dim=1)
    return c[:, None] * total - weight


def _xs(t, f, spec, weight):
    v = {**f, **t}
    return spec.scale * v["lora_xs_B"] @ v["lora_xs_core"] @ v["lora_xs_A"]


def _three(prefix):
    def dense(t, f, spec, weight):
        update = t[f"{prefix}_B"] @ t[f"{prefix}_core"] @ t[f"{prefix}_A"]
        if f"{prefix}_start_A" in t:
            update = update - t[f"{prefix}_start_B"] @ t[f"{prefix}_start_A"]
        return spec.scale * update

    return dense


def _melora(t, f, spec, weight):
    n, r = spec.options.get("num_blocks", 4), spec.rank
    dense = torch.zeros_like(weight, dtype=t["melora_A"].dtype)
    i, o = spec.d_in // n, spec.d_out // n
    for j in range(n):
        b, a = t["melora_B"][j * o : (j + 1) * o], t["melora_A"][j * r : (j + 1) * r]
        dense[j * o : (j + 1) * o, j * i : (j + 1) * i] = spec.scale * b @ a
    return dense


def _prolora(t, f, spec, weight):
    unshared = spec.scale * t["prolora_unshared_B"] @ t["prolora_unshared_A"]
    if "prolora_A" not in t:
        return unshared
    a0, b0 = t["prolora_A"], t["prolora_B"]
    m, n = spec.options.get("chunks_in", 4), spec.options.get("chunks_out", 4)
    shared = a0.shape[0]
    stride_in = spec.options.get("stride_in") or max(shared // m, 1)
    stride_out = spec.options.get("stride_out") or max(shared // n, 1)
    a = torch.cat([a0.roll(-i * stride_in, 0) for i in range(m)], 1)[:, : spec.d_in]
    b = torch.cat([b0.roll(-i * stride_out, 1) for i in range(n)], 0)[: spec.d_out]
    return spec.scale * (b @ a) + unshared


def _nola(t, f, spec, weight):
    alpha, beta = t["lora_nola_A"], t["lora_nola_B"]
    k, shapes = len(alpha), ((spec.rank, spec.d_in), (spec.d_out, spec.rank))
    a, b = (
        sum(c * uniform(shape, spec.seed, first + 2 * j).to(c.dtype) for j, c in enumerate(values))
        / math.sqrt(k)
        for values, shape, first in ((alpha, shapes[0], 1), (beta, shapes[1], 2))
    )
    return spec.scale * b @ (f["nola_start_A"] + a)


def _randlora(t, f, spec, weight):
    lam, gam, a = t["randlora_lambda"], t["randlora_gamma"], f["randlora_A"]
    r, n = lam.shape
    bases = f["randlora_B"].reshape(-1, n, r)
    if spec.options.get("layout") == "peft":  # row (k, j) of the one meets column (j, k)
        rows = torch.stack([lam[k, j] * a[k] * gam[j] for k in range(r) for j in range(n)])
        dense = f["randlora_B"] @ rows
    else:
        dense = sum(bases[:, j] @ torch.diag(lam[:, j]) @ a @ torch.diag(gam[j]) for j in range(n))
    return spec.scale * (dense.T if spec.d_in > spec.d_out else dense)


def _mora(t, f, spec, weight):
    m = t["lora_mora_M"]
    q = len(m)
    columns = []
    for x in torch.eye(spec.d_in, dtype=m.dtype):
        repeats = 1 + q // spec.d_in + 1
        padded = x.repeat(repeats)[: -(-spec.d_in // q) * q]
        columns.append((m @ padded.reshape(-1, q).sum(0)).repeat(-(-spec.d_out // q)))
    return spec.scale * torch.stack(columns, 1)[: spec.d_out]


def _lorta(t, f, spec, weight):
    heads = [
        t["lora_lorta_B"]
        @ torch.diag(c * t["lora_lorta_matrix"][0] * t["lora_lorta_layer"][0])
        @ t["lora_lorta_A"]
        for c in t["lora_lorta_head"]
    ]
    return spec.scale * torch.cat(heads)


def _dylora(t, f, spec, weight):
    n = min(spec.options.get("rank") or spec.rank, spec.rank)
    return spec.alpha / n * t["dylora_B"][:, :n] @ t["dylora_A"][:n]


def _beamlora(t, f, spec, weight):
    q = t["lora_beam_core"] / spec.options.get("tau", 0.05)
    shares = spec.rank * q.exp() / q.exp().sum()
    return spec.scale * t["lora_beam_B"] @ torch.diag(shares) @ t["lora_beam_A"]


def _bone(t, f, spec, weight):
    d = t["lora_bone_B"].T  # [r, d_out]
    rows = [d[i % spec.rank] for i in range(spec.d_in)]
    return spec.scale * torch.stack(rows, 1)


_DENSE = {
    "lora": lambda t, f, s, w: s.scale * t["lora_B"] @ t["lora_A"],
    "dora": _dora,
    "lora_mini": lambda t, f, s, w: (
        s.scale * f["outer_out"] @ (t["lora_mini_B"] @ t["lora_mini_A"]) @ f["outer_in"]
    ),
    "ffa_lora": lambda t, f, s, w: s.scale * t["ffa_lora_B"] @ f["ffa_lora_A"],
    "lora_xs": _xs,
    "lora_sb": _three("lora_sb"),
    "slora": _three("slora"),
    "nlora": _three("nlora"),
    "inttune": _three("lora_inttune"),
    "loldu": lambda t, f, s, w: (
        s.scale * t["lora_loldu_B"] @ torch.diag(t["lora_loldu_core"]) @ t["lora_loldu_A"]
    ),
    "lora_ga": lambda t, f, s, w: (
        s.scale * (t["lora_ga_B"] @ t["lora_ga_A"] - t["lora_ga_start_B"] @ t["lora_ga_start_A"])
    ),
    "melora": _melora,
    "prolora": _prolora,
    "nola": _nola,
    "randlora": _randlora,
    "mora": _mora,
    "bone": _bone,
    "lorta": _lorta,
    "dylora": _dylora,
    "beamlora": _beamlora,
    "flylora": lambda t, f, s, w: s.scale * t["flylora_B"] @ f["flylora_A"],
    "smora": lambda t, f, s, w: s.scale * t["lora_smora_B"] @ t["lora_smora_A"],
}
