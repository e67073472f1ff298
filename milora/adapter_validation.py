"""What an adapter's files must hold to fit a model, and opening them so that they do.

Nothing here changes a model: a folder is opened for `milora.load` and for a pool alike. Every
problem of a folder is reported at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from milora.adapter_files import open_weights, read_config
from milora.blocks import Block, find_blocks, hidden_size, linear_shape, spec_of
from milora.config import MiLoRAConfig
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
Shapes = dict[str, tuple[int, ...]]


class Geometry:
    """What an adapter of a configuration looks like on one model, which need not carry it.

    Each answer takes a walk through the model; a pool has a subclass that remembers them.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def config(self, data: dict[str, Any], shapes: Shapes, folder: Path) -> MiLoRAConfig:
        """The configuration that an `adapter_config.json` stands for.

        Args:
            shapes: of the folder's tensors by key; read for PEFT's LoRA only.
        Raises:
            milora.AdapterError: it cannot be used.
        """
        if data["peft_type"] == "LORA":
            from milora.integrations.peft_lora import config_of_lora

            return config_of_lora(self.model, data, shapes, folder)
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

    def blocks(self, config: MiLoRAConfig) -> list[Block]:
        """The model's blocks with the experts that `config` targets. Raises: ValueError."""
        return find_blocks(self.model, config)

    def shapes(self, config: MiLoRAConfig) -> Shapes:
        """Keys and shapes of the tensors of an adapter of `config`."""
        return expected_shapes(self.model, config, self.blocks(config))


@dataclass(frozen=True)
class OpenAdapter:
    """A folder's adapter while its weights file is open: forms were checked, values not yet.

    Attributes:
        shapes: of its tensors by key.
        checksums: of its experts' frozen factors, by the path of the module.
        read: gives the tensor of a key, on the CPU.
    """

    config: MiLoRAConfig
    blocks: list[Block]
    shapes: Shapes
    checksums: dict[str, str]
    read: Callable[[str], Tensor]


@contextlib.contextmanager
def open_folder(
    model: nn.Module, folder: str | os.PathLike, geometry: Geometry | None = None
) -> Iterator[OpenAdapter]:
    """Open an adapter for `model`; what it is read for counts once the context has ended well.

    Raises:
        FileNotFoundError: `folder` holds no adapter.
        milora.AdapterError: the files are damaged or do not fit the model, or were replaced while
            they were open.
    """
    folder = Path(folder)
    geometry = geometry or Geometry(model)
    data = read_config(folder)
    with open_weights(folder, data.get("sha256")) as file:
        names, forms = tensor_forms(file)
        shapes = {key: shape for key, (shape, _) in forms.items()}
        config = geometry.config(data, shapes, folder)
        blocks = checked_blocks(geometry, config, data.get("experts"), folder)
        try:
            expected = geometry.shapes(config)
        except ValueError as error:  # an expert kind that this model's modules cannot have
            raise AdapterError(f"{folder}: {error}") from None
        if wrong := form_problems(expected, forms):
            # Only what has the form of this model's tensors is read, so memory stays bounded.
            right = ((key, file.get_tensor(names[key])) for key in expected if key not in wrong)
            raise_all(folder, [*wrong.values(), *value_problems(right)])
        yield OpenAdapter(
            config,
            blocks,
            expected,
            data.get("checksums", {}),
            lambda key: file.get_tensor(names[key]),
        )


def tensor_forms(file: Any) -> tuple[dict[str, str], dict[str, tuple[tuple[int, ...], str]]]:
    """By key: the names in an open file, and the shapes and dtypes there."""
    names: dict[str, str] = {}
    for name in file.keys():  # noqa: SIM118
        names[name if key_of(name) in names else key_of(name)] = name
    found = {key: file.get_slice(name) for key, name in names.items()}
    return names, {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in found.items()}


def checked_blocks(
    geometry: Geometry,
    config: MiLoRAConfig,
    named: dict[str, list[str]] | None,
    where: str | os.PathLike,
) -> list[Block]:
    """The model's blocks for `config`, if they are those that the adapter was made for.

    Args:
        named: paths of the experts by block, as the adapter's file names them; None if it does not.
    Raises:
        milora.AdapterError: they are not.
    """
    try:
        blocks = geometry.blocks(config)
    except ValueError as error:
        raise AdapterError(f"{os.fspath(where)}: {error}") from None
    raise_all(where, _block_problems(config, blocks, named))
    return blocks


def key_of(name: str) -> str:
    """A tensor's key from its name in a file: PEFT before 0.21 writes bare ones with ".weight"."""
    bare = name.removesuffix(".weight")
    return bare if bare.endswith(BARE_TENSORS) else name


def expert_key(block: str, path: str, tensor: str) -> str:
    suffix = "" if tensor in BARE_TENSORS else ".weight"
    return f"{PREFIX}{block}.{path}.{tensor}{suffix}"


def router_key(block: str, tensor: str) -> str:
    return f"{PREFIX}{block}.{ROUTER_NAME}.{tensor}"


# ---- what must be there, and what is wrong ------------------------------------------------------


def tensor_keys(config: MiLoRAConfig, blocks: list[Block]) -> dict[str, dict[str, str]]:
    """By a module's whole path and a tensor's name: its key, and where experts share a tensor the
    key of the first of them.

    Raises:
        ValueError: a module cannot have an expert of this kind.
    """
    kind = get_kind(config.expert)
    common: dict[tuple[str, str], str] = {}
    found: dict[str, dict[str, str]] = {}
    for block in blocks:
        for path in block.experts:
            shape = linear_shape(block.module.get_submodule(path))
            spec = spec_of(config, block.path, path, shape)
            keys = {name: expert_key(block.path, path, name) for name in kind.tensors(spec)}
            for name, tag in kind.shared(spec).items():
                keys[name] = common.setdefault((name, tag), keys[name])
            found[f"{block.path}.{path}"] = keys
    return found


def expected_shapes(model: nn.Module, config: MiLoRAConfig, blocks: list[Block]) -> Shapes:
    """Keys and shapes of an adapter of `config` on `model`, which need not carry it."""
    kind = get_kind(config.expert)
    keys = tensor_keys(config, blocks)
    shapes: Shapes = {}
    for index, block in enumerate(blocks):
        for path in block.experts:
            shape = linear_shape(block.module.get_submodule(path))
            spec = spec_of(config, block.path, path, shape)
            for name, tensor_shape in kind.tensors(spec).items():
                shapes[keys[f"{block.path}.{path}"][name]] = tuple(tensor_shape)
        if config.router and block.experts:
            d = hidden_size(model, block.module)
            shapes[router_key(block.path, "w_r")] = (len(block.experts), d)
            if config.pooler == "self_attention" and block.source is None:
                shapes[router_key(block.path, "w_sa")] = (d,)
            if config.activation_of(index) == "rational":
                shapes[router_key(block.path, "theta")] = (NUM_COEFFICIENTS,)
    return shapes


def form_problems(
    expected: Shapes, forms: dict[str, tuple[tuple[int, ...], str]]
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


def value_problems(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [f"{key}: holds NaN or Inf" for key, t in tensors if not t.isfinite().all()]


def checksum_problem(path: str, made: str | None, said: str | None) -> list[str]:
    """Whether a module's frozen factors came out as its adapter was trained with."""
    if made == said:
        return []
    return [f"{path}: its frozen factors came out with checksum {made}, the file says {said}"]


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
