"""Finds and loads the op library, checks that it belongs to this package, and describes the build.

The library registers its ops with torch when it is opened; importing `milora.ops` opens it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from milora._version import __version__

LIBRARY_PATH = Path(__file__).parent / "lib" / "libmilora_ops.so"
REBUILD = "run `pip install --no-build-isolation .` in milora's source folder"

_library: ctypes.CDLL | None = None


def load_library(path: Path = LIBRARY_PATH) -> ctypes.CDLL:
    """Open the op library once per process.

    Raises: ImportError, in one sentence, if it is missing, cannot be opened, or is of another
    version, or if MILORA_CPU_ISA names an instruction set that this CPU does not have.
    """
    global _library
    if _library is not None:
        return _library
    if not path.is_file():
        raise ImportError(f"milora's compiled library {path} does not exist; {REBUILD}")
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
        library.milora_version.restype = ctypes.c_char_p
        library.milora_cuda_archs.restype = ctypes.c_char_p
        found = library.milora_version().decode()
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"milora's compiled library {path} cannot be used with torch {torch.__version__} "
            f"({error}); {REBUILD}"
        ) from error
    if found != __version__:
        raise ImportError(
            f"milora's compiled library {path} is of version {found}, but the package is "
            f"{__version__}; {REBUILD}"
        )
    library.milora_cpu_isa.restype = ctypes.c_char_p
    library.milora_cpu_isa.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p)]
    library.milora_cpu_isas.restype = ctypes.c_char_p
    library.milora_grouped_lora_run.restype = ctypes.c_char_p
    library.milora_grouped_lora_run.argtypes = [ctypes.c_void_p] * 2
    try:
        _select_isa(library, None)
    except ValueError as error:
        raise ImportError(str(error)) from None
    _library = library
    return library


def _select_isa(library: ctypes.CDLL, name: str | None) -> str:
    message = ctypes.c_char_p()
    chosen = library.milora_cpu_isa(name.encode() if name else None, ctypes.byref(message))
    if chosen is None:
        raise ValueError((message.value or b"").decode())
    return chosen.decode()


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: baseline, avx2, avx512 or avx512_bf16."""
    return _select_isa(load_library(), None)


def cpu_isas() -> list[str]:
    """The instruction sets that this CPU can run, best last."""
    return load_library().milora_cpu_isas().decode().split(", ")


def set_cpu_isa(name: str) -> None:
    """Switch the CPU kernels of this process. For tests and benches; users set MILORA_CPU_ISA.

    Raises: ValueError, with the possible names, if this CPU cannot run it.
    """
    _select_isa(load_library(), name)


def cuda_archs() -> list[str]:
    """The GPU architectures that the library has kernels for; empty in a CPU build."""
    return load_library().milora_cuda_archs().decode().split()


def build_info() -> dict[str, Any]:
    """What was compiled and what is in use.

    Returns: version, cxx_compiler, cpu_isas (compiled), cpu_isa (in use), cuda (bool),
    cuda_compiler, cuda_archs, library (path), torch.
    Raises: ImportError if the pybind11 module was not built for this Python.
    """
    from milora import _native

    info: dict[str, Any] = dict(_native.build_info())
    archs = cuda_archs()
    info.update(cpu_isa=cpu_isa(), cuda=bool(archs), cuda_archs=archs)
    info.update(library=str(LIBRARY_PATH), torch=torch.__version__)
    return info
