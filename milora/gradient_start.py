"""Start an adapter from gradients of the base weights: LoRA-GA, LoRA-SB."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from milora.experts import get_kind
from milora.forwards import disabled
from milora.nn import MiLoRALinear
from milora.runtime import runtime_of

Loss = Callable[[nn.Module, Any], Tensor]


def init_from_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str = "default",
    *,
    loss: Loss | None = None,
    modules_per_pass: int | None = None,
    **options: float,
) -> None:
    """Give a fresh adapter of kind lora_ga or lora_sb its start from the task's gradients.

    G = dL/dW, the mean over the batches, is taken on the bare model (no routing, no dropout), once
    before training. A few dozen batches do.

    Args:
        batches: what `loss` takes; by default dicts for the model, with labels.
        loss: (model, batch) -> scalar; by default `model(**batch).loss`.
        modules_per_pass: G takes as much memory as the modules' weights in float32. With a number
            here, so many modules are done at a time, each time with a pass over all batches.
        options: of the kind: lora_ga `gamma` (16), lora_sb `step` (1e-3).
    Raises:
        ValueError: no such adapter, another kind, no batch, or no gradient reached a module.
    """
    runtime = runtime_of(model)
    if adapter_name not in runtime.configs:
        raise ValueError(f"milora: no adapter {adapter_name!r}; there are {list(runtime.configs)}")
    kind = get_kind(runtime.configs[adapter_name].expert)
    start = getattr(kind, "init_from_gradient", None)
    if start is None:
        raise ValueError(
            f"init_from_gradients: expert must be lora_ga or lora_sb, got {kind.name}; lora, for "
            "one, starts without data"
        )
    places = {
        f"{block.path}.{block.experts[linear.column]}": linear
        for block, linears in zip(runtime.blocks, runtime.linears, strict=True)
        for linear in linears
        if adapter_name in linear.specs
    }
    size = modules_per_pass or len(places)
    if size < len(places):
        batches = list(batches)
    paths = list(places)
    for begin in range(0, len(paths), size):
        chosen = {path: places[path] for path in paths[begin : begin + size]}
        gradients = _mean_gradients(model, chosen, batches, loss or _model_loss)
        for path, linear in chosen.items():
            if not gradients[path].any():
                raise ValueError(f"init_from_gradients: no gradient reached {path}")
            values = start(linear.specs[adapter_name], gradients.pop(path), **options)
            with torch.no_grad():
                for name, tensor in linear.tensors(adapter_name).items():
                    tensor.copy_(values[name])


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise ValueError("init_from_gradients: batches must have labels, or give a loss")
    return value


def _mean_gradients(
    model: nn.Module, linears: dict[str, MiLoRALinear], batches: Iterable[Any], loss: Loss
) -> dict[str, Tensor]:
    """dL/dW [d_out, d_in] of each module, mean over the batches."""
    sums: dict[str, Tensor] = {}
    for path, linear in linears.items():
        dtype = next((p.dtype for p in linear.base_layer.parameters()), torch.float32)
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        sums[path] = torch.zeros(linear.d_out, linear.d_in, dtype=dtype, device=linear.device)
    count = 0
    was_training = model.training
    model.eval()
    try:
        with disabled(model), _tapped(linears, sums), torch.enable_grad():
            for batch in batches:
                loss(model, batch).backward()
                count += 1
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("init_from_gradients: batches must hold one or more, got none")
    return {path: total.div_(count) for path, total in sums.items()}


@contextmanager
def _tapped(linears: dict[str, MiLoRALinear], sums: dict[str, Tensor]) -> Iterator[None]:
    """Inside, each backward adds dL/dW of these modules to `sums`. W itself needs no gradient, so
    quantized ones do too."""
    handles = []
    for path, linear in linears.items():
        anchor = torch.zeros((), requires_grad=True)  # makes the graph begin here

        def hook(module, args, output, total=sums[path], anchor=anchor):
            return _Tap.apply(output, anchor, args[0].detach(), total)

        handles.append(linear.base_layer.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Tap(torch.autograd.Function):
    """Identity on y; its backward adds (dL/dy)ᵀ x to `total` [d_out, d_in]."""

    @staticmethod
    def forward(ctx, y: Tensor, anchor: Tensor, x: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.total = total
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), total = ctx.saved_tensors, ctx.total
        rows, x = grad.reshape(-1, total.shape[0]), x.reshape(-1, total.shape[1])
        total.addmm_(rows.T.to(total.dtype), x.to(total.dtype))
        return grad, None, None, None
