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
        *(compiler, "-std=c++20", "-O2", "-fPIC", "-shared", "-mf16c", "-mfma"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *(f"-I{SOURCES}", f"-I{ROOT / 'csrc'}", SOURCES / f"{name}.cpp", "-o", library),
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


class PoolArguments(ctypes.Structure):
    """tests/cuda_emulator/pool_arguments.h, from the arguments of grouped_lora_ by name."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("sizes", "y", "y_stride", "d_out", "experts", "x", "pool", "offsets", "ranks"),
            *("scales", "gates", "route_of", "adapter_of", "rank_gates"),
        )
    ]

    def __init__(self, inputs: dict) -> None:
        x, y, gates = inputs["x"], inputs["y"], inputs["gates"]
        sizes = (len(x), *gates.shape, inputs["ranks"].shape[0], len(y), x.shape[1], x.stride(0))
        rank_gates = inputs.get("rank_gates")
        sizes += (inputs["pool"].numel(), DTYPE_CODES[x.dtype])
        sizes += (0 if rank_gates is None else rank_gates.shape[2],)
        lists = {
            "sizes": sizes,
            "y": [t.data_ptr() for t in y],
            "y_stride": [t.stride(0) for t in y],
            "d_out": [t.shape[1] for t in y],
            "experts": inputs["experts"],
        }
        self.kept = {name: (ctypes.c_int64 * len(v))(*v) for name, v in lists.items()}
        pointers = {name: ctypes.addressof(array) for name, array in self.kept.items()}
        for name, _ in self._fields_:
            if name not in lists and inputs.get(name) is not None:
                pointers[name] = inputs[name].data_ptr()
        super().__init__(**pointers)


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
