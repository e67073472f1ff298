"""Adapters on disk: a folder that PEFT reads too, written so that a crash leaves no mixture.

`adapter_model.safetensors` in PEFT's key layout, and `adapter_config.json`, which is written last
and holds the sha256 of the weights. A folder without its config holds no adapter. Loading checks
everything before it touches the model, and reports every problem at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from milora._version import __version__
from milora.attach import attach, hidden_size, runtime_of, spec_of
from milora.blocks import Block, find_blocks, linear_shape
from milora.config import FORMAT_VERSION, MiLoRAConfig
from milora.errors import AdapterError
from milora.experts import get_kind
from milora.runtime import ROUTER_NAME

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT_TYPE = "MILORA"
# PEFT stores these without the trailing ".weight" of every other tensor.
BARE_TENSORS = ("lora_magnitude_vector",)


def save(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    is_main_process: bool = True,
) -> None:
    """Write one adapter to `folder`, replacing the adapter that is there.

    Under FSDP every rank must call this (it gathers the shards); the main process writes.

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


def write_folder(folder: str | os.PathLike, tensors: dict[str, Tensor], config: dict) -> None:
    """Write weights and config so that a reader sees the old adapter, none, or the new one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, weights_tmp = folder / WEIGHTS_FILE, folder / f".{WEIGHTS_FILE}.{os.getpid()}.tmp"
    target, target_tmp = folder / CONFIG_FILE, folder / f".{CONFIG_FILE}.{os.getpid()}.tmp"
    try:
        save_file(tensors, weights_tmp, metadata={"format": "pt"})
        config = {**config, "sha256": _sha256(weights_tmp)}
        target_tmp.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for path in (weights_tmp, target_tmp):
            _sync(path)
        target.unlink(missing_ok=True)  # from here the folder holds no adapter ...
        _sync(folder)
        os.replace(weights_tmp, weights)
        _sync(folder)
        os.replace(target_tmp, target)  # ... until here
        _sync(folder)
    finally:
        weights_tmp.unlink(missing_ok=True)
        target_tmp.unlink(missing_ok=True)


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
    attach(model, config, adapter_name, trainable=trainable)
    _copy_into(adapter_parameters(model, adapter_name), tensors)
    return model


def load_weights(model: nn.Module, folder: str | os.PathLike, adapter_name: str) -> None:
    """Load `folder` into an adapter that is on the model, keeping its parameter objects.

    What resuming a training run needs: optimizers hold these very parameters.

    Raises:
        milora.AdapterError: as `load`, or the folder's adapter has another configuration.
    """
    runtime = runtime_of(model)
    config, tensors = read_folder(model, folder)
    if config.to_dict() != runtime.configs[adapter_name].to_dict():
        mine = runtime.configs[adapter_name].to_dict()
        differing = [k for k, v in config.to_dict().items() if v != mine[k]]
        raise AdapterError(
            f"{os.fspath(folder)}: the adapter on the model was configured otherwise: "
            + ", ".join(f"{k} {config.to_dict()[k]!r} (here {mine[k]!r})" for k in differing)
        )
    _copy_into(adapter_parameters(model, adapter_name), tensors)


def read_folder(
    model: nn.Module, folder: str | os.PathLike
) -> tuple[MiLoRAConfig, dict[str, Tensor]]:
    """Read and validate an adapter for `model`; touches nothing.

    Returns: its configuration, and its tensors by their keys in the file.
    Raises: as `load`.
    """
    folder = Path(folder)
    data = read_config(folder)
    tensors = _read_tensors(folder, data.get("sha256"))
    if data.get("peft_type") == "LORA":
        from milora.integrations.peft_lora import config_of_lora

        config = config_of_lora(model, data, tensors, folder)
    else:
        config = _config_of(data, folder)
    try:
        blocks = find_blocks(model, config)
    except ValueError as error:
        raise AdapterError(f"{folder}: {error}") from None
    _raise_all(folder, _problems(model, config, blocks, data, tensors))
    return config, tensors


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The parsed `adapter_config.json` of a folder.

    Raises:
        FileNotFoundError: no adapter there.
        milora.AdapterError: unreadable, not an adapter, or of a version this release cannot read.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {os.fspath(folder)} ({CONFIG_FILE} is missing)")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict) or data.get("peft_type") not in (PEFT_TYPE, "LORA"):
        kind = data.get("peft_type") if isinstance(data, dict) else type(data).__name__
        raise AdapterError(f"{path}: peft_type must be {PEFT_TYPE} or LORA, got {kind!r}")
    version = data.get("format_version")
    if data["peft_type"] == PEFT_TYPE and version != FORMAT_VERSION:
        raise AdapterError(
            f"{path}: format_version {version!r} cannot be read by milora {__version__}, which reads "
            f"{FORMAT_VERSION}"
        )
    return data


def adapter_config(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter, but for the sum of its weights."""
    runtime = runtime_of(model)
    if adapter_name not in runtime.configs:
        raise ValueError(
            f"milora: no adapter {adapter_name!r}; there are {sorted(runtime.configs)}"
        )
    config = runtime.configs[adapter_name]
    checksums = {
        f"{runtime.blocks[linear.block].path}.{runtime.blocks[linear.block].experts[linear.column]}": s
        for linears in runtime.linears
        for linear in linears
        if adapter_name in linear.specs
        and (s := get_kind(config.expert).checksum(linear.specs[adapter_name])) is not None
    }
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
                shapes[f"{prefix}.theta"] = (12,)
    return shapes


def _problems(
    model: nn.Module,
    config: MiLoRAConfig,
    blocks: list[Block],
    data: dict[str, Any],
    tensors: dict[str, Tensor],
) -> list[str]:
    problems: list[str] = []
    if isinstance(config.activation, list) and len(config.activation) != len(blocks):
        return [f"activation lists {len(config.activation)} blocks, the model has {len(blocks)}"]
    if (named := data.get("experts")) is not None:
        here = {block.path: list(block.experts) for block in blocks}
        if named != here:
            differing = sorted(set(named) ^ set(here)) or [p for p in here if named[p] != here[p]]
            problems.append(
                f"its experts are other modules than this model's, e.g. {differing[:3]}"
            )
    expected = expected_shapes(model, config, blocks)
    problems += [f"missing tensor {key}" for key in sorted(set(expected) - set(tensors))]
    problems += [f"unknown tensor {key}" for key in sorted(set(tensors) - set(expected))]
    for key in sorted(set(tensors) & set(expected)):
        tensor = tensors[key]
        if tuple(tensor.shape) != expected[key]:
            problems.append(f"{key}: shape must be {list(expected[key])}, got {list(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            problems.append(
                f"{key}: dtype must be float32, bfloat16 or float16, got {tensor.dtype}"
            )
        elif not tensor.isfinite().all():
            problems.append(f"{key}: holds NaN or Inf")
    problems += _checksum_problems(config, blocks, data.get("checksums") or {})
    return problems


def _checksum_problems(
    config: MiLoRAConfig, blocks: list[Block], checksums: dict[str, str]
) -> list[str]:
    problems = []
    for block in blocks if checksums else ():
        for path in block.experts:
            shape = linear_shape(block.module.get_submodule(path))
            spec = spec_of(config, block.path, path, shape)
            made = get_kind(config.expert).checksum(spec)
            if checksums.get(f"{block.path}.{path}") != made:
                problems.append(
                    f"{block.path}.{path}: its frozen factors came out with checksum {made}, the "
                    f"file says {checksums.get(f'{block.path}.{path}')}"
                )
    return problems


def _config_of(data: dict[str, Any], folder: Path) -> MiLoRAConfig:
    known = MiLoRAConfig.__dataclass_fields__
    try:
        return MiLoRAConfig.from_dict({key: data[key] for key in known if key in data})
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{folder / CONFIG_FILE}: {error}") from None


def _read_tensors(folder: Path, sha256: str | None) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(f"{folder}: {WEIGHTS_FILE} is missing")
    if sha256 is not None and _sha256(path) != sha256:
        raise AdapterError(
            f"{path}: its sha256 is not the one in {CONFIG_FILE}; the file is damaged"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a readable safetensors file: {error}") from None


def _raise_all(folder: Path, problems: list[str]) -> None:
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise AdapterError(
            f"{folder}: the adapter does not fit this model ({len(problems)} problems):\n{listed}"
        )


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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
