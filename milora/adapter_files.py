"""The two files of an adapter's folder: written so that a crash leaves no mixture, read as hostile.

`adapter_model.safetensors` holds the tensors in PEFT's key layout; `adapter_config.json` is written
last and holds the sha256 of the weights. A folder without its config holds no adapter. Nothing here
knows of models.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from milora._version import __version__
from milora.config import FORMAT_VERSION
from milora.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_TYPE = "MILORA"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # and their names
# A config names every expert of every block; 1000 blocks of 50 experts take about 2 MiB.
MAX_CONFIG_BYTES = 64 << 20


def write_folder(folder: str | os.PathLike, tensors: dict[str, Tensor], config: dict) -> None:
    """Write weights and config so that a reader sees the old adapter, none, or the new one.

    A save that is killed may leave a hidden `.tmp` file behind, which nobody reads.

    Args:
        tensors: contiguous, on the CPU.
        config: a MiLoRA config gets the weights' `sha256`; a LoRA's has no place for it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, target = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    weights_tmp, target_tmp = _temporary(weights), _temporary(target)
    try:
        save_file(tensors, weights_tmp, metadata={"format": "pt"})
        if config["peft_type"] == PEFT_TYPE:
            config = {**config, "sha256": sha256_of(weights_tmp)}
        target_tmp.write_text(_as_json(config), encoding="utf-8")
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


def write_config(folder: str | os.PathLike, config: dict) -> None:
    """Replace the config alone, for weights that another writer has just put beside it."""
    target = Path(folder) / CONFIG_FILE
    temporary = _temporary(target)
    try:
        temporary.write_text(_as_json(config), encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
        with open(path, "rb") as file:
            payload = file.read(MAX_CONFIG_BYTES + 1)
        if len(payload) > MAX_CONFIG_BYTES:
            raise AdapterError(f"{path}: is larger than {MAX_CONFIG_BYTES} bytes")
        data = json.loads(payload.decode("utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: not valid JSON: {error}") from None
    kind = data.get("peft_type") if isinstance(data, dict) else type(data).__name__
    if not isinstance(data, dict) or kind not in (PEFT_TYPE, "LORA"):
        raise AdapterError(f"{path}: peft_type must be {PEFT_TYPE} or LORA, got {kind!r}")
    version = data.get("format_version")
    if kind == PEFT_TYPE and (type(version) is not int or version != FORMAT_VERSION):
        raise AdapterError(
            f"{path}: format_version {version!r} cannot be read by milora {__version__}, which "
            f"reads {FORMAT_VERSION}"
        )
    if kind == PEFT_TYPE and (problems := _meta_problems(data)):
        raise AdapterError(f"{path}: {'; '.join(problems)}")
    return data


def _meta_problems(data: dict[str, Any]) -> list[str]:
    """What is wrong with the entries that describe the files and not the adapter's options."""
    problems = []
    experts, checksums = data.get("experts"), data.get("checksums")
    if not isinstance(experts, dict) or not all(
        isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        for paths in experts.values()
    ):
        problems.append("experts must map each block to a list of paths")
    if not isinstance(checksums, dict) or not all(isinstance(s, str) for s in checksums.values()):
        problems.append("checksums must map paths to strings")
    if not isinstance(data.get("sha256"), str):
        problems.append(f"sha256 must be a string, got {data.get('sha256')!r}")
    return problems


@contextlib.contextmanager
def open_weights(folder: str | os.PathLike, sha256: str | None) -> Iterator[OpenWeights]:
    """Open a folder's weights, their sum checked where one is given. Yields: `OpenWeights`.

    Only the header is read until a tensor is asked for. Other formats (a pickled
    `adapter_model.bin`) are never read.

    Raises:
        milora.AdapterError: the file is missing, damaged, or was replaced while it was read.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(f"{os.fspath(folder)}: {WEIGHTS_FILE} is missing")
    try:
        # Held open, so that its inode cannot be given to the file of a save that comes in between.
        with open(path, "rb") as held:
            if sha256 is not None and _digest(held) != sha256:
                raise AdapterError(
                    f"{path}: its sha256 is not the one in {CONFIG_FILE}; the file is damaged, or "
                    "a save is replacing it"
                )
            with safe_open(path, framework="pt") as file:
                yield OpenWeights(path, held, file)
            if not os.path.samestat(os.fstat(held.fileno()), os.stat(path)):
                raise AdapterError(f"{path}: was replaced while it was read; load it again")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a readable safetensors file: {error}") from None


class OpenWeights:
    """The tensors of an open safetensors file, each read into memory of its own.

    safetensors checks the header. Its own reading maps the file: the process would die (SIGBUS) if
    somebody cut the file off meanwhile, and version 0.8 leaks two integers with each tensor.

    Args:
        held: the open file.  checked: the same file, opened by safetensors.
    Raises:
        milora.AdapterError: the file was changed since it was opened.
    """

    def __init__(self, path: Path, held: Any, checked: Any):
        self._path, self._held, self._checked = path, held, checked
        held.seek(0)
        length = int.from_bytes(held.read(8), "little")
        try:
            self._header = json.loads(held.read(length))
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{path}: not a readable safetensors file: {error}") from None
        self._start = 8 + length

    def keys(self) -> list[str]:
        return self._checked.keys()

    def get_slice(self, name: str) -> Any:
        """What knows the tensor's `get_shape()` and `get_dtype()`."""
        return self._checked.get_slice(name)

    def get_tensor(self, name: str) -> Tensor:
        """A float32, bfloat16 or float16 tensor, on the CPU."""
        form = self.get_slice(name)
        shape, dtype = form.get_shape(), FLOATS[form.get_dtype()]
        data = bytearray(math.prod(shape) * dtype.itemsize)
        try:
            begin, end = self._header[name]["data_offsets"]
            self._held.seek(self._start + begin)
            if end - begin != len(data) or self._held.readinto(data) != len(data):
                raise ValueError(f"{name} has not the {len(data)} bytes that it should have")
        except (LookupError, TypeError, ValueError, OSError) as error:
            raise AdapterError(f"{self._path}: was changed while it was read: {error}") from None
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(shape)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _as_json(config: dict) -> str:
    # Not sorted: of the patterns in rank_pattern and alpha_pattern the first that matches wins.
    return json.dumps(config, indent=2, allow_nan=False) + "\n"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
