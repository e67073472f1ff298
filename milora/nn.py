"""`MiLoRALinear`: a linear module with the experts of any number of adapters."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _of_all  # hooks on every module

from milora import ops
from milora.dequantize import dequantized, is_repacked
from milora.experts import ExpertSpec, ExpertWeights, get_kind
from milora.rank_gates import add_gated_update, is_rank_gated
from milora.router import keeps_unused_edges
from milora.routing import Call
from milora.updates import Update

_linear_forward = nn.Linear.forward


class Weight(nn.Module):
    """One named tensor, so that its key reads `lora_A.<adapter>.weight` as PEFT's does."""

    def __init__(self, weight: Tensor, trainable: bool, saved: bool):
        super().__init__()
        if trainable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight, persistent=saved)


class MiLoRALinear(nn.Module):
    """y = base_layer(x) + gate · scale · B A x, with the gate of this expert on the prompt's route.

    Stands where a linear module stood and passes its attributes through (`weight`, `bias`,
    `in_features`, ...). It knows the current `Call` through `calls`, an object with an attribute
    `call`.   [MiLoRA, eq. 1]

    Args:
        base_layer: the frozen linear module, of any class.
        shape: (d_in, d_out) of `base_layer`.
        block, column: this expert's place: index of its block, its column in the block's gates.
        calls: where the current `Call` is found (a thread-local).
    """

    def __init__(
        self, base_layer: nn.Module, shape: tuple[int, int], block: int, column: int, calls
    ):
        super().__init__()
        self.base_layer = base_layer
        self.d_in, self.d_out = shape
        self.block = block
        self.column = column
        self.specs: dict[str, ExpertSpec] = {}
        self.kinds: dict[str, str] = {}
        self._calls = calls
        self.siblings: tuple[MiLoRALinear, ...] = ()  # see milora/siblings.py; itself first

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def extra_repr(self) -> str:
        experts = ", ".join(
            f"{name}: {self.kinds[name]} rank {spec.rank}" for name, spec in self.specs.items()
        )
        return f"d_in={self.d_in}, d_out={self.d_out}, experts={{{experts}}}"

    # ---- adapters -----------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        kind: str,
        spec: ExpertSpec,
        tensors: dict[str, Tensor] | None,
        trainable: bool,
        common: dict[tuple[str, str], Weight],
    ) -> None:
        """Add an expert; `tensors` None draws its initial values.

        Args:
            common: tensors that the adapter's experts share, by name and `ExpertKind.shared`; those
                that are there already are used, new ones are put in.
        """
        expert = get_kind(kind)
        device = self.device
        if device.type == "meta":
            shapes, frozen_shapes = expert.tensors(spec), expert.frozen_shapes(spec)
            tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
            frozen = {key: torch.empty(s, device="meta") for key, s in frozen_shapes.items()}
        else:
            frozen = expert.frozen(spec)
            tensors = expert.init(spec, self.dense_weight) if tensors is None else tensors
        shared = expert.shared(spec)
        for key in (*expert.tensors(spec), *frozen):
            weight = common.get((key, shared.get(key, "")))
            if weight is None:
                is_saved = key not in frozen
                tensor = (tensors if is_saved else frozen)[key].to(device)
                tensor = tensor.clone() if tensor.is_inference() else tensor
                weight = Weight(tensor, is_saved and key not in expert.fixed, is_saved)
                weight.requires_grad_(trainable)
            if key in shared:
                common[key, shared[key]] = weight
            if key not in self._modules:
                self.add_module(key, nn.ModuleDict())
            self._modules[key][name] = weight
        self.specs[name] = spec
        self.kinds[name] = kind

    def remove_adapter(self, name: str) -> None:
        for key in [*get_kind(self.kinds[name]).tensors(self.specs[name]), *self.frozen(name)]:
            del self._modules[key][name]
            if not self._modules[key]:
                del self._modules[key]
        del self.specs[name], self.kinds[name]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The saved tensors of one adapter's expert, by their names in the file: parameters, and
        buffers where the kind never trains them."""
        keys = get_kind(self.kinds[name]).tensors(self.specs[name])
        return {key: self._modules[key][name].weight for key in keys}

    def trained(self, name: str) -> dict[str, nn.Parameter]:
        """Those of `tensors` that training changes."""
        fixed = get_kind(self.kinds[name]).fixed
        return {key: tensor for key, tensor in self.tensors(name).items() if key not in fixed}

    def weights(self, name: str, call: Call | None = None) -> ExpertWeights:
        """(A, B, scale, output vector) of one adapter's expert, differentiable.

        With a `call`: those of its training forward, where a kind draws something for each.
        """
        expert = get_kind(self.kinds[name])
        tensors = {**self.tensors(name), **self._drawn(name, call)}
        return expert.materialise(tensors, self.frozen(name), self.specs[name], self.dense_weight)

    def served(self, name: str) -> ExpertWeights:
        """The same as inference kernels read it: a core that is trained alone stands apart."""
        expert = get_kind(self.kinds[name])
        tensors, frozen = self.tensors(name), self.frozen(name)
        return expert.served(tensors, frozen, self.specs[name], self.dense_weight)

    def values(self, name: str, call: Call | None = None) -> dict[str, Any]:
        """What `weights` is made of: tensors, frozen ones, and what a training forward drew."""
        return {**self.frozen(name), **self.tensors(name), **self._drawn(name, call)}

    def _drawn(self, name: str, call: Call | None) -> dict[str, Any]:
        if call is None or not self.training:
            return {}
        place = self.block, self.column, name
        if place not in call.drawn:
            kind = get_kind(self.kinds[name])
            call.drawn[place] = kind.drawn(self.tensors(name), self.specs[name])
        return call.drawn[place]

    def frozen(self, name: str) -> dict[str, Tensor]:
        """The tensors of one adapter's expert that are not trained and not saved."""
        trainable = get_kind(self.kinds[name]).tensors(self.specs[name])
        return {
            key: module[name].weight
            for key, module in self._modules.items()
            if key != "base_layer" and key not in trainable and name in module
        }

    @property
    def device(self) -> torch.device:
        """Where this module computes: its weight's device, unless accelerate has offloaded it."""
        tensors = itertools.chain(self.base_layer.parameters(), self.base_layer.buffers())
        device = next(tensors).device
        hook = getattr(self.base_layer, "_hf_hook", None) if device.type == "meta" else None
        computes = getattr(hook, "execution_device", None)
        return device if computes is None else torch.empty(0, device=computes).device

    def dense_weight(self) -> Tensor:
        """The base weight as [d_out, d_in] in a floating dtype.

        Raises:
            TypeError: the base is quantized in a form that cannot be dequantized here, or it is
                offloaded.
        """
        weight = dequantized(self.base_layer)
        if weight is not None and weight.is_meta and self.device.type != "meta":
            raise TypeError(
                "milora: this expert kind needs the base weight, which accelerate has offloaded; "
                "load the model without offloading, or use expert='lora'"
            )
        if type(self.base_layer).__name__ == "Conv1D":
            weight = weight.T
        # float8 needs scales that its module keeps elsewhere: its bare values mean nothing.
        plain = weight is not None and weight.is_floating_point() and weight.dtype.itemsize > 1
        if not plain or tuple(weight.shape) != (self.d_out, self.d_in):
            got = "no weight" if weight is None else f"a weight of {weight.dtype}"
            raise TypeError(
                "milora: this expert kind needs the base weight, and "
                f"{type(self.base_layer).__name__} with {got} cannot be dequantized; use "
                "expert='lora' on this base"
            )
        return weight.detach()

    # ---- forward ------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        base_layer = self._modules["base_layer"]  # this way costs a tenth of an attribute look-up
        call = self._calls.call
        if call is None:
            return base_layer(x, *args, **kwargs)
        if call.called is not None:
            call.called.add(self)
        if call.ready:
            early = call.ready.pop(self, None)
            if early is not None and early[0] is x and early[1] == _version(x):
                return early[2]
        if torch.is_grad_enabled() or self.training:
            if not call.pooled:
                self._check_rows(call, x)
                return self._forward_train(call, x, args, kwargs)
            if x.requires_grad:
                raise RuntimeError(
                    "milora: adapters in a pool serve inference only; use torch.no_grad(), or "
                    "milora.load the adapter to train it"
                )
        if torch.compiler.is_compiling() or args or kwargs:
            outputs = [base_layer(x, *args, **kwargs)]
            self._add_updates(call, x, outputs, (self,), again=False)
            return outputs[0]
        if call.watch is not None:
            call.watch.saw(self, x)
        siblings = self.siblings or (self,)
        outputs = [linear._base_output(x) for linear in siblings]
        self._add_updates(call, x, outputs, siblings, again=call.plan is None)
        if len(siblings) > 1:
            version = _version(x)
            for linear, y in zip(siblings[1:], outputs[1:], strict=True):
                call.ready[linear] = (x, version, y)
        return outputs[0]

    def _base_output(self, x: Tensor) -> Tensor:
        """`base_layer(x)`, for a bare linear without Python's way through a module."""
        base_layer = self._modules["base_layer"]
        if is_bare_linear(base_layer):
            parameters = base_layer._parameters
            return nn.functional.linear(x, parameters["weight"], parameters["bias"])
        return base_layer(x)

    def _add_updates(
        self,
        call: Call,
        x: Tensor,
        outputs: list[Tensor],
        linears: tuple[MiLoRALinear, ...],
        again: bool,
    ) -> None:
        """Update `outputs` of `linears`, which all read x: in one op call if they share a dtype.

        Args:
            again: whether this is a decode step, which more of the same shapes will follow.
        """
        kept = call.state.updates
        update = kept.get(self) if again else None
        if update is not None and update.repeat(call, linears, x, outputs):
            return
        self._check_rows(call, x)
        update = Update(call, linears, x, outputs)
        if again:
            kept[self] = update
        update.add(x, outputs, again)

    def _check_rows(self, call: Call, x: Tensor) -> None:
        """Refuse [T, B, d] (Longformer): its tokens would silently follow the wrong prompts."""
        if x.dim() <= 2 or x.shape[0] == call.state.num_rows:
            return
        if call.plan is None or call.plan.segment_of is None:  # not packed
            raise RuntimeError(
                f"milora: a linear module got an input {list(x.shape)} that does not begin with "
                f"the batch's {call.state.num_rows} rows; leave this module out of target_modules"
            )

    def _forward_train(self, call: Call, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        if x.requires_grad and is_repacked(self.base_layer):
            raise RuntimeError(
                "milora: bitsandbytes has repacked this model's 4-bit weights for CPU inference (a "
                "forward in eval mode does), so no gradient passes through them; train a freshly "
                "loaded model without evaluating it, use 8 bit or torchao, or a GPU"
            )
        names = [name for name in call.adapters if name in self.specs]
        active = call.state.block_active[self.block]
        if not names or (active is not None and not active[self.column]):
            y = self.base_layer(x, *args, **kwargs)
            if names and keeps_unused_edges():
                tensors = [t for name in names for t in self.trained(name).values()]
                return _ZeroGrads.apply(y, *tensors)
            return y
        dropout = max(self.specs[name].dropout for name in names) if self.training else 0.0
        gated = [name for name in names if is_rank_gated(self, name)]
        names = [name for name in names if name not in gated]
        experts = [self.weights(name, call) for name in names]
        has_outputs = any(expert.output is not None for expert in experts)
        needs_y = dropout or has_outputs or gated
        if is_plain_linear(self.base_layer, x) and not (args or kwargs or needs_y):
            rows = x.reshape(-1, self.d_in)
            weight, bias = self.base_layer.weight, self.base_layer.bias
            update = self._update_arguments(call, names, experts, rows)
            return ops.lora_linear(rows, weight, bias, *update).view(*x.shape[:-1], self.d_out)
        y = self.base_layer(x, *args, **kwargs)
        rows = y.reshape(-1, self.d_out)
        x = x.reshape(-1, self.d_in).to(y.dtype)
        if dropout:
            x = nn.functional.dropout(x, dropout)
        out = rows
        if names:
            update = self._update_arguments(call, names, experts, rows)
            out = ops.grouped_lora(rows, x, *update)
            if has_outputs:
                out = out + self._output_vectors(experts, rows, *update[3:])
        for name in gated:
            out = add_gated_update(call, self, name, out, x)
        return out.view(y.shape)

    def _update_arguments(
        self, call: Call, names: list[str], experts: list[ExpertWeights], rows: Tensor
    ) -> tuple:
        """What `ops.grouped_lora` takes after y and x, for as many tokens as `rows` has."""
        adapter_of = call.adapter_of
        if len(names) != len(call.adapters):
            # Gates of adapters without an expert here: their columns are zero, so any index serves.
            index = {name: i for i, name in enumerate(names)}
            table = [index.get(name, -1) for name in call.adapters] + [-1]
            table = torch.tensor(table, dtype=torch.int32, device=adapter_of.device)
            adapter_of = table[adapter_of.long()]
        return (
            [e.a.to(rows.dtype) for e in experts],
            [e.b.to(rows.dtype) for e in experts],
            [e.scale for e in experts],
            call.state.block_gates[self.block][:, self.column].contiguous().to(rows.device),
            call.route_of(rows.shape[0]).to(rows.device),
            adapter_of.to(rows.device),
        )

    def _output_vectors(
        self,
        experts: list[ExpertWeights],
        rows: Tensor,
        gates: Tensor,
        route_of: Tensor,
        adapter_of: Tensor,
    ) -> Tensor:
        """gate · (c − 1) ⊙ (y − bias) of the experts that have an output vector (DoRA's)."""
        zeros = rows.new_zeros(self.d_out)
        table = torch.stack(
            [zeros if e.output is None else e.output.to(rows.dtype) for e in experts]
        )
        gates = gates.to(rows.dtype) * (adapter_of >= 0)
        per_route = gates[:, None] * table[adapter_of.clamp(min=0).long()]
        bias = self.base_layer.bias
        y = rows if bias is None else rows - bias.to(rows.dtype)
        routes = per_route[route_of.clamp(min=0).long()] * (route_of >= 0)[:, None]
        return routes * y


def is_bare_linear(module: nn.Module) -> bool:
    """Whether calling `module` is `nn.functional.linear` with its parameters: no subclass, no other
    forward, no hook that a forward would run, no weight that is kept elsewhere."""
    return (
        type(module) is nn.Linear
        and "weight" in module._parameters
        and "bias" in module._parameters
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (_of_all._global_forward_hooks or _of_all._global_forward_pre_hooks)
        and not (_of_all._global_backward_hooks or _of_all._global_backward_pre_hooks)
        and "forward" not in module.__dict__
        and nn.Linear.forward is _linear_forward
    )


def is_plain_linear(module: nn.Module, x: Tensor) -> bool:
    """Whether `module` is a bare linear whose weight is frozen and plain, so that its gradient may
    be written by hand: neither quantized nor sharded, and no autocast or compiler in between."""
    if torch.compiler.is_compiling() or not is_bare_linear(module):
        return False
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    return (
        type(weight) is nn.Parameter
        and weight.dtype == x.dtype
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _version(x: Tensor) -> int | None:
    """Changes when x is changed in place; tensors made in inference mode have none."""
    return None if x.is_inference() else x._version


class _ZeroGrads(torch.autograd.Function):
    """Identity on y that gives `tensors` zero gradients, at no cost in the forward."""

    @staticmethod
    def forward(ctx, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)
