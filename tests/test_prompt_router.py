"""prompt_router: poolers, activations, norms, gates, and their gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerance import assert_as_good_as_torch

from milora import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_EXPERTS = 7

# A (6, 5) fit of GELU: close on [-3, 3], bounded outside.
GELU_A = [0.0019, 0.5, 0.3979, 0.0752, 0.0241, 0.0106, 0.0011]
GELU_B = [0.0181, 0.0963, 0.0159, 0.0112, 0.001]
GELU_FIT = GELU_A + GELU_B

# Spans that leave gaps, cross chunks of 32, are empty, and hold one token.
SPANS = [(0, 1), (1, 33), (33, 64), (70, 103), (103, 103), (110, 209), (209, 240), (250, 257)]
NUM_TOKENS = 260


def make_codes(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


# Pooler x activation, with norm, gate, top_k and num_experts going round.
ALL_CODES = [
    (pooler, activation, i % 2, i % 3, 1 + i % 4, NUM_EXPERTS - i % 3)
    for i, (pooler, activation) in enumerate(itertools.product(range(4), range(3)))
]


def router_inputs(dtype=torch.float32, d=37, spans=SPANS, codes=ALL_CODES, num_tokens=NUM_TOKENS):
    """Arguments of prompt_router by name; tokens outside the spans are NaN."""
    num_routers = len(codes)
    h = torch.full((num_tokens, d + 5), torch.nan)
    for begin, end in spans:
        h[begin:end, 2 : d + 2] = torch.randn(end - begin, d)
    router_of = torch.arange(len(spans), dtype=torch.int32) * 5 % num_routers
    router_of[len(spans) // 2 + 2 :: 5] = -1
    return {
        "h": h.to(dtype)[:, 2 : d + 2],
        "spans": torch.tensor(spans, dtype=torch.int32).view(-1, 2),
        "router_of": router_of,
        "w_sa": torch.randn(num_routers, d) / d**0.5,
        "w_r": torch.randn(num_routers, NUM_EXPERTS, d) / d**0.5,
        # Small changes: near a zero of Q the sums are ill-conditioned for any kernel.
        "coef": torch.tensor(GELU_FIT) + 0.01 * torch.rand(num_routers, 12),
        "codes": make_codes(codes),
    }


def run(function, inputs: dict, dtype=None, device="cpu") -> list[torch.Tensor]:
    """probs, gates, pooled, dh, dw_sa, dw_r, dcoef for fixed output gradients."""
    generator = torch.Generator().manual_seed(7)
    leaves = {
        name: inputs[name].detach().to(device, dtype or inputs[name].dtype).requires_grad_()
        for name in ("h", "w_sa", "w_r", "coef")
    }
    rest = {name: inputs[name].to(device) for name in ("spans", "router_of", "codes")}
    outputs = function(**leaves, **rest)
    grads = [
        torch.randn(t.shape, generator=generator).to(t.device, t.dtype) / (t.shape[1] or 1) ** 0.5
        for t in outputs
    ]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    grads = [
        torch.zeros_like(leaf) if grad is None else grad
        for grad, leaf in zip(found, leaves.values(), strict=True)
    ]
    return [t.detach().cpu() for t in (*outputs, *grads)]


def check(inputs: dict, device: str = "cpu") -> None:
    actual = run(ops.prompt_router, inputs, device=device)
    expected = run(reference.prompt_router, inputs, torch.float64)
    same_dtype = run(reference.prompt_router, inputs)
    names = ["probs", "gates", "pooled", "dh", "dw_sa", "dw_r", "dcoef"]
    for name, got, want, torch_result in zip(names, actual, expected, same_dtype, strict=True):
        assert_as_good_as_torch(got, want, torch_result, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", range(len(ALL_CODES)))
def test_against_reference(first, dtype, device):
    check(router_inputs(dtype, codes=ALL_CODES[first:] + ALL_CODES[:first]), device)


@pytest.mark.parametrize("d", [1, 16, 33, 100, 1000])
def test_widths(d, device):
    check(router_inputs(d=d), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [40, 2056, 4104])
def test_rows_of_whole_vectors(d, dtype, device):
    """H on 16 bytes, as models have it: CUDA has other kernels for that."""
    spans = [(0, 19), (19, 20), (20, 28), (28, 70)]
    inputs = router_inputs(dtype, d, spans=spans, codes=ALL_CODES[:5], num_tokens=72)
    check({**inputs, "h": inputs["h"].contiguous()}, device)


@pytest.mark.parametrize("num_tokens", [31, 32, 33, 34])
@pytest.mark.parametrize("num_prompts", [1, 2, 3])
def test_counts_of_prompts_and_tokens(num_prompts, num_tokens, device):
    """Whatever these are, all that CUDA keeps between two launches must lie on whole vectors."""
    spans = [(i * 10, i * 10 + 10) for i in range(num_prompts - 1)]
    spans.append((10 * len(spans), num_tokens))
    inputs = router_inputs(torch.bfloat16, 64, spans, ALL_CODES[:4], num_tokens)
    check({**inputs, "h": inputs["h"].contiguous()}, device)


def test_no_routers(device):
    inputs = router_inputs(codes=[(0, 0, 0, 0, 1, NUM_EXPERTS)])
    inputs["router_of"].fill_(-1)
    inputs = {name: t[:0] if len(t) == 1 else t for name, t in inputs.items()}
    assert not any(t.any() for t in run(ops.prompt_router, inputs, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_each_isa(dtype, isa):
    check(router_inputs(dtype, d=100))


@pytest.mark.parametrize("gate", range(3))
@pytest.mark.parametrize("pooler", range(4))
def test_poolers_and_gates(pooler, gate, device):
    check(router_inputs(codes=[(pooler, 0, gate % 2, gate, 3, NUM_EXPERTS)]), device)


def in_pool(inputs: dict) -> dict:
    """The same routers in a pool, whose padding is NaN, after a free slot that holds anything."""
    routers = []
    for i, (pooler, activation, *_, num_experts) in enumerate(inputs["codes"].tolist()):
        router = {"w_r": inputs["w_r"][i, :num_experts]}
        router |= {"w_sa": inputs["w_sa"][i]} if pooler == 0 else {}
        router |= {"coef": inputs["coef"][i]} if activation == 0 else {}
        routers.append(router)
    pool, offsets = reference.pack_routers(routers)
    router_of = inputs["router_of"]
    return {
        "h": inputs["h"],
        "spans": inputs["spans"],
        "router_of": torch.where(router_of >= 0, router_of + 1, router_of),
        "pool": pool,
        "offsets": torch.cat([torch.full((1, 3), 12345), offsets]),
        "codes": torch.cat([torch.full((1, 6), -7, dtype=torch.int32), inputs["codes"]]),
        "num_experts": NUM_EXPERTS,
    }


def to_device(inputs: dict, device: str) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def check_pool(inputs: dict, device: str = "cpu") -> None:
    """prompt_router_pool gives the bits of prompt_router, and those of the reference nearly."""
    pooled = in_pool(inputs)
    actual = [t.cpu() for t in ops.prompt_router_pool(**to_device(pooled, device))]
    for got, want in zip(actual, run_forward(inputs, device), strict=True):
        assert torch.equal(got, want)
    exact = reference.prompt_router_pool(**pooled, dtype=torch.float64)
    same_dtype = reference.prompt_router_pool(**pooled)
    for name, *values in zip(["probs", "gates", "pooled"], actual, exact, same_dtype, strict=True):
        assert_as_good_as_torch(*values, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 33, 100])
def test_pool_equals_tensors(d, dtype, device):
    check_pool(router_inputs(dtype, d), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_on_each_isa(dtype, isa):
    check_pool(router_inputs(dtype, d=101))


def test_pool_of_nothing(device):
    inputs = in_pool(router_inputs())
    inputs["router_of"].fill_(-1)
    inputs["pool"] = torch.empty(0, dtype=torch.uint8)
    for got in ops.prompt_router_pool(**to_device(inputs, device)):
        assert torch.equal(got.cpu(), torch.zeros_like(got, device="cpu"))


def test_no_prompts(device):
    inputs = router_inputs(spans=[])
    probs, gates, pooled, dh, *_ = run(ops.prompt_router, inputs, device=device)
    assert probs.shape == gates.shape == (0, NUM_EXPERTS) and pooled.shape == (0, 37)
    assert torch.equal(dh, torch.zeros(NUM_TOKENS, 37))


def test_ties_go_to_the_lower_index(device):
    inputs = router_inputs(codes=[(1, 0, 0, 0, 3, 6)])
    inputs["w_r"].zero_()
    gates = run(ops.prompt_router, inputs, device=device)[1]
    assert torch.equal(gates[0] > 0, torch.tensor([True] * 3 + [False] * 4))


def test_first_maximum_gets_the_gradient(device):
    inputs = router_inputs(codes=[(2, 2, 0, 0, 3, 7)], spans=[(0, 100)])
    inputs["h"].fill_(-1.0)
    inputs["h"][[40, 70]] = 2.0
    dh = run(ops.prompt_router, inputs, device=device)[3]
    assert dh[40].abs().min() > 0
    dh[40] = 0
    assert torch.equal(dh, torch.zeros_like(dh))


@pytest.mark.parametrize("x", [1e-30, 0.5, 1.0, 1.0000001, 3.0, 1e3, 1e10, 1e30])
def test_rational_does_not_overflow(x, device):
    """Value and derivatives against float64, far beyond where x^6 leaves float32."""
    coef = torch.tensor(GELU_FIT)
    for signed in (x, -x):
        inputs = router_inputs(d=2, spans=[(0, 1)], codes=[(1, 0, 0, 0, 7, 7)], num_tokens=1)
        inputs["router_of"].zero_()
        inputs["coef"] = coef[None].clone()
        inputs["h"] = torch.tensor([[signed, 0.3]])
        # Weights so small that the softmax stays in its middle whatever g(x) is.
        inputs["w_r"] = torch.randn(1, NUM_EXPERTS, 2) / max(1.0, x)
        check(inputs, device)


def test_gradient_at_a_zero_of_the_denominator_sum(device):
    """Q(0) = 0: sign(0) counts as 0, as torch's abs has it."""
    inputs = router_inputs(d=4, spans=[(0, 2)], codes=[(1, 0, 0, 0, 3, 7)], num_tokens=2)
    inputs["h"] = torch.zeros(2, 4)
    check(inputs, device)


def test_batch_invariance(device):
    inputs = router_inputs(torch.bfloat16, d=130)
    together = run_forward(inputs, device)
    for i, (begin, end) in enumerate(SPANS):
        alone = {
            **inputs,
            "h": inputs["h"][begin:end],
            "spans": torch.tensor([[0, end - begin]], dtype=torch.int32),
            "router_of": inputs["router_of"][i : i + 1],
        }
        for got, want in zip(run_forward(alone, device), together, strict=True):
            assert torch.equal(got[0], want[i]), f"prompt {i}"


def run_forward(inputs: dict, device: str) -> list[torch.Tensor]:
    return [t.cpu() for t in ops.prompt_router(**{k: v.to(device) for k, v in inputs.items()})]


def test_does_not_depend_on_threads():
    inputs = router_inputs(torch.bfloat16, d=1024)
    two = run(ops.prompt_router, inputs)
    torch.set_num_threads(1)
    for got, want in zip(run(ops.prompt_router, inputs), two, strict=True):
        assert torch.equal(got, want)


def test_reference_gradcheck():
    codes = [(0, 0, 1, 1, 2, 3), (1, 1, 0, 0, 2, 3), (2, 0, 0, 0, 3, 3)]
    spans = [(0, 2), (2, 5), (5, 6)]
    inputs = router_inputs(torch.float64, d=3, spans=spans, codes=codes, num_tokens=6)
    inputs["router_of"] = torch.tensor([0, 1, 2], dtype=torch.int32)
    leaves = [inputs[name].double().requires_grad_() for name in ("h", "w_sa", "w_r", "coef")]

    def function(h, w_sa, w_r, coef):
        return reference.prompt_router(
            h, inputs["spans"], inputs["router_of"], w_sa, w_r, coef, inputs["codes"]
        )

    assert torch.autograd.gradcheck(function, leaves)


def test_opcheck():
    inputs = router_inputs(d=8)
    inputs["h"] = torch.nan_to_num(inputs["h"])  # opcheck compares inputs, NaN differs from itself
    leaves = {n: inputs[n].requires_grad_() for n in ("h", "w_sa", "w_r", "coef")}
    arguments = tuple({**inputs, **leaves}.values())
    torch.library.opcheck(torch.ops.milora.prompt_router.default, arguments)
    arguments = tuple(t.detach() for t in arguments)
    probs, _, pooled = ops.prompt_router(*arguments)
    grads = (torch.randn_like(probs), torch.randn_like(probs), torch.randn_like(pooled))
    torch.library.opcheck(
        torch.ops.milora.prompt_router_backward.default, (*grads, *arguments, probs, pooled)
    )


def test_opcheck_pool():
    inputs = in_pool(router_inputs(d=8))
    inputs["h"] = torch.nan_to_num(inputs["h"])
    inputs["pool"] = inputs["pool"].where(inputs["pool"] != 0xFF, 0)
    torch.library.opcheck(torch.ops.milora.prompt_router_pool.default, tuple(inputs.values()))


ERRORS = [
    (
        {"h": torch.zeros(4, 37, dtype=torch.int32)},
        "h must be float32, bfloat16 or float16, got Int",
    ),
    ({"spans": torch.tensor([[0, 300]] * 8, dtype=torch.int32)}, r"spans must lie in \[0, 260\]"),
    (
        {"spans": torch.tensor([[0, 2], [1, 3]] * 4, dtype=torch.int32)},
        r"spans must not overlap, got \[0, 2\) and \[0, 2\)",
    ),
    ({"router_of": torch.full((8,), 12, dtype=torch.int32)}, r"router_of must be in \[-1, 12\)"),
    ({"codes": make_codes([(4, 0, 0, 0, 1, 1)] * 12)}, r"codes: pooler must be in \[0, 3\], got 4"),
    ({"codes": make_codes([(0, 0, 0, 0, 4, 3)] * 12)}, r"codes: top_k must be in \[1, 3\], got 4"),
    ({"codes": make_codes([(0, 0, 0, 0, 1, 8)] * 12)}, r"codes: num_experts must be in \[1, 7\]"),
    (
        {"coef": torch.zeros(12, 11)},
        r"coef must be \[num_routers, 12\] = \[12, 12\], got \[12, 11\]",
    ),
    ({"w_sa": torch.zeros(12, 37).half()}, "w_sa must be Float, got Half"),
]


@pytest.mark.parametrize("change, message", ERRORS)
def test_errors(change, message):
    with pytest.raises(RuntimeError, match="^prompt_router: " + message):
        ops.prompt_router(**{**router_inputs(), **change})


POOL_ERRORS = [
    ({"num_experts": 65}, r"num_experts must be in \[1, 64\], got 65"),
    ({"num_experts": 4}, r"codes: num_experts must be in \[1, 4\], got 7 for router 1"),
    ({"router_of": torch.zeros(8, dtype=torch.int32)}, "codes: pooler must be in .* got -7"),
    ({"offsets": torch.full((13, 3), -1)}, "offsets must place w_sa of router 1 on 16 bytes"),
    ({"offsets": torch.full((13, 3), 8)}, "offsets must place w_sa of router 1 on 16 bytes"),
    ({"offsets": torch.full((13, 3), 1 << 40)}, r"offsets must place .* got 1099511627776 \+ 148"),
    ({"offsets": torch.zeros(13, 4, dtype=torch.int64)}, r"offsets must be \[num_routers, 3\]"),
    ({"pool": torch.zeros(99)}, "pool must be Byte, got Float"),
    ({"pool": torch.zeros(99, dtype=torch.uint8)[1:]}, "pool must start on 16 bytes"),
    ({"codes": torch.zeros(13, 6, dtype=torch.int64)}, "codes must be Int, got Long"),
]


@pytest.mark.parametrize("change, message", POOL_ERRORS)
def test_pool_errors(change, message):
    with pytest.raises(RuntimeError, match="^prompt_router_pool: " + message):
        ops.prompt_router_pool(**{**in_pool(router_inputs()), **change})
