"""grouped_lora_ (in place, weights in the pool) and grouped_lora (training)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_as_good_as_torch

from milora import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = [ops.DECODE, ops.PREFILL]


@dataclass(frozen=True)
class Case:
    """One batch: tokens, their routes and adapters, ranks of the adapters, shapes."""

    name: str
    num_tokens: int
    ranks: tuple[int, ...]
    d_in: int
    d_out: tuple[int, ...]
    route_of: tuple[int, ...]  # repeated or cut to num_tokens
    adapter_of: tuple[int, ...]
    dora: bool = False
    strided: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("no_tokens", 0, (8,), 64, (64,), (0,), (0,)),
    Case("one_token", 1, (32,), 64, (64,), (0,), (0,)),
    Case("odd_sizes", 7, (3, 5), 33, (100, 1), (0, 1), (0, 1)),
    Case("rank_mix", 9, (1, 2, 17, 64, 256), 48, (80,), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
    Case("rank_zero", 6, (0, 8), 32, (40,), (0, 1), (0, 1)),
    Case("bare_rows", 8, (8,), 32, (40, 24), (0, -1, 1), (0, -1)),
    Case("no_adapter_used", 5, (8,), 32, (40,), (-1, 0), (-1,)),
    Case("tile_minus_one", 11, (16,), 63, (63,), (0,), (0,)),
    Case("tile", 12, (16,), 64, (64,), (0,), (0,)),
    Case("tile_plus_one", 13, (16,), 65, (257,), (0,), (0,)),
    Case("long_run", 130, (32, 8), 128, (300,), (0,) * 97 + (1,) * 33, (0, 1)),
    Case("one_adapter_many_routes", 40, (8,), 64, (64,), (2, 0, 1), (0, 0, 0)),
    Case("strided", 10, (8, 4), 40, (50, 30), (0, 1), (0, 1), strided=True),
    Case("dora", 20, (8, 12), 40, (50, 70), (0, 1, 2), (0, 1, 1), dora=True),
]


def routes(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    repeated = (case.route_of * (case.num_tokens + 1))[: case.num_tokens]
    return (
        torch.tensor(repeated, dtype=torch.int32),
        torch.tensor(case.adapter_of, dtype=torch.int32),
    )


def rows(num_rows: int, d: int, dtype: torch.dtype, strided: bool) -> torch.Tensor:
    """[num_rows, d]; strided: a window of a wider tensor whose rest is NaN."""
    if not strided:
        return torch.randn(num_rows, d).to(dtype)
    wide = torch.full((num_rows, d + 11), torch.nan, dtype=dtype)
    wide[:, 3 : d + 3] = torch.randn(num_rows, d)
    return wide[:, 3 : d + 3]


def pool_inputs(case: Case, dtype: torch.dtype) -> dict:
    """Arguments of grouped_lora_ by name; the pool's padding is NaN."""

    def expert(rank: int, d_out: int) -> dict | None:
        if rank == 0:
            return None
        weights = {
            "a": torch.randn(rank, case.d_in).to(dtype) / case.d_in**0.5,
            "bt": torch.randn(rank, d_out).to(dtype) / rank**0.5,
        }
        if case.dora:
            weights |= {"u": torch.randn(d_out), "v": torch.randn(d_out)}
        return weights

    # Column 0 belongs to no slice, and slices go through the other columns backwards.
    num_slices = len(case.d_out)
    pool, offsets, ranks = reference.pack_pool(
        [[None] + [expert(rank, d) for d in case.d_out[::-1]] for rank in case.ranks]
    )
    route_of, adapter_of = routes(case)
    return {
        "y": [rows(case.num_tokens, d, dtype, case.strided) for d in case.d_out],
        "x": rows(case.num_tokens, case.d_in, dtype, case.strided),
        "pool": pool,
        "offsets": offsets,
        "ranks": ranks,
        "scales": torch.rand(len(case.ranks), num_slices + 1) + 0.5,
        "gates": torch.rand(len(case.adapter_of), num_slices + 1) + 0.1,
        "route_of": route_of,
        "adapter_of": adapter_of,
        "experts": list(range(num_slices, 0, -1)),
    }


def to_device(inputs: dict, device: str) -> dict:
    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [move(item) for item in value]
        return value

    return {name: move(value) for name, value in inputs.items()}


def run_pool(inputs: dict) -> list[torch.Tensor]:
    copies = {**inputs, "y": [clone_strided(t) for t in inputs["y"]]}
    ops.grouped_lora_(**copies)
    return copies["y"]


def clone_strided(t: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, NaN between the rows."""
    if t.is_contiguous():
        return t.clone()
    before = t.storage_offset() % t.stride(0)
    wide = t.new_full((t.shape[0], t.stride(0)), torch.nan)
    wide[:, before : before + t.shape[1]] = t
    return wide[:, before : before + t.shape[1]]


def on_16_bytes(inputs: dict) -> dict:
    """x and y with rows that start on 16 bytes, NaN between them: what PREFILL_WGMMA takes."""

    def move(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_full((t.shape[0], (t.shape[1] + 7) // 8 * 8 + 8), torch.nan)
        wide[:, : t.shape[1]] = t
        return wide[:, : t.shape[1]]

    return {**inputs, "x": move(inputs["x"]), "y": [move(y) for y in inputs["y"]]}


def check_pool_case(
    case: Case, dtype: torch.dtype, device: str = "cpu", path: int = ops.DECODE
) -> None:
    check_pool_inputs(pool_inputs(case, dtype), device, path)


def check_pool_inputs(
    inputs: dict, device: str = "cpu", path: int = ops.DECODE, lay_out=lambda inputs: inputs
) -> None:
    """Against the reference; `lay_out` changes the layout of inputs that are on the device."""
    dtype = inputs["x"].dtype
    actual = run_pool({**lay_out(to_device(inputs, device)), "path": path})
    expected = [t.double() for t in inputs["y"]]
    reference.grouped_lora_(
        **{**inputs, "y": expected, "x": inputs["x"].double()}, pool_dtype=dtype
    )
    same_dtype = [t.clone() for t in inputs["y"]]
    reference.grouped_lora_(**{**inputs, "y": same_dtype})
    for s in range(len(actual)):
        assert_as_good_as_torch(actual[s].cpu(), expected[s], same_dtype[s], f"y[{s}]")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pool_against_reference(case, dtype, path, device):
    check_pool_case(case, dtype, device, path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_has_one_path(dtype):
    inputs = pool_inputs(next(case for case in CASES if case.name == "long_run"), dtype)
    for got, want in zip(*(run_pool({**inputs, "path": path}) for path in PATHS), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd_sizes", "rank_mix", "tile_plus_one", "dora"])
def test_pool_on_each_isa(name, dtype, isa):
    check_pool_case(next(case for case in CASES if case.name == name), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_leaves_idle_rows_bitwise(dtype, device):
    case = Case("idle", 6, (8, 0), 32, (40,), (0, 1, -1, 2, 3, 0), (0, 0, -1, 1))
    inputs = pool_inputs(case, dtype)
    inputs["gates"][1] = 0  # route 1: gate 0; -1: no route; 2: no adapter; 3: rank 0
    inputs["y"][0][1:5] = torch.tensor([torch.nan, -0.0, torch.inf, 1e-7]).repeat(10).to(dtype)
    before = inputs["y"][0].clone()
    after = run_pool(to_device(inputs, device))[0].cpu()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(after[1:5].view(bits), before[1:5].view(bits))
    assert not torch.equal(after[0], before[0])


def test_pool_takes_any_leading_dimensions(device):
    case = Case("leading", 12, (8, 4), 40, (50, 30), (0, 1), (0, 1))
    inputs = to_device(pool_inputs(case, torch.bfloat16), device)
    flat = run_pool(inputs)
    shaped = {**inputs, "x": inputs["x"].view(2, 3, 2, 40)}
    shaped["y"] = [inputs["y"][0].view(3, 4, 50), inputs["y"][1].view(1, 12, 30)]
    for got, want in zip(run_pool(shaped), flat, strict=True):
        assert torch.equal(got.view_as(want), want)
    one = {**inputs, "x": inputs["x"][0], "y": [y[0] for y in inputs["y"]]}
    one["route_of"] = inputs["route_of"][:1]
    for got, want in zip(run_pool(one), flat, strict=True):
        assert torch.equal(got, want[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_is_batch_invariant(dtype, path, device):
    case = Case(
        "mixed", 60, (32, 7, 64), 130, (200, 33), (0,) * 25 + (1, 2, 0, 1) * 10, (0, 1, 2), True
    )
    inputs = to_device(pool_inputs(case, dtype), device) | {"path": path}
    together = run_pool(inputs)
    for t in range(0, case.num_tokens, 7):
        alone = {
            **inputs,
            "y": [y[t : t + 1] for y in inputs["y"]],
            "x": inputs["x"][t : t + 1],
            "route_of": inputs["route_of"][t : t + 1],
        }
        for s, y in enumerate(run_pool(alone)):
            assert torch.equal(y[0], together[s][t]), f"token {t}, slice {s}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_bits_at_any_batch_shape_and_order(dtype, isa):
    """Every block shape and way of cutting the work: 1 to 150 rows, shuffled, 1 to 4 threads."""
    route_of = (0,) * 70 + (1, 2, 0, 3) * 20
    case = Case("shapes", 150, (32, 7, 65, 256), 520, (600, 70, 129), route_of, (0, 1, 2, 3), True)
    inputs = pool_inputs(case, dtype)
    inputs["gates"][1, 1] = inputs["gates"][3, 2] = 0
    together = run_pool(inputs)
    for count in (1, 2, 3, 4, 5, 7, 11, 12, 13, 16, 17, 64, 65, 100, 150):
        tokens = torch.randperm(case.num_tokens)[:count]
        part = {
            **inputs,
            "y": [y[tokens] for y in inputs["y"]],
            "x": inputs["x"][tokens],
            "route_of": inputs["route_of"][tokens],
        }
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for s, y in enumerate(run_pool(part)):
                assert torch.equal(y, together[s][tokens]), f"{count} rows, slice {s}"


def test_pool_does_not_depend_on_threads():
    for num_tokens, adapters in ((64, (0, 1)), (2, (0, 1)), (1, (1,))):
        case = Case("threads", num_tokens, (32, 64), 1024, (1024,), adapters, (0, 1))
        inputs = pool_inputs(case, torch.bfloat16)
        torch.set_num_threads(1)
        one = run_pool(inputs)[0]
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for _ in range(20):  # which thread takes which task differs from run to run
                assert torch.equal(run_pool(inputs)[0], one)


def test_pool_from_several_threads_at_once():
    """Python threads that call at once, each with its own scratch."""
    case = Case("nested", 8, (32, 64), 1024, (1024, 512), (0, 1), (0, 1))
    inputs = pool_inputs(case, torch.float32)
    want = run_pool(inputs)
    with ThreadPoolExecutor(4) as threads:
        for got in threads.map(lambda _: run_pool(inputs), range(40)):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def train_inputs(case: Case, dtype: torch.dtype) -> tuple[list, list]:
    """(tensors that take gradients: y, x, gates, a.., b..), (scales, route_of, adapter_of)."""
    d_out = case.d_out[0]
    ranks = [max(rank, 1) for rank in case.ranks]
    a = [torch.randn(r, case.d_in).to(dtype) / case.d_in**0.5 for r in ranks]
    b = [torch.randn(d_out, r).to(dtype) / r**0.5 for r in ranks]
    route_of, adapter_of = routes(case)
    leaves = [
        rows(case.num_tokens, d_out, dtype, case.strided),
        rows(case.num_tokens, case.d_in, dtype, case.strided),
        torch.rand(len(case.adapter_of)) + 0.1,
        *a,
        *b,
    ]
    return leaves, [[0.5 + i for i in range(len(ranks))], route_of, adapter_of]


def run_train(function, leaves, rest, dout, dtype=None, device="cpu"):
    """Output and gradients; dtype: convert the leaves first."""
    leaves = [t.detach().to(device, dtype or t.dtype).requires_grad_() for t in leaves]
    half = (len(leaves) - 3) // 2
    y, x, gates = leaves[:3]
    out = function(
        y,
        x,
        leaves[3 : 3 + half],
        leaves[3 + half :],
        rest[0],
        gates,
        rest[1].to(device),
        rest[2].to(device),
    )
    grads = torch.autograd.grad(out, leaves, dout.to(device, out.dtype), allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]
    return [t.detach().cpu() for t in (out, *grads)]


def reference_at_dtype(y, x, a, b, scales, gates, route_of, adapter_of):
    """The reference with gates cast to x's dtype, as eager torch code would."""
    return reference.grouped_lora(y, x, a, b, scales, gates.to(x.dtype), route_of, adapter_of)


def check_train_case(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    leaves, rest = train_inputs(case, dtype)
    dout = torch.randn(case.num_tokens, case.d_out[0]).to(dtype)
    actual = run_train(ops.grouped_lora, leaves, rest, dout, device=device)
    expected = run_train(reference.grouped_lora, leaves, rest, dout, torch.float64)
    same_dtype = run_train(reference_at_dtype, leaves, rest, dout)
    names = ["out", "dy", "dx", "dgates"] + [f"dweight{i}" for i in range(len(leaves) - 3)]
    for name, got, want, torch_result in zip(names, actual, expected, same_dtype, strict=True):
        assert_as_good_as_torch(got, want, torch_result, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in CASES if not case.dora], ids=str)
def test_train_against_reference(case, dtype, device):
    check_train_case(case, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd_sizes", "rank_mix", "long_run"])
def test_train_on_each_isa(name, dtype, isa):
    check_train_case(next(case for case in CASES if case.name == name), dtype)


def test_train_skips_idle_work(device):
    case = Case("idle", 12, (8, 4), 32, (40,), (0, 1, -1, 2), (0, 0, -1))
    leaves, rest = train_inputs(case, torch.float32)
    leaves[2][1] = 0
    out, _, dx, dgates, da0, da1, _, db1 = run_train(
        ops.grouped_lora, leaves, rest, torch.randn(12, 40), device=device
    )
    idle = rest[1] != 0
    assert torch.equal(out[idle], leaves[0][idle])
    assert torch.equal(dx[idle], torch.zeros_like(dx[idle]))
    assert dgates[0] != 0 and torch.equal(dgates[1:], torch.zeros(2))
    assert da0.abs().max() > 0 and da1.abs().max() == 0 and db1.abs().max() == 0


def test_train_does_not_depend_on_threads_or_neighbours():
    case = Case("threads", 200, (32, 16), 256, (320,), (0,) * 130 + (1,) * 70, (0, 1))
    leaves, rest = train_inputs(case, torch.bfloat16)
    dout = torch.randn(200, 320).bfloat16()
    two = run_train(ops.grouped_lora, leaves, rest, dout)
    torch.set_num_threads(1)
    for got, want in zip(run_train(ops.grouped_lora, leaves, rest, dout), two, strict=True):
        assert torch.equal(got, want)
    # Without the second prompt the first one's rows and its adapter's gradients are the same bits.
    alone = run_train(
        ops.grouped_lora,
        [leaves[0][:130], leaves[1][:130], *leaves[2:]],
        [rest[0], rest[1][:130], rest[2]],
        dout[:130],
    )
    assert torch.equal(alone[0], two[0][:130]) and torch.equal(alone[2], two[2][:130])
    assert torch.equal(alone[4], two[4]) and torch.equal(alone[6], two[6])


def test_train_computes_only_wanted_gradients(monkeypatch):
    case = CASES[2]
    leaves, rest = train_inputs(case, torch.float32)
    seen = []
    op = ops._grouped_lora_backward_

    def spy(*args):
        dx, da, _, dgates = args[-4:]
        seen.append((dx is not None, len(da) > 0, dgates is not None))
        return op(*args)

    monkeypatch.setattr(ops, "_grouped_lora_backward_", spy)
    y, x, gates, a0, a1, b0, b1 = leaves
    for leaf, wanted in ((x, (True, False, False)), (b1, (False, True, False))):
        leaf.requires_grad_()
        out = ops.grouped_lora(y, x, [a0, a1], [b0, b1], rest[0], gates, *rest[1:])
        out.sum().backward()
        leaf.requires_grad_(False)
        assert seen.pop() == wanted
    y.requires_grad_()
    ops.grouped_lora(y, x, [a0, a1], [b0, b1], rest[0], gates, *rest[1:]).sum().backward()
    assert not seen and torch.equal(y.grad, torch.ones_like(y))


def test_reference_gradcheck():
    case = Case("gradcheck", 5, (2, 3), 4, (6,), (0, 1, -1, 2), (0, 1, 1))
    leaves, (scales, route_of, adapter_of) = train_inputs(case, torch.float64)
    leaves = [t.double().requires_grad_() for t in leaves]

    def function(y, x, gates, a0, a1, b0, b1):
        return reference.grouped_lora(y, x, [a0, a1], [b0, b1], scales, gates, route_of, adapter_of)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    case = CASES[2]
    inputs = pool_inputs(case, dtype)
    torch.library.opcheck(torch.ops.milora.grouped_lora_.default, tuple(inputs.values()))
    leaves, (scales, route_of, adapter_of) = train_inputs(case, dtype)
    y, x, gates, a0, a1, b0, b1 = [t.requires_grad_() for t in leaves]
    arguments = (y, x, [a0, a1], [b0, b1], scales, gates, route_of, adapter_of)
    torch.library.opcheck(torch.ops.milora.grouped_lora.default, arguments)
    y, x, gates, a0, a1, b0, b1 = [t.detach().contiguous() for t in leaves]
    update = x, [a0, a1], [b0, b1], scales, gates, route_of, adapter_of
    torch.library.opcheck(torch.ops.milora.grouped_lora_add_.default, (y, *update))
    grads = [torch.zeros_like(t) for t in (x, a0, a1, b0, b1, gates)]
    torch.library.opcheck(
        torch.ops.milora.grouped_lora_backward_.default,
        (y, *update, grads[0], grads[1:3], grads[3:5], grads[5]),
    )


POOL_ERRORS = [
    ({"x": torch.zeros(7, 33, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
    ({"x": torch.zeros(33, 7).T}, "x must be contiguous in its last dimension"),
    ({"y": [torch.zeros(7, 100)]}, "experts must have one column per slice"),
    ({"y": []}, "y must have 1 to 16 slices, got 0"),
    ({"path": 3}, r"path must be 0 \(decode\), 1 \(prefill\) or 2 .*, got 3"),
    ({"experts": [0, 3]}, r"experts must be in \[0, 3\), got 3"),
    ({"route_of": torch.zeros(7, dtype=torch.int64)}, "route_of must be Int, got Long"),
    ({"route_of": torch.full((7,), 9, dtype=torch.int32)}, r"route_of must be in \[-1, 2\), got 9"),
    ({"adapter_of": torch.tensor([0, 5], dtype=torch.int32)}, "adapter_of must be in .* got 5"),
    (
        {"ranks": torch.full((2, 3), 257, dtype=torch.int32)},
        r"ranks must be in \[0, 256\], got 257",
    ),
    ({"ranks": torch.full((2, 3), 200, dtype=torch.int32)}, "offsets must place .* got"),
    (
        {"offsets": torch.full((2, 3, 5), 8)},
        "offsets must place A of adapter 0, expert 2 on 16 bytes",
    ),
    (
        {"scales": torch.ones(2)},
        r"scales must be \[num_adapters, num_experts\] = \[2, 3\], got \[2\]",
    ),
    (
        {"gates": torch.ones(2, 4)},
        r"gates must be \[num_routes, num_experts\] = \[any, 3\], got \[2, 4\]",
    ),
    (
        {"x": torch.zeros(7, 2, 33).transpose(0, 1)},
        "x must be contiguous if it has not two dimensions",
    ),
    (
        {"y": [torch.zeros(2, 7, 100), torch.zeros(7, 1)]},
        r"y must have one row per token of x \(7\), got \[2, 7, 100\]",
    ),
    ({"y": [torch.zeros(7, 100), torch.zeros(())]}, "y must have at least one dimension"),
]


@pytest.mark.parametrize("change, message", POOL_ERRORS)
def test_pool_errors(change, message):
    inputs = pool_inputs(CASES[2], torch.float32)
    with pytest.raises(RuntimeError, match="^grouped_lora_: " + message):
        ops.grouped_lora_(**{**inputs, **change})


def test_train_errors():
    leaves, (scales, route_of, adapter_of) = train_inputs(CASES[2], torch.float32)
    y, x, gates, a0, a1, b0, b1 = leaves

    def call(a=(a0, a1), b=(b0, b1), scales=scales, gates=gates):
        ops.grouped_lora(y, x, a, b, scales, gates, route_of, adapter_of)

    with pytest.raises(
        RuntimeError, match=r"^grouped_lora: b must be \[d_out, rank\] = \[100, 3\]"
    ):
        call(b=(b1, b0))
    with pytest.raises(RuntimeError, match="a, b and scales must have one entry per adapter"):
        call(scales=[1.0])
    with pytest.raises(RuntimeError, match=r"rank must be in \[1, 256\], got 300"):
        call(a=(torch.zeros(300, 33), a1), b=(torch.zeros(100, 300), b1))
    with pytest.raises(RuntimeError, match="gates must be Float, got Half"):
        call(gates=gates.half())
