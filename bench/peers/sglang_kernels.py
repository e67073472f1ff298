"""SGLang's triton_v2 LoRA: its own runner, kernels, routes and tuned tiles (Triton).

The runner (`srt/lora/dense/runner.py`) is used as it is, so that each shape gets the kernel family
and the tiles of SGLang's table for the GPU at hand. Two things differ from the engine: the plan
runs without overlap with a base product, since only the update is timed; and routes of a size for
which SGLang compiles C++ at run time are built by its Triton builder instead, outside of the time.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
from pathlib import Path

import torch
from torch import Tensor

from peers import Peer, stubs

KERNELS = "sglang.kernels.ops.lora"
PACKAGES = (
    "sglang", "sglang.srt", "sglang.srt.lora", "sglang.srt.lora.dense", "sglang.kernels",
    "sglang.kernels.ops", KERNELS, f"{KERNELS}.common", f"{KERNELS}.moe", "sglang.kernels.jit",
)  # fmt: skip
KERNEL_FILES = ("route_view", "routing", "lora_a", "lora_b")


class Phase(str, enum.Enum):
    DECODE = "decode"
    PREFILL = "prefill"


class Struct:
    """What SGLang takes from msgspec: a dataclass by inheritance."""

    def __init_subclass__(cls, **options: bool) -> None:
        dataclasses.dataclass(**options)(cls)


def architecture(major: int) -> str:
    return {9: "sm90"}.get(major, "sm100" if major >= 10 else "default")


def pydantic() -> types.ModuleType:
    """Enough for plan.py to be read; `plans` takes the place of what it would validate with."""
    made = types.ModuleType("pydantic")
    made.BaseModel = type("BaseModel", (), {})
    made.ConfigDict = dict
    made.Field = lambda **options: None
    made.model_validator = lambda **options: lambda function: function
    return made


def plans(plan: types.ModuleType, folder: Path, name: str) -> types.SimpleNamespace | None:
    """SGLang's table of tiles for an architecture; None where it has none."""
    path = folder / "configs" / f"{name}.plans.json"
    if not path.is_file():
        return None
    selectors = ("max_tokens", "max_rank", "min_in_features", "max_in_features",
                 "min_out_features", "max_out_features")  # fmt: skip
    enums = {"a_family": plan.AFamily, "b_family": plan.BFamily, "overlap": plan.Overlap}
    rows = []
    for raw in json.loads(path.read_text())["rows"]:
        spec = {k: enums[k](v) if k in enums else v for k, v in raw.get("spec", {}).items()}
        row = types.SimpleNamespace(**{key: raw.get(key) for key in selectors})
        row.name = raw["name"]
        row.phase = Phase(raw["phase"]) if "phase" in raw else None
        row.kinds = [plan.DenseLoraKind(k) for k in raw["kinds"]] if "kinds" in raw else None
        row.spec = types.SimpleNamespace(
            a_family=spec.get("a_family"), model_dump=lambda spec=spec: dict(spec)
        )
        rows.append(row)
    return types.SimpleNamespace(rows=rows)


@functools.cache
def kernels() -> types.SimpleNamespace:
    folder = stubs.kernel_folder("sglang")
    for name in PACKAGES:
        stubs.module(name)
    stubs.module("sglang.srt.lora.utils", Phase=Phase, architecture_for_capability=architecture)
    stubs.module("sglang.kernels.jit.utils", is_arch_support_pdl=lambda: stubs.capability() >= 90)
    # Its routes of middle size come from C++ compiled at run time: see `Runner`.
    stubs.module(f"{KERNELS}.moe.virtual_experts", _align_block_size_jit=None)
    msgspec = types.ModuleType("msgspec")
    msgspec.Struct = Struct
    with stubs.instead(msgspec=msgspec, pydantic=pydantic()):
        path = folder / "kernels" / "ops" / "lora" / "common"
        files = {n: stubs.file(f"{KERNELS}.common.{n}", path / f"{n}.py") for n in KERNEL_FILES}
        dense = folder / "srt" / "lora" / "dense"
        stubs.file("sglang.srt.lora.workspace", dense.parent / "workspace.py")
        plan = stubs.file("sglang.srt.lora.dense.plan", dense / "plan.py")
        plan.load_plans = functools.cache(lambda name: plans(plan, dense, name))
        runner = stubs.file("sglang.srt.lora.dense.runner", dense / "runner.py")
    return types.SimpleNamespace(routing=files["routing"], plan=plan, runner=runner)


def stacked(a: list[Tensor], ranks: list[int]) -> Tensor:
    """All slices' A as SGLang's slots have them: slice s of an adapter at rows [s r, (s + 1) r)."""
    slots = torch.zeros_like(torch.cat(a, dim=1))
    for slot, rank, *parts in zip(slots, ranks, *a, strict=True):
        slot[: len(parts) * rank] = torch.cat([part[:rank] for part in parts])
    return slots


def make_runner(num_adapters: int, device: torch.device):
    loaded = kernels()
    view = loaded.routing.RouteViewKind.ALIGNED

    class Runner(loaded.runner.DenseLoraRunner):
        def _build_route(self, key: tuple):
            small = self.token_slots.numel() <= loaded.routing._SMALL_ROUTE_MAX_PAIRS
            return loaded.routing.build_route(
                self.token_slots, max_loras=self.max_loras, block_size=key[1], view=view,
                workspace=self.workspace, tensor_prefix=f"dense:sorted:{key[1]}",
                capacity=None if small else 0,
            )  # fmt: skip

    workspace = loaded.runner.LoraWorkspace()
    return Runner(workspace, max_loras=num_adapters, device=device)


class Sglang(Peer):
    def __init__(self, adapter_of: Tensor, ranks: list[int], *, decode: bool):
        super().__init__(adapter_of, ranks, decode=decode)
        device = adapter_of.device
        self.runner = make_runner(self.num_adapters, device)
        self.live_ranks = torch.tensor(ranks, dtype=torch.int32, device=device)
        self.scales = torch.ones(self.num_adapters, dtype=torch.float32, device=device)
        self.block_sizes: set[int] = set()  # of the routes that this batch's plans ask for

    def pack(self, a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        offsets = [0]
        for b_s in b:
            offsets.append(offsets[-1] + b_s.shape[1])
        return stacked(a, self.ranks), torch.cat(b, dim=1), tuple(offsets)

    def prepare(self) -> None:
        self.runner.begin_batch(
            token_slots=self.adapter_of, lora_ranks=self.live_ranks, scalings=self.scales,
            num_tokens=len(self.adapter_of), phase=Phase.DECODE if self.decode else Phase.PREFILL,
            graph_mode=self.adapter_of.is_cuda, is_prefill_graph=not self.decode,
        )  # fmt: skip
        for size in self.block_sizes:
            self.runner.route(size)

    def update(self, y: Tensor, x: Tensor, weights: tuple[Tensor, Tensor, tuple]) -> None:
        a, b, offsets = weights
        kind = kernels().plan.DenseLoraKind.LINEAR
        plan = self.runner.plan_for(kind, self.rank, x.shape[1], offsets[-1], num_tokens=x.shape[0])
        if plan.needs_aligned_route:
            self.block_sizes.add(plan.block_size)
        bridge = self.runner.run_a(x, a, stack=len(offsets) - 1, plan=plan)
        self.runner.run_b(bridge, b, y, offsets=offsets, plan=plan)
