"""Save an adapter, and load it: everything is checked before the model is touched.

The files are `milora.adapter_files`' business, what they must hold to fit a model is
`milora.adapter_validation`'s.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from milora._version import __version__
from milora.adapter_files import PEFT_TYPE, write_folder
from milora.adapter_validation import (
    checksum_problem,
    expert_key,
    open_folder,
    raise_all,
    router_key,
    value_problems,
)
from milora.attach import attach_values, delete_adapter
from milora.blocks import find_blocks, linear_shape, spec_of
from milora.config import FORMAT_VERSION, MiLoRAConfig
from milora.errors import AdapterError
from milora.experts import get_kind
from milora.runtime import runtime_of


def save(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    is_main_process: bool = True,
) -> None:
    """Write one adapter to `folder`, replacing the adapter that is there.

    A crash at any point leaves the old adapter or none. Under FSDP every rank must call this (it
    gathers the shards); the main process writes. An adapter that holds NaN or Inf is written, with
    a warning, and `load` will refuse it.

    Raises:
        ValueError: no adapter of that name.
    """
    runtime = runtime_of(model)
    config = adapter_config(model, adapter_name)
    tensors = {
        key: _full(parameter).detach().to("cpu").contiguous()
        for key, parameter in adapter_parameters(model, adapter_name).items()
    }
    if not is_main_process:
        return
    base = getattr(runtime.model, "config", None)
    config["base_model_name_or_path"] = getattr(base, "_name_or_path", None) or None
    write_folder(folder, tensors, config)
    if problems := value_problems(tensors.items()):
        warnings.warn(
            f"milora: the adapter saved in {os.fspath(folder)} will be refused by milora.load: "
            f"{problems[0]}" + (f", and {len(problems) - 1} more" if len(problems) > 1 else ""),
            stacklevel=2,
        )


def load(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    trainable: bool = False,
) -> nn.Module:
    """Put the adapter in `folder` on `model` under `adapter_name`, and make it the active one.

    Reads MiLoRA adapters and, as experts that are always on, PEFT's LoRA and DoRA adapters.

    Args:
        trainable: whether its parameters require gradients.
    Raises:
        FileNotFoundError: `folder` holds no adapter.
        milora.AdapterError: the files are damaged or do not fit the model; the message lists every
            problem. The model is unchanged.
        ValueError: the name is taken.
    """
    config, tensors, checksums = _read(model, folder)
    runtime = runtime_of(model, required=False)
    active = None if runtime is None else runtime.active
    kind = get_kind(config.expert)

    def values(block: str, path: str) -> dict[str, Tensor]:
        shape = linear_shape(model.get_submodule(f"{block}.{path}"))
        names = kind.tensors(spec_of(config, block, path, shape))
        keys = {name: expert_key(block, path, name) for name in names}
        # A tensor that experts share is in the file once, and the first of them brings it.
        return {name: tensors[key].float() for name, key in keys.items() if key in tensors}

    attach_values(model, config, adapter_name, trainable, values)
    try:
        # Against the factors that the model now has: making them is what takes time.
        made = _checksums(model, adapter_name)
        raise_all(folder, _checksum_problems(made, checksums))
        _copy_into(adapter_parameters(model, adapter_name), tensors)
    except BaseException:
        delete_adapter(model, adapter_name)
        if runtime is not None:
            runtime.active = active
        raise
    return model


def load_weights(model: nn.Module, folder: str | os.PathLike, adapter_name: str) -> None:
    """Load `folder` into an adapter that is on the model, keeping its parameter objects.

    What resuming a training run needs: optimizers hold these very parameters.

    Raises:
        milora.AdapterError: as `load`, or the folder's adapter has another configuration.
    """
    runtime = runtime_of(model)
    config, tensors = read_folder(model, folder)
    theirs, mine = config.to_dict(), runtime.configs[adapter_name].to_dict()
    if differing := [key for key in theirs if theirs[key] != mine[key]]:
        raise AdapterError(
            f"{os.fspath(folder)}: the adapter on the model was configured otherwise: "
            + ", ".join(f"{key} {theirs[key]!r} (here {mine[key]!r})" for key in differing)
        )
    _copy_into(adapter_parameters(model, adapter_name), tensors)


def read_folder(
    model: nn.Module, folder: str | os.PathLike
) -> tuple[MiLoRAConfig, dict[str, Tensor]]:
    """Read and validate an adapter for `model`; touches nothing.

    Returns: its configuration, and its tensors by their keys (`adapter_parameters`').
    Raises: as `load`.
    """
    config, tensors, checksums = _read(model, folder)
    kind = get_kind(config.expert)
    made: dict[str, str | None] = {}
    for block in find_blocks(model, config):
        for path in block.experts:
            shape = linear_shape(block.module.get_submodule(path))
            spec = spec_of(config, block.path, path, shape)
            made[f"{block.path}.{path}"] = kind.checksum(spec)
    raise_all(folder, _checksum_problems(made, checksums))
    return config, tensors


def _read(
    model: nn.Module, folder: str | os.PathLike
) -> tuple[MiLoRAConfig, dict[str, Tensor], dict[str, str]]:
    """`read_folder` without a look at frozen factors: what sums they should have comes third.

    Making them takes time and memory, and a damaged config could ask for any amount; so that is
    for after the checks.
    """
    with open_folder(model, folder) as file:
        tensors = {key: file.read(key) for key in file.shapes}
        raise_all(folder, value_problems(tensors.items()))
    return file.config, tensors, file.checksums


def adapter_config(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter, but for the sum of its weights."""
    runtime = runtime_of(model)
    if adapter_name not in runtime.configs:
        raise ValueError(
            f"milora: no adapter {adapter_name!r}; there are {sorted(runtime.configs)}"
        )
    config = runtime.configs[adapter_name]
    checksums = _checksums(model, adapter_name)
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM" if runtime.is_causal else None,
        "format_version": FORMAT_VERSION,
        "milora_version": __version__,
        **config.to_dict(),
        "experts": {
            block.path: [block.experts[c] for c in runtime.columns[adapter_name][index]]
            for index, block in enumerate(runtime.blocks)
        },
        "checksums": {path: made for path, made in checksums.items() if made is not None},
    }


def adapter_parameters(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """An adapter's saved tensors by their keys in the file: parameters, and the buffers of kinds
    that have fixed ones."""
    runtime = runtime_of(model)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for index, block in enumerate(runtime.blocks):
        for linear in runtime.linears[index]:
            if adapter_name not in linear.specs:
                continue
            for name, parameter in linear.tensors(adapter_name).items():
                if id(parameter) in seen:  # shared with an expert before this one
                    continue
                seen.add(id(parameter))
                found[expert_key(block.path, block.experts[linear.column], name)] = parameter
        router = runtime.routers_of(adapter_name)[index]
        for name, parameter in router.named_parameters() if router is not None else ():
            found[router_key(block.path, name)] = parameter
    return found


def _checksums(model: nn.Module, adapter_name: str) -> dict[str, str | None]:
    """By the paths of an adapter's modules: the sums of their experts' frozen factors."""
    runtime = runtime_of(model)
    kind = get_kind(runtime.configs[adapter_name].expert)
    checksums: dict[str, str | None] = {}
    for block, linears in zip(runtime.blocks, runtime.linears, strict=True):
        for linear in linears:
            if (spec := linear.specs.get(adapter_name)) is None:
                continue
            # Making frozen factors takes seconds for a large model; those at hand are the same,
            # unless the model was cast.
            frozen = linear.frozen(adapter_name)
            is_same = all(t.dtype == torch.float32 and not t.is_meta for t in frozen.values())
            whole = f"{block.path}.{block.experts[linear.column]}"
            checksums[whole] = kind.checksum(spec, frozen if is_same else None)
    return checksums


def _checksum_problems(made: dict[str, str | None], said: dict[str, str]) -> list[str]:
    problems = (checksum_problem(path, made[path], said.get(path)) for path in made)
    return [problem for listed in problems for problem in listed]


@torch.no_grad()
def _copy_into(parameters: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        tensor = tensors[key].to(parameter.dtype)
        if hasattr(parameter, "device_mesh"):  # an FSDP2 shard
            from torch.distributed.tensor import distribute_tensor

            tensor = tensor.to(parameter.device)
            tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
        parameter.copy_(tensor)


def _full(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
