"""Put hooks, experts and routers into a model, and take them out again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from milora.balance import BalanceWindow
from milora.blocks import Block, hidden_size, linear_shape, spec_of
from milora.checkpointing import CheckpointedBlock
from milora.config import MiLoRAConfig
from milora.generation import GenerateMethods, Replaced
from milora.nn import MiLoRALinear, Weight
from milora.router import ROUTER_NAME, PromptRouter
from milora.runtime import RUNTIME, Runtime

ExpertValues = Callable[[str, str], dict[str, Tensor]]


class BlockHook:
    """Forward pre-hook of one block, as an object so that copies of the model copy it too."""

    def __init__(self, runtime: Runtime, index: int):
        self.runtime = runtime
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.runtime.enter_block(self.index, args, kwargs)


def install(model: nn.Module, blocks: list[Block]) -> Runtime:
    runtime = Runtime(model, blocks)
    owners = {id(model): model}
    for block in blocks:
        owner = model.get_submodule(block.path.rpartition(".")[0].rpartition(".")[0])
        owners[id(owner)] = owner
    for owner in owners.values():
        runtime.handles += [
            owner.register_forward_pre_hook(runtime.begin, with_kwargs=True),
            owner.register_forward_hook(runtime.finish, with_kwargs=True, always_call=True),
        ]
    for index, block in enumerate(blocks):
        hook = BlockHook(runtime, index)
        runtime.handles.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))
    runtime.base_requires_grad = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    methods = GenerateMethods(runtime)
    if runtime.is_causal:
        bodies = {
            "generate": methods.generate,
            "prepare_inputs_for_generation": methods.prepare_inputs,
        }
        for name, body in bodies.items():
            _replace(runtime, name, Replaced(model, name, body))
    if hasattr(model, "save_pretrained"):
        from milora.integrations import transformers

        for name, value in transformers.install(runtime).items():
            _replace(runtime, name, value)
    model.__dict__[RUNTIME] = runtime
    return runtime


def _replace(runtime: Runtime, name: str, value: Any) -> None:
    """Set an instance attribute of the model, to be restored on detach."""
    model = runtime.model
    runtime.replaced[name] = (name in model.__dict__, model.__dict__.get(name))
    model.__dict__[name] = value


def uninstall(runtime: Runtime) -> None:
    model = runtime.model
    for block, linears in zip(runtime.blocks, runtime.linears, strict=True):
        for linear in linears:
            path = next(p for p, m in block.module.named_modules() if m is linear)
            _set_submodule(block.module, path, linear.base_layer)
        if hasattr(block.module, ROUTER_NAME):
            delattr(block.module, ROUTER_NAME)
    CheckpointedBlock.remove(runtime)
    for handle in runtime.handles:
        handle.remove()
    for name, (existed, value) in runtime.replaced.items():
        if existed:
            model.__dict__[name] = value
        else:
            del model.__dict__[name]
    for name, parameter in model.named_parameters():
        # Of a base that was made in inference mode it can be set in that mode alone.
        with torch.inference_mode(parameter.is_inference()):
            parameter.requires_grad_(runtime.base_requires_grad.get(name, parameter.requires_grad))
    del model.__dict__[RUNTIME]


def _set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def add_adapter(
    runtime: Runtime,
    name: str,
    config: MiLoRAConfig,
    blocks: list[Block],
    trainable: bool,
    values: ExpertValues | None,
) -> None:
    activations = config.activation
    if isinstance(activations, list) and len(activations) != len(blocks):
        raise ValueError(
            f"attach: activation must be one name or {len(blocks)} names, one per block, got "
            f"{len(activations)}"
        )
    runtime.configs[name] = config
    runtime.columns[name] = []
    if config.router:
        runtime.windows[name] = BalanceWindow(config.balance_window)
    common: dict[tuple[str, str], Weight] = {}
    for index, found in enumerate(blocks):
        linears = {path: linear_at(runtime, index, path) for path in found.experts}
        columns = [linears[path].column for path in found.experts]
        runtime.columns[name].append(columns)
        for path, linear in linears.items():
            spec = spec_of(config, found.path, path, (linear.d_in, linear.d_out))
            tensors = None if values is None else values(found.path, path)
            linear.add_adapter(name, config.expert, spec, tensors, trainable, common)
        if config.router and linears:
            seed = hashlib.sha256(f"{config.seed}/{index}/{ROUTER_NAME}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
            first = next(iter(linears.values()))
            width = hidden_size(runtime.model, found.module)
            router = _add_router(runtime, name, index, width, first.device, generator)
            router.requires_grad_(trainable)
            if router.theta is not None:
                router.theta.requires_grad_(False)  # until `activation_phase`


def linear_at(runtime: Runtime, index: int, path: str) -> MiLoRALinear:
    """The `MiLoRALinear` at `path` in a block; swapped in on first use."""
    block = runtime.blocks[index]
    module = block.module.get_submodule(path)
    if isinstance(module, MiLoRALinear):
        return module
    if path not in block.experts:
        if runtime.pool is not None:
            raise ValueError(
                f"attach: {block.path}.{path} is none of the modules that the model's adapter pool "
                "serves; make the pool with target_modules that include it"
            )
        blocks = list(runtime.blocks)
        block = blocks[index] = type(block)(
            block.path, block.module, (*block.experts, path), block.source
        )
        runtime.blocks = blocks
    column = block.experts.index(path)
    linear = MiLoRALinear(module, linear_shape(module), index, column, runtime.local)
    linear.train(module.training)
    _set_submodule(block.module, path, linear)
    runtime.linears[index].append(linear)
    runtime.forget_siblings()
    runtime.calls_known = False
    return linear


def drop_adapter(runtime: Runtime, name: str) -> None:
    for index, linears in enumerate(runtime.linears):
        for linear in linears:
            if name in linear.specs:
                linear.remove_adapter(name)
        routers = getattr(runtime.blocks[index].module, ROUTER_NAME, {})
        if name in routers:
            del routers[name]
    runtime.configs.pop(name, None)
    runtime.columns.pop(name, None)
    runtime.windows.pop(name, None)
    runtime.forget_packs()
    if runtime.active == name:
        runtime.active = None


def _add_router(
    runtime: Runtime,
    name: str,
    block: int,
    d: int,
    device: torch.device,
    generator: torch.Generator,
) -> PromptRouter:
    """Give block `block` the router of adapter `name`, as a child module of the block.

    A child of the block, so that FSDP gathers its parameters together with the block's own.
    """
    entry = runtime.blocks[block]
    if not hasattr(entry.module, ROUTER_NAME):
        entry.module.add_module(ROUTER_NAME, nn.ModuleDict())
    router = PromptRouter(
        d,
        len(runtime.columns[name][block]),
        runtime.configs[name],
        block,
        pooled_input=entry.source is not None,
        device=device,
        generator=generator,
    )
    getattr(entry.module, ROUTER_NAME)[name] = router
    return router
