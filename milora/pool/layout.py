"""Which runs of bytes an adapter needs, known from its configuration alone.

A run is one matrix that kernels read as a piece: A [rank, d_in], Bᵀ [rank, d_out] and a core
[rank, rank] of an expert in the dtype of its module, DoRA's u and v [d_out] and a router's w_sa
[d], W_r [num_experts, d] and coefficients [12] in float32. Rows start on 16 bytes, runs on 64. In a
packed blob the runs follow each other in this order; in the pool they may lie apart.

A and Bᵀ that an adapter never trains (LoRA-XS) are its factors: runs, and a blob, of their own,
which it may have in common with others.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora.adapter_validation import Geometry, Shapes, expected_shapes, router_key
from milora.blocks import Block, spec_of
from milora.config import MiLoRAConfig
from milora.errors import AdapterError
from milora.experts import RankGated, get_kind
from milora.nn import MiLoRALinear
from milora.packing import row_bytes
from milora.router import router_codes
from milora.runtime import Runtime
from milora.tables import EXPERT_PARTS

ALIGNMENT = 64  # a cache line, so that no two runs share one
ROUTER_PARTS = ("w_sa", "w_r", "theta")
# The fields of a configuration that decide the layout; a seed, say, does not.
_SHAPING = (
    "rank", "alpha", "top_k", "router", "target_modules", "expert", "expert_options", "pooler",
    "activation", "gate", "router_norm", "rslora", "rank_pattern", "alpha_pattern",
)  # fmt: skip
_CACHED = 64


@dataclass(frozen=True)
class Runs:
    """Runs of one blob.

    Attributes:
        sizes: bytes of each run, a multiple of `ALIGNMENT`.  starts: where it begins in the blob.
    """

    sizes: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return self.starts[-1] + self.sizes[-1] if self.sizes else 0

    def add(self, num_rows: int, width: int, dtype: torch.dtype) -> int:
        """Lay one more run behind the others. Returns: its index."""
        start = self.num_bytes
        size = num_rows * row_bytes(width, dtype)
        self.starts.append(start)
        self.sizes.append(-(-size // ALIGNMENT) * ALIGNMENT)
        return len(self.sizes) - 1


@dataclass(frozen=True)
class ExpertPlace:
    """An expert: its block and column, its module's path there, and its runs by `EXPERT_PARTS`."""

    block: int
    column: int
    path: str
    runs: tuple[int, ...]  # indices into the layout's runs; -1 = absent


@dataclass(frozen=True)
class RouterPlace:
    block: int
    runs: tuple[int, int, int]  # of `ROUTER_PARTS`


@dataclass(frozen=True)
class BlockRow:
    """What a slot's row of a block's tables holds, with indices of runs in place of offsets."""

    runs: Tensor  # [num_experts, 5] int64
    ranks: Tensor  # [num_experts] int32
    scales: Tensor  # [num_experts] float32
    router_runs: Tensor  # [3] int64
    router_codes: Tensor  # [6] int32


@dataclass(frozen=True)
class Layout:
    """The runs of an adapter on one model.

    Attributes:
        blocks: the model's blocks with the adapter's experts.
        columns: per block, the experts' columns in the order of the router's outputs.
        factors: of A and Bᵀ that are never trained.  own: all others. Indices of runs count the
            factors first.
    """

    blocks: list[Block]
    shapes: Shapes
    columns: list[list[int]]
    experts: list[ExpertPlace]
    routers: list[RouterPlace]
    rows: list[BlockRow]
    factors: Runs
    own: Runs

    def place(self, run: int) -> tuple[bool, int]:
        """Whether a run is one of the factors, and where it begins in its blob."""
        own = run - len(self.factors.sizes)
        return (True, self.factors.starts[run]) if own < 0 else (False, self.own.starts[own])


class Layouts(Geometry):
    """Layouts on one model, each made once for all configurations that are alike."""

    def __init__(self, runtime: Runtime):
        super().__init__(runtime.model)
        self.linears: list[dict[str, MiLoRALinear]] = [
            {block.experts[linear.column]: linear for linear in linears}
            for block, linears in zip(runtime.blocks, runtime.linears, strict=True)
        ]
        self.widths = [len(block.experts) for block in runtime.blocks]
        self.dtypes = [
            [compute_dtype(self.linears[index][path], runtime.model) for path in block.experts]
            for index, block in enumerate(runtime.blocks)
        ]
        self._layouts: OrderedDict[str, Layout] = OrderedDict()
        self._loras: OrderedDict[str, MiLoRAConfig] = OrderedDict()
        self._lock = threading.Lock()

    def config(self, data: dict[str, Any], shapes: Shapes, folder: Path) -> MiLoRAConfig:
        if data["peft_type"] != "LORA":
            return super().config(data, shapes, folder)
        key = json.dumps([data, sorted(shapes.items())])
        make = super().config
        return copy.deepcopy(self._cached(self._loras, key, lambda: make(data, shapes, folder)))

    def blocks(self, config: MiLoRAConfig) -> list[Block]:
        key = _key(config)
        with self._lock:
            layout = self._layouts.get(key)
        return super().blocks(config) if layout is None else layout.blocks

    def shapes(self, config: MiLoRAConfig) -> Shapes:
        return self.of(config).shapes

    def of(self, config: MiLoRAConfig) -> Layout:
        """The layout of an adapter of `config`, whose blocks were checked.

        Raises:
            milora.AdapterError: it has experts on modules that the pool does not serve.
        """
        return self._cached(self._layouts, _key(config), lambda: self._build(config))

    def _cached(self, cache: OrderedDict, key: str, make: Any) -> Any:
        with self._lock:
            if key in cache:
                cache.move_to_end(key)
                return cache[key]
        made = make()
        with self._lock:
            cache[key] = made
            if len(cache) > _CACHED:
                cache.popitem(last=False)
        return made

    def _build(self, config: MiLoRAConfig) -> Layout:
        if isinstance(get_kind(config.expert), RankGated):
            raise AdapterError(
                f"AdapterPool: experts of kind {config.expert} gate each rank by the token, and a "
                "pool keeps no more of an adapter than A and B; use milora.load"
            )
        blocks = super().blocks(config)
        missing = [
            f"{block.path}.{path}"
            for block, linears in zip(blocks, self.linears, strict=True)
            for path in block.experts
            if path not in linears
        ]
        if missing:
            raise AdapterError(
                f"AdapterPool: the adapter has experts on {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}, which this pool does not serve; make the "
                "pool with target_modules that include them"
            )
        try:
            shapes = expected_shapes(self.model, config, blocks)
        except ValueError as error:  # an expert kind that this model's modules cannot have
            raise AdapterError(f"AdapterPool: {error}") from None
        builder = _Builder()
        for index, block in enumerate(blocks):
            self._add_factors(builder, config, index, block)
        for index, block in enumerate(blocks):
            self._add_block(builder, config, index, block, shapes)
        columns = [
            [linears[path].column for path in block.experts]
            for block, linears in zip(blocks, self.linears, strict=True)
        ]
        return Layout(
            blocks, shapes, columns, builder.experts, builder.routers, builder.rows,
            builder.factors, builder.own,
        )  # fmt: skip

    def _add_factors(
        self, builder: _Builder, config: MiLoRAConfig, index: int, block: Block
    ) -> None:
        kind = get_kind(config.expert)
        for path in block.experts:
            linear = self.linears[index][path]
            spec = spec_of(config, block.path, path, (linear.d_in, linear.d_out))
            if kind.has_fixed_factors(spec):
                rank, dtype = kind.served_rank(spec), self.dtypes[index][linear.column]
                sides = (linear.d_in, linear.d_out)
                runs = tuple(builder.factors.add(rank, d, dtype) for d in sides)
                builder.factors_of[index, path] = runs

    def _add_block(
        self, builder: _Builder, config: MiLoRAConfig, index: int, block: Block, shapes: Shapes
    ) -> None:
        width = self.widths[index]
        kind = get_kind(config.expert)
        row = BlockRow(
            torch.full((width, len(EXPERT_PARTS)), -1, dtype=torch.int64, device="cpu"),
            torch.zeros(width, dtype=torch.int32, device="cpu"),
            torch.zeros(width, dtype=torch.float32, device="cpu"),
            torch.full((3,), -1, dtype=torch.int64, device="cpu"),
            torch.zeros(6, dtype=torch.int32, device="cpu"),
        )
        for path in block.experts:
            linear = self.linears[index][path]
            column, dtype = linear.column, self.dtypes[index][linear.column]
            spec = spec_of(config, block.path, path, (linear.d_in, linear.d_out))
            rank = kind.served_rank(spec)
            core = u = v = -1
            if (fixed := builder.factors_of.get((index, path))) is not None:
                a, bt = fixed
                core = builder.run(rank, rank, dtype)
            else:
                a = builder.run(rank, linear.d_in, dtype)
                bt = builder.run(rank, linear.d_out, dtype)
            if kind.has_output:
                u = builder.run(1, linear.d_out, torch.float32)
                v = builder.run(1, linear.d_out, torch.float32)
            builder.experts.append(ExpertPlace(index, column, path, (a, bt, u, v, core)))
            row.runs[column] = torch.tensor((a, bt, u, v, core), device="cpu")
            row.ranks[column] = rank
            row.scales[column] = spec.scale
        if config.router and block.experts:
            runs = [
                builder.run(*_matrix(shapes[key]), torch.float32) if key in shapes else -1
                for key in (router_key(block.path, part) for part in ROUTER_PARTS)
            ]
            builder.routers.append(RouterPlace(index, tuple(runs)))
            row.router_runs.copy_(torch.tensor(runs, device="cpu"))
            pooled_input = block.source is not None
            codes = router_codes(config, index, len(block.experts), pooled_input=pooled_input)
            row.router_codes.copy_(torch.tensor(codes, device="cpu"))
        builder.rows.append(row)


class _Builder:
    """A layout in the making: all factors first, then the other runs."""

    def __init__(self) -> None:
        self.experts: list[ExpertPlace] = []
        self.routers: list[RouterPlace] = []
        self.rows: list[BlockRow] = []
        self.factors = Runs()
        self.factors_of: dict[tuple[int, str], tuple[int, ...]] = {}  # by block and path
        self.own = Runs()

    def run(self, num_rows: int, width: int, dtype: torch.dtype) -> int:
        return len(self.factors.sizes) + self.own.add(num_rows, width, dtype)


def compute_dtype(linear: MiLoRALinear, model: Any) -> torch.dtype:
    """The dtype in which a module's output is made: its weight's, or where that is quantized the
    model's."""
    weight = getattr(linear.base_layer, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1:
        return weight.dtype
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1)
    return getattr(model, "dtype", None) or next(dtypes, torch.float32)


def _key(config: MiLoRAConfig) -> str:
    # Patterns keep their order: the first that matches wins.
    return json.dumps([getattr(config, name) for name in _SHAPING])


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape if len(shape) == 2 else (1, *shape)
