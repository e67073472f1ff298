"""Put MiLoRA adapters on a model, and take them off again; what a user calls."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from milora.blocks import Block, find_blocks
from milora.config import MiLoRAConfig
from milora.experts import get_kind
from milora.installing import (
    ExpertValues,
    add_adapter,
    drop_adapter,
    install,
    linear_at,
    uninstall,
)
from milora.nn import MiLoRALinear
from milora.runtime import Runtime, check_known, runtime_of


def attach(
    model: nn.Module,
    config: MiLoRAConfig,
    adapter_name: str = "default",
    *,
    trainable: bool = True,
) -> nn.Module:
    """Put a new adapter on `model`, in place, and make it the active one.

    Every targeted linear module becomes a `MiLoRALinear` around itself; every block gets a router
    as a child module. The model keeps its class, and `generate`, Trainer, gradient checkpointing,
    `torch.compile`, DDP and FSDP work as before. All parameters of the base are frozen; the
    adapter's are float32. A second call adds another adapter.

    Frozen, too, is the new head of a classifier: to train it, set `requires_grad` on it afterwards,
    and save it yourself, since an adapter's folder holds the adapter alone. A decoder without its
    head (`LlamaModel`) is taken for an encoder, whose whole input is the prompt: to train on labels
    give the model that has the head. Inference keeps packed copies of the parameters and sees
    changes by torch's version counter, which writes to `parameter.data` do not move: change
    parameters under `torch.no_grad()` instead.

    Args:
        model: any Hugging Face model, or any module with lists of Transformer blocks.
        config: see `MiLoRAConfig`.
        adapter_name: a name without dots.
        trainable: whether the adapter's parameters require gradients.
    Returns: `model`.
    Raises:
        ValueError: the name is taken or unusable, no blocks were found, a target matches none,
            modules carry adapters of PEFT's or compute in float64, or the parameters are sharded
            already.
        TypeError: `config` is no MiLoRAConfig.
        ImportError: this version of transformers is not supported; the message names the range.
    """
    return attach_values(model, config, adapter_name, trainable, None)


def attach_values(
    model: nn.Module,
    config: MiLoRAConfig,
    adapter_name: str,
    trainable: bool,
    values: ExpertValues | None,
) -> nn.Module:
    """`attach` with the experts' tensors at hand: `values` gives those of a block's path and a
    path in it. Some kinds take minutes to draw initial ones from a large base."""
    if not isinstance(config, MiLoRAConfig):
        raise TypeError(f"attach: config must be a MiLoRAConfig, got {type(config).__name__}")
    existing = runtime_of(model, required=False)
    _check_name(adapter_name, existing)
    _check_model(model, existing)
    blocks = find_blocks(model, config)
    _check_free(blocks, existing)
    _check_dtypes(blocks)
    runtime = existing or install(model, blocks)
    try:
        # Parameters made in inference mode could never be trained, nor be seen to change.
        with torch.inference_mode(False):
            add_adapter(runtime, adapter_name, config, blocks, trainable, values)
    except BaseException:
        drop_adapter(runtime, adapter_name)
        if existing is None:
            uninstall(runtime)
        raise
    runtime.active = adapter_name
    if trainable and hasattr(model, "save_pretrained"):
        from milora.integrations.transformers import teach_trainer

        teach_trainer()
    if trainable and any(getattr(b.module, "gradient_checkpointing", False) for b in blocks):
        model.enable_input_require_grads()  # as transformers does for PEFT models
    return model


def open_runtime(model: nn.Module, target_modules: str | list[str] = "all-linear") -> Runtime:
    """Make `model` ready for the adapters of a pool: its targeted linear modules can take experts.

    Raises:
        ValueError, ImportError: as `attach`; or the model has a pool already.
    """
    existing = runtime_of(model, required=False)
    if existing is not None and existing.pool is not None:
        raise ValueError("AdapterPool: this model has a pool already; close it first")
    _check_model(model, existing)
    blocks = find_blocks(model, MiLoRAConfig(target_modules=target_modules))
    _check_free(blocks, existing)
    runtime = existing or install(model, blocks)
    for index, found in enumerate(blocks):
        for path in found.experts:
            linear_at(runtime, index, path)
    return runtime


def close_runtime(runtime: Runtime) -> None:
    """Let go of a pool that is closing: with nothing attached the model is bare again."""
    runtime.pool = None
    if not runtime.configs:
        uninstall(runtime)
    elif runtime.active is not None and not runtime.knows(runtime.active):
        runtime.active = None


def detach(model: nn.Module) -> nn.Module:
    """Take every adapter off: the bare model again, bit for bit, its modules the very same objects.

    A pool on the model is closed.

    Raises:
        ValueError: nothing is attached.
    """
    runtime = runtime_of(model)
    for name in list(runtime.configs):
        drop_adapter(runtime, name)
    if runtime.pool is not None:
        runtime.pool.close()  # which closes the runtime
    else:
        uninstall(runtime)
    return model


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove one adapter; with the last one the model is detached.

    If it was the active one, the first of the others becomes active.

    Raises:
        ValueError: no adapter has this name.
    """
    runtime = runtime_of(model)
    check_known(runtime, adapter_name)
    was_active = runtime.active == adapter_name
    drop_adapter(runtime, adapter_name)
    if not runtime.configs and runtime.pool is None:
        uninstall(runtime)
    elif was_active:
        runtime.active = next(iter(runtime.configs), None)


def set_adapter(model: nn.Module, adapter_name: str | None) -> None:
    """Choose the adapter of forwards that name none; None switches to the bare model.

    A conversation that has begun stays with its adapters: its route lives with the key-value cache.
    `milora.disabled` is the bare model whatever a cache holds.
    """
    runtime = runtime_of(model)
    if adapter_name is not None and not runtime.knows(adapter_name):
        check_known(runtime, adapter_name)
    runtime.active = adapter_name


def set_rank(model: nn.Module, rank: int, adapter_name: str = "default") -> None:
    """Choose how many ranks of a DyLoRA adapter inference uses; 0 for all of them.

    It becomes the adapter's option `rank`, which is saved with it.

    Raises:
        ValueError: no adapter has this name, it is of another kind, or `rank` is no integer >= 0.
    """
    runtime = runtime_of(model)
    check_known(runtime, adapter_name)
    config = runtime.configs[adapter_name]
    if config.expert != "dylora":
        raise ValueError(f"set_rank: experts must be of kind dylora, got {config.expert}")
    options = {**config.expert_options, "rank": rank}
    get_kind("dylora").validate(options)
    runtime.configs[adapter_name] = dataclasses.replace(config, expert_options=options)
    for linear in (linear for linears in runtime.linears for linear in linears):
        if (spec := linear.specs.get(adapter_name)) is not None:
            linear.specs[adapter_name] = dataclasses.replace(spec, options=options)
    runtime.forget_packs()


def adapters(model: nn.Module) -> dict[str, MiLoRAConfig]:
    """The adapters on `model` by name; empty where nothing is attached."""
    runtime = runtime_of(model, required=False)
    return dict(runtime.configs) if runtime else {}


# ---- checks -----------------------------------------------------------------------------------


def _check_name(name: str, runtime: Runtime | None) -> None:
    if not isinstance(name, str) or not name or "." in name or name in ("__base__", "base_layer"):
        raise ValueError(f"attach: adapter_name must be non-empty without dots, got {name!r}")
    if hasattr(nn.ModuleDict(), name):  # which keeps an adapter's tensors under its name
        raise ValueError(
            f"attach: adapter_name must be no attribute of torch.nn.ModuleDict, got {name!r}"
        )
    if runtime is not None and runtime.knows(name):
        raise ValueError(f"attach: there is an adapter {name!r} already")


def _check_free(blocks: list[Block], runtime: Runtime | None) -> None:
    """Refuse modules that carry the experts of PEFT or of an `attach` to a part of the model."""
    linears = [] if runtime is None else runtime.linears
    ours = {id(linear) for in_block in linears for linear in in_block}
    for block in blocks:
        for path, module in block.module.named_modules():
            is_foreign = isinstance(module, MiLoRALinear) or (
                path in block.experts and isinstance(module._modules.get("base_layer"), nn.Module)
            )
            if is_foreign and id(module) not in ours:
                raise ValueError(
                    f"attach: {block.path}.{path} carries adapters that were put there otherwise "
                    f"({type(module).__module__}.{type(module).__name__}). Take them off or merge "
                    "them first; `attach` must always get the same model, not a part of it"
                )


def _check_dtypes(blocks: list[Block]) -> None:
    for block in blocks:
        for path in block.experts:
            weight = block.module.get_submodule(path)._parameters.get("weight")
            if weight is not None and weight.dtype == torch.float64:
                raise ValueError(
                    f"attach: {block.path}.{path} computes in float64; experts take float32, "
                    "bfloat16 and float16"
                )


def _check_model(model: nn.Module, runtime: Runtime | None) -> None:
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            "attach: the model's parameters are sharded already. Attach first and call fully_shard "
            "after it; tensor-parallel bases are not supported"
        )
    if runtime is None and hasattr(model, "save_pretrained"):
        from milora.integrations.transformers import check_version

        check_version()
