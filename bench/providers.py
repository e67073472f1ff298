"""The same tenants served in five ways: bare base, MiLoRA, PEFT, stacked torch, plain torch.

Each provider is a model that shares the base's tensors, with the keyword arguments that its
forwards need and the gates that its result is to be checked against.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tenants import MODULES, Tenants, twin
from torch import Tensor, nn

import milora
from milora import ops, reference
from milora.prepared import PreparedUpdate

INFERENCE_OPS = ("grouped_lora_", "prompt_router", "prompt_router_pool")


@dataclass
class Provider:
    model: nn.Module
    gates: Tensor | None  # [layers, rows, 7]
    kwargs: dict[str, Any] = field(default_factory=dict)
    routed: bool = False  # the gates are the model's own affair
    swapped: bool = False  # run with milora's ops replaced by plain torch

    def __call__(self, **inputs: Any) -> Any:
        if not self.swapped:
            return self.model(**inputs, **self.kwargs)
        with plain_ops():
            return self.model(**inputs, **self.kwargs)


def replace_modules(model: nn.Module, make) -> nn.Module:
    """Put `make(layer, module path, linear)` where each of the blocks' linear modules stands."""
    for layer, block in enumerate(model.model.layers):
        for path in MODULES:
            parent = block.get_submodule(path.rpartition(".")[0])
            name = path.rpartition(".")[2]
            setattr(parent, name, make(layer, path, getattr(parent, name)))
    return model


# ---- MiLoRA -----------------------------------------------------------------------------------


def milora_model(base: nn.Module, tenants: Tenants, config: dict[str, Any]) -> nn.Module:
    """The tenants attached under the names tenant0, tenant1, ..."""
    model = twin(base)
    for i in range(tenants.num_adapters):
        config_i = milora.MiLoRAConfig(rank=tenants.rank, seed=i, **config)
        milora.attach(model, config_i, adapter_name=f"tenant{i}")
    fill(model, tenants, prefix="")
    return model.eval()


def save_folders(
    base: nn.Module, tenants: Tenants, config: dict[str, Any], folder: str
) -> list[Path]:
    """The tenants as adapter folders below `folder`."""
    model = milora_model(base, tenants, config)
    folders = [Path(folder) / f"tenant{i}" for i in range(tenants.num_adapters)]
    for path in folders:
        milora.save(model, path, path.name)
    return folders


def open_pool(
    base: nn.Module, tenants: Tenants, resident: int
) -> tuple[nn.Module, milora.AdapterPool]:
    """A twin of the base with a pool for `resident` adapters of the tenants' size."""
    size = sum(t[0].nbytes for group in (tenants.a, tenants.b) for t in group.values())
    size += size // 16 + (1 << 16)  # routers, and runs that start on 64 bytes
    routers = 4 * (len(MODULES) + 2) * tenants.shape.hidden * tenants.shape.layers
    size += routers
    model = twin(base)
    pool = milora.AdapterPool(
        model,
        device_bytes=resident * size + (16 << 20),
        host_bytes=2 * size,
        max_resident=resident,
    )
    return model, pool


def pooled_model(base: nn.Module, tenants: Tenants, config: dict[str, Any]) -> nn.Module:
    """As `milora_model`, with the tenants in an AdapterPool, all of them resident."""
    with tempfile.TemporaryDirectory() as folder:
        folders = save_folders(base, tenants, config, folder)
        model, pool = open_pool(base, tenants, resident=len(folders))
        for path in folders:
            pool.register(path.name, path)
            pool.pin(path.name)  # read now: the folder goes
    return model


@torch.no_grad()
def fill(model: nn.Module, tenants: Tenants, prefix: str) -> None:
    """Give attached (MiLoRA, PEFT) adapters the tenants' weights."""
    for (layer, path), a in tenants.a.items():
        linear = model.get_submodule(f"{prefix}model.layers.{layer}.{path}")
        for i in range(tenants.num_adapters):
            linear.lora_A[f"tenant{i}"].weight.copy_(a[i])
            linear.lora_B[f"tenant{i}"].weight.copy_(tenants.b[layer, path][i])


@contextlib.contextmanager
def replaced_ops(makers: dict[str, Callable[[Callable], Callable]]) -> Iterator[None]:
    """Each named op of `milora.ops` replaced by what its maker makes of it.

    A decode step on a CPU makes most of its `grouped_lora_` calls through `PreparedUpdate`.
    """
    places = [(ops, name, name) for name in makers]
    if "grouped_lora_" in makers:
        places.append((PreparedUpdate, "__call__", "grouped_lora_"))
    kept = [getattr(owner, attribute) for owner, attribute, _ in places]
    for (owner, attribute, name), function in zip(places, kept, strict=True):
        setattr(owner, attribute, makers[name](function))
    try:
        yield
    finally:
        for (owner, attribute, _), function in zip(places, kept, strict=True):
            setattr(owner, attribute, function)


def plain_ops() -> contextlib.AbstractContextManager:
    """`milora.reference` in place of the ops of inference."""

    def maker(name: str) -> Callable[[Callable], Callable]:
        def make(op: Callable) -> Callable:
            if op is PreparedUpdate.__call__:
                return lambda *_: False  # then the op is called
            return getattr(reference, name)

        return make

    return replaced_ops({name: maker(name) for name in INFERENCE_OPS})


def route_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The gates [layers, rows, 7] that a MiLoRA model gives these prompts, columns as `MODULES`."""
    with torch.no_grad(), milora.record_routing(model) as states:
        model(**inputs, use_cache=True)
    return routes(states)


def routes(states: list) -> Tensor:
    """The gates [layers, rows, 7] of the one recorded state, columns as `MODULES`."""
    (state,) = states
    return torch.stack(
        [
            gates[:, [names.index(path) for path in MODULES]].detach().float().cpu()
            for gates, names in zip(state.block_gates, state.names, strict=True)
        ]
    )


# ---- PEFT -------------------------------------------------------------------------------------


def peft_model(base: nn.Module, tenants: Tenants, modules: tuple[str, ...] = MODULES) -> nn.Module:
    """The tenants as PEFT adapters, in the base's dtype: faster than PEFT's default of float32."""
    import peft

    config = peft.LoraConfig(
        r=tenants.rank,
        lora_alpha=tenants.rank,
        target_modules=[module.rpartition(".")[2] for module in modules],
        task_type="CAUSAL_LM",
    )
    names = [f"tenant{i}" for i in range(tenants.num_adapters)]
    model = peft.get_peft_model(
        twin(base), config, adapter_name=names[0], autocast_adapter_dtype=False
    )
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    some = {key: a for key, a in tenants.a.items() if key[1] in modules}
    kept = Tenants(tenants.shape, tenants.rank, tenants.adapter_of, some, tenants.b)
    fill(model, kept, prefix="base_model.model.")
    return model.eval()


# ---- plain torch, stacked and row by row --------------------------------------------------------


class StackedLinear(nn.Module):
    """Every row's A and B side by side: y += (x A^T) B^T with two batched products.

    The rows' weights are gathered once per batch, before the clock runs: the form at its best.
    """

    def __init__(self, linear: nn.Module, a: Tensor, b: Tensor, adapter_of: list[int]):
        super().__init__()
        self.linear = linear
        rows = torch.tensor(adapter_of, device=a.device)
        in_place = adapter_of == list(range(a.shape[0]))
        self.a = (a if in_place else a[rows]).transpose(1, 2)  # [rows, d_in, rank]
        self.bt = b.transpose(1, 2).contiguous()  # [rows, rank, d_out]
        if not in_place:
            self.bt = self.bt[rows]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).baddbmm_(torch.bmm(x, self.a), self.bt)


def stacked_model(
    base: nn.Module, tenants: Tenants, modules: tuple[str, ...] = MODULES
) -> nn.Module:
    def make(layer: int, path: str, linear: nn.Module) -> nn.Module:
        if path not in modules:
            return linear
        a, b = tenants.a[layer, path], tenants.b[layer, path]
        return StackedLinear(linear, a, b, tenants.adapter_of)

    return replace_modules(twin(base), make)


class PlainLinear(nn.Module):
    """Row by row, as the formula reads: y_i += g_i B (A x_i)."""

    def __init__(self, linear: nn.Module, a: Tensor, b: Tensor, adapter_of: list[int]):
        super().__init__()
        self.linear, self.a, self.b = linear, a, b
        self.adapter_of = adapter_of
        self.gates: list[float] = []  # of each row

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        rows = []
        for i, (gate, adapter) in enumerate(zip(self.gates, self.adapter_of, strict=True)):
            delta = (x[i] @ self.a[adapter].T) @ self.b[adapter].T
            rows.append(y[i] + gate * delta if gate else y[i])
        return torch.stack(rows)


# Largest root-mean-square error of a row's logits, as a share of what its adapter changes in them.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def check_logits(name: str, got: Tensor, want: Tensor, bare: Tensor, dtype: torch.dtype) -> None:
    """Compare a provider's logits [rows, tokens, vocab] with plain torch's.

    `bare` are those of the base; where the provider is the base, its own logits are the scale.
    Raises: RuntimeError, since a bench that times wrong results is worthless.
    """
    error = (got.float() - want).square().mean((1, 2)).sqrt()
    effect = (want - bare).square().mean((1, 2)).sqrt()
    scale = torch.where(effect > 0, effect, want.square().mean((1, 2)).sqrt())
    worst = (error / scale).max().item()
    if not worst <= ALLOWED[dtype]:
        raise RuntimeError(
            f"{name}: the logits differ from plain torch by {worst:.3g} of what the adapters "
            f"change in them; allowed is {ALLOWED[dtype]}"
        )


class Plain:
    """The measure of the others: float32 whatever the dtype of the case, no kernel of ours."""

    def __init__(self, base: nn.Module, tenants: Tenants):
        self.linears: dict[tuple[int, str], PlainLinear] = {}

        def make(layer: int, path: str, linear: nn.Module) -> nn.Module:
            a, b = tenants.a[layer, path].float(), tenants.b[layer, path].float()
            self.linears[layer, path] = PlainLinear(linear, a, b, tenants.adapter_of)
            return self.linears[layer, path]

        is_float32 = next(base.parameters()).dtype == torch.float32
        float32 = twin(base) if is_float32 else copy.deepcopy(base).float()
        self.model = replace_modules(float32, make)

    def __call__(self, gates: Tensor, **inputs: Any) -> Any:
        for (layer, path), linear in self.linears.items():
            linear.gates = gates[layer, :, MODULES.index(path)].tolist()
        return self.model(**inputs)
