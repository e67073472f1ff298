"""Save an adapter, and load it: everything is checked before the model is touched.

The files are `milora.adapter_files`' business; here is what they must hold to fit a model. Every
problem of a folder is reported at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from milora._version import __version__
from milora.adapter_files import PEFT_TYPE, open_weights, read_config, write_folder
from milora.attach import attach, delete_adapter, hidden_size, runtime_of, spec_of
from milora.blocks import Block, find_blocks, linear_shape
from milora.config import FORMAT_VERSION, MiLoRAConfig
from milora.errors import AdapterError
from milora.experts import get_kind
from milora.router import NUM_COEFFICIENTS
from milora.runtime import ROUTER_NAME

PREFIX = "base_model.model."
# PEFT stores these without the trailing ".weight" of every other tensor.
BARE_TENSORS = ("lora_magnitude_vector",)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# What a config holds beside `MiLoRAConfig`'s fields: ours, and what PEFT adds when it saves.
META_KEYS = {"format_version", "milora_version", "experts", "checksums", "sha256"}
PEFT_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}


def save(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    is_main_process: bool = True,
) -> None:
    """Write one adapter to `folder`, replacing the adapter that is there.

    A crash at any point leaves the old adapter or none. Under FSDP every rank must call this (it
    gathers the shards); the main process writes.

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
    config, tensors = read_folder(model, folder)
    runtime = runtime_of(model, required=False)
    active = None if runtime is None else runtime.active
    attach(model, config, adapter_name, trainable=trainable)
    try:
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
    folder = Path(folder)
    data = read_config(folder)
    with open_weights(folder, data.get("sha256")) as file:
        names: dict[str, str] = {}
        for name in file.keys():  # noqa: SIM118
            names[name if key_of(name) in names else key_of(name)] = name
        found = {key: file.get_slice(name) for key, name in names.items()}
        forms = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in found.items()}
        config = _config_of(model, data, {key: shape for key, (shape, _) in forms.items()}, folder)
        try:
            blocks = find_blocks(model, config)
        except ValueError as error:
            raise AdapterError(f"{folder}: {error}") from None
        problems = _block_problems(config, blocks, data.get("experts"))
        if not problems:
            expected = expected_shapes(model, config, blocks)
            wrong = form_problems(expected, forms)
            # Only what has the form of this model's tensors is read, so memory stays bounded.
            tensors = {key: file.get_tensor(names[key]) for key in expected if key not in wrong}
            problems = [*wrong.values(), *value_problems(tensors)]
    # Making frozen factors takes time and memory that a damaged config could make any amount of.
    raise_all(folder, problems or _checksum_problems(config, blocks, data.get("checksums", {})))
    return config, tensors


def adapter_config(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter, but for the sum of its weights."""
    runtime = runtime_of(model)
    if adapter_name not in runtime.configs:
        raise ValueError(
            f"milora: no adapter {adapter_name!r}; there are {sorted(runtime.configs)}"
        )
    config = runtime.configs[adapter_name]
    kind = get_kind(config.expert)
    checksums: dict[str, str] = {}
    for block, linears in zip(runtime.blocks, runtime.linears, strict=True):
        for linear in linears:
            if (spec := linear.specs.get(adapter_name)) is None:
                continue
            # Making frozen factors takes a minute for a large model; those at hand are the same,
            # unless the model was cast.
            frozen = linear.frozen(adapter_name)
            is_same = all(t.dtype == torch.float32 and not t.is_meta for t in frozen.values())
            if (checksum := kind.checksum(spec, frozen if is_same else None)) is not None:
                checksums[f"{block.path}.{block.experts[linear.column]}"] = checksum
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
        "checksums": checksums,
    }


def adapter_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their keys in the file."""
    runtime = runtime_of(model)
    found: dict[str, nn.Parameter] = {}
    for index, block in enumerate(runtime.blocks):
        for linear in runtime.linears[index]:
            if adapter_name not in linear.specs:
                continue
            for name, parameter in linear.tensors(adapter_name).items():
                found[expert_key(block.path, block.experts[linear.column], name)] = parameter
        router = runtime.routers_of(adapter_name)[index]
        for name, parameter in router.named_parameters() if router is not None else ():
            found[f"{PREFIX}{block.path}.{ROUTER_NAME}.{name}"] = parameter
    return found


def key_of(name: str) -> str:
    """A tensor's key from its name in a file: PEFT before 0.21 writes bare ones with ".weight"."""
    bare = name.removesuffix(".weight")
    return bare if bare.endswith(BARE_TENSORS) else name


def expert_key(block: str, path: str, tensor: str) -> str:
    suffix = "" if tensor in BARE_TENSORS else ".weight"
    return f"{PREFIX}{block}.{path}.{tensor}{suffix}"


# ---- validation ---------------------------------------------------------------------------------


def expected_shapes(
    model: nn.Module, config: MiLoRAConfig, blocks: list[Block]
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of an adapter of `config` on `model`, which need not carry it."""
    kind = get_kind(config.expert)
    shapes: dict[str, tuple[int, ...]] = {}
    for index, block in enumerate(blocks):
        for path in block.experts:
            shape = linear_shape(block.module.get_submodule(path))
            spec = spec_of(config, block.path, path, shape)
            for name, tensor_shape in kind.tensors(spec).items():
                shapes[expert_key(block.path, path, name)] = tuple(tensor_shape)
        if config.router and block.experts:
            d = hidden_size(model, block.module.get_submodule(block.experts[0]))
            prefix = f"{PREFIX}{block.path}.{ROUTER_NAME}"
            shapes[f"{prefix}.w_r"] = (len(block.experts), d)
            if config.pooler == "self_attention" and block.source is None:
                shapes[f"{prefix}.w_sa"] = (d,)
            if config.activation_of(index) == "rational":
                shapes[f"{prefix}.theta"] = (NUM_COEFFICIENTS,)
    return shapes


def form_problems(
    expected: dict[str, tuple[int, ...]], forms: dict[str, tuple[tuple[int, ...], str]]
) -> dict[str, str]:
    """What is wrong with tensors before their values are looked at, by key.

    Args:
        forms: shape and dtype (safetensors' name of it) of the tensors that were found.
    """
    problems = {key: f"missing tensor {key}" for key in expected.keys() - forms.keys()}
    for key, (shape, dtype) in forms.items():
        if key not in expected:
            problems[key] = f"unknown tensor {key}"
        elif shape != expected[key]:
            problems[key] = f"{key}: shape must be {list(expected[key])}, got {list(shape)}"
        elif dtype not in DTYPES:
            problems[key] = f"{key}: dtype must be one of {', '.join(DTYPES)}, got {dtype}"
    return problems


def value_problems(tensors: dict[str, Tensor]) -> list[str]:
    return [f"{key}: holds NaN or Inf" for key, t in tensors.items() if not t.isfinite().all()]


def raise_all(where: str | os.PathLike, problems: list[str]) -> None:
    """Raise an AdapterError that lists the problems, if there are any."""
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in sorted(problems))
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise AdapterError(
            f"{os.fspath(where)}: the adapter does not fit this model ({count}):\n{listed}"
        )


def _block_problems(
    config: MiLoRAConfig, blocks: list[Block], named: dict[str, list[str]] | None
) -> list[str]:
    """What differs between the blocks that the adapter was made for and the model's."""
    problems = []
    activation = config.activation
    if isinstance(activation, list) and len(activation) != len(blocks):
        problems.append(f"activation lists {len(activation)} blocks, the model has {len(blocks)}")
    here = {block.path: list(block.experts) for block in blocks}
    named = here if named is None else named
    for path in sorted(named.keys() | here.keys()):
        if named.get(path) != here.get(path):
            problems.append(
                f"{path}: its experts are {named.get(path)}, those of this model {here.get(path)}"
            )
    return problems


def _checksum_problems(
    config: MiLoRAConfig, blocks: list[Block], checksums: dict[str, str]
) -> list[str]:
    problems = []
    for block in blocks:
        for path in block.experts:
            shape = linear_shape(block.module.get_submodule(path))
            made = get_kind(config.expert).checksum(spec_of(config, block.path, path, shape))
            said = checksums.get(f"{block.path}.{path}")
            if made != said:
                problems.append(
                    f"{block.path}.{path}: its frozen factors came out with checksum {made}, the "
                    f"file says {said}"
                )
    return problems


def _config_of(
    model: nn.Module, data: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path
) -> MiLoRAConfig:
    if data["peft_type"] == "LORA":
        from milora.integrations.peft_lora import config_of_lora

        return config_of_lora(model, data, shapes, folder)
    known = set(MiLoRAConfig.__dataclass_fields__)
    problems = [f"missing key {key!r}" for key in sorted(known - data.keys())]
    unknown = data.keys() - known - META_KEYS - PEFT_KEYS
    problems += [f"unknown key {key!r}" for key in sorted(unknown)]
    try:
        config = MiLoRAConfig(**{key: data[key] for key in known & data.keys()})
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        problems.append(str(error))
    if problems:
        raise AdapterError(f"{folder}: its config cannot be used: {'; '.join(problems)}")
    return config


# ---- small things -------------------------------------------------------------------------------


@torch.no_grad()
def _copy_into(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        tensor = tensors[key].to(parameter.dtype)
        if hasattr(parameter, "device_mesh"):  # an FSDP2 shard
            from torch.distributed.tensor import distribute_tensor

            tensor = tensor.to(parameter.device)
            tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
        parameter.copy_(tensor)


def _full(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
