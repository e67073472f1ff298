"""Building the CUDA emulator's libraries and calling them: kernels of csrc/ run on the CPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SOURCES = TESTS / "cuda_emulator"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def build(name: str, folder: Path) -> ctypes.CDLL:
    """Compile tests/cuda_emulator/<name>.cpp; skips where g++ or x86 is missing."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None or os.uname().machine != "x86_64":
        pytest.skip("the emulator needs a C++ compiler on x86-64")
    library = folder / f"lib{name}.so"
    command = [
        *(compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-mf16c", "-mfma"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *(f"-I{SOURCES}", f"-I{ROOT / 'csrc'}", SOURCES / f"{name}.cpp", "-o", library),
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def integers(values) -> ctypes.Array:
    values = list(values)
    return (ctypes.c_int64 * max(len(values), 1))(*values)
