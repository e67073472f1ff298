"""Builds the drivers of tests/cuda_emulator and calls them: csrc's CUDA kernels, run on the CPU.

The kernels' own source, thread by thread: this shows that indices, fragments, barriers and copies
are right on a machine without a GPU. What it cannot see: the compiler, and time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from tolerance import assert_as_good_as_torch

from milora import reference

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SOURCES = TESTS / "cuda_emulator"
BUILD = ROOT / "build" / "cuda_emulator"
# Where the same sum stands twice, its bits must not depend on what is contracted around it.
FLAGS = ["-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-MMD"]
# A fiber's jump looks like a jump into a finished function.
FLAGS += ["-U_FORTIFY_SOURCE", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def is_current(target: Path) -> bool:
    """Whether it was built after the last change of what it is made of, as the compiler listed."""
    listed = target.with_suffix(".d")
    if not target.exists() or not listed.exists():
        return False
    names = listed.read_text().replace("\\\n", " ").split()[1:]
    made_of = [Path(__file__), *map(Path, names)]
    return all(p.exists() and p.stat().st_mtime < target.stat().st_mtime for p in made_of)


def compile_with(*arguments: object, target: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("the emulator needs a C++ compiler")
    # The emulator's folder first: its headers take the place of CUDA's and of csrc's.
    folders = [f"-I{SOURCES}", f"-I{ROOT / 'csrc'}"]
    began = time.time()
    done = subprocess.run(
        [compiler, *FLAGS, *folders, *arguments, "-o", target], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    os.utime(target, (began, began))  # a change during the build counts as one after it


@contextlib.contextmanager
def locked_build() -> Iterator[None]:
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_bytes(of_cpp, params: type[ctypes.Structure]) -> None:
    of_cpp.restype = c_int64
    assert of_cpp() == ctypes.sizeof(params), f"{params.__name__} is not what C++ has"


def library(name: str, params: type[ctypes.Structure]) -> ctypes.CDLL:
    """tests/cuda_emulator/<name>.cpp as a library, whose params_bytes() is the size of `params`."""
    target = BUILD / f"{name}.so"
    with locked_build():
        if not is_current(target):
            compile_with("-shared", SOURCES / f"{name}.cpp", target=target)
    built = ctypes.CDLL(str(target))
    check_bytes(built.params_bytes, params)
    return built


LAUNCH = re.compile(r"([A-Za-z_][\w:]*(?:<[^<>]*>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)


def with_calls(source: str) -> str:
    """CUDA's source with each kernel<<<configuration>>>(arguments) as a call of run_kernel."""
    out, at = [], 0
    while launch := LAUNCH.search(source, at):
        depth, end = 1, launch.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        kernel, configuration = launch.groups()
        arguments = source[launch.end() : end - 1]
        out += [source[at : launch.start()], "milora::emulator::run_kernel("]
        out.append(f"milora::emulator::key({kernel}), {configuration}, ")
        out.append(f"[&] {{ {kernel}({arguments}); }})")
        at = end
    return "".join(out) + source[at:]


def launches(*params: type[ctypes.Structure]) -> ctypes.CDLL:
    """All launches under csrc/, with tests/cuda_emulator/launches.cpp in front of them, for a GPU
    with two multiprocessors. Calls take `params`."""
    kernels = ROOT / "csrc" / "kernels"
    folder = BUILD / "launches"
    host = ["-DMILORA_CUDA", "-include", SOURCES / "host.h"]

    def compiled(source: Path) -> Path:
        target = folder / f"{'_'.join(source.relative_to(ROOT).with_suffix('').parts)}.o"
        written = target.with_suffix(".cpp")
        text = f'#line 1 "{source}"\n{with_calls(source.read_text())}'
        if not written.exists() or written.read_text() != text:
            written.write_text(text)
        if not is_current(target):
            compile_with(*host, "-c", written, target=target)
        return target

    with locked_build(), ThreadPoolExecutor(2) as compilers:
        folder.mkdir(exist_ok=True)
        sources = [SOURCES / "launches.cpp", *sorted(kernels.rglob("*.cu"))]
        objects = list(compilers.map(compiled, sources))
        target = folder / "launches.so"
        newest = max(path.stat().st_mtime for path in objects)
        if not target.exists() or target.stat().st_mtime < newest:
            compile_with("-shared", *objects, target=target)
    built = ctypes.CDLL(str(target))
    for one in params:
        check_bytes(getattr(built, f"bytes_of_{one.__name__}"), one)
    return built


def address(tensor: torch.Tensor | None) -> c_void_p | None:
    return None if tensor is None else c_void_p(tensor.data_ptr())


class PoolParams(ctypes.Structure):
    """GroupedLoraPoolParams, from the arguments of grouped_lora_ by name."""

    MAX_SLICES = 16
    _fields_ = [
        ("y", c_void_p * MAX_SLICES),
        ("y_stride", c_int64 * MAX_SLICES),
        ("d_out", c_int64 * MAX_SLICES),
        ("expert", c_int32 * MAX_SLICES),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("pool", c_void_p),
        ("pool_bytes", c_int64),
        *((name, c_void_p) for name in ("offsets", "ranks", "scales", "gates")),
        *((name, c_void_p) for name in ("route_of", "adapter_of")),
        *((f"num_{name}", c_int64) for name in ("tokens", "routes", "experts", "adapters")),
        ("num_slices", c_int64),
        ("d_in", c_int64),
        ("dtype", c_int32),
        ("rank_gates", c_void_p),
        ("max_rank", c_int64),
    ]

    def __init__(self, inputs: dict) -> None:
        x = inputs["x"]
        names = ("x", "pool", "offsets", "ranks", "scales", "gates", "route_of", "adapter_of")
        super().__init__(
            **{name: inputs[name].data_ptr() for name in names},
            x_stride=x.stride(0),
            pool_bytes=inputs["pool"].numel(),
            num_tokens=x.shape[0],
            num_routes=inputs["gates"].shape[0],
            num_experts=inputs["ranks"].shape[1],
            num_adapters=inputs["ranks"].shape[0],
            num_slices=len(inputs["y"]),
            d_in=x.shape[1],
            dtype=DTYPE_CODES[x.dtype],
        )
        if (rank_gates := inputs.get("rank_gates")) is not None:
            self.rank_gates, self.max_rank = rank_gates.data_ptr(), rank_gates.shape[2]
        for s, y in enumerate(inputs["y"]):
            self.y[s], self.y_stride[s], self.d_out[s] = y.data_ptr(), y.stride(0), y.shape[1]
            self.expert[s] = inputs["experts"][s]


def assert_as_reference(actual: list[torch.Tensor], inputs: dict) -> None:
    """y after grouped_lora_'s kernels against that of the reference, from the same inputs."""
    dtype = inputs["x"].dtype
    expected = [t.double() for t in inputs["y"]]
    reference.grouped_lora_(
        **{**inputs, "y": expected, "x": inputs["x"].double()}, pool_dtype=dtype
    )
    same_dtype = [t.clone() for t in inputs["y"]]
    reference.grouped_lora_(**{**inputs, "y": same_dtype})
    for s, got in enumerate(actual):
        assert_as_good_as_torch(got, expected[s], same_dtype[s], f"y[{s}]")
