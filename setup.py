"""Builds the two libraries with CMake; everything else about the package stands in pyproject.toml.

MILORA_CUDA=1 or 0 forces the CUDA kernels on or off; without it they are compiled when torch sees a
GPU. CMAKE_ARGS adds arguments, e.g. CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=90a-real".
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    scope: dict[str, str] = {}
    exec((ROOT / "milora/_version.py").read_text(), scope)
    return scope["__version__"]


def package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"milora: building needs {name}; install it and use pip --no-build-isolation")
    return Path(spec.origin).parent


def wants_cuda() -> bool:
    choice = os.environ.get("MILORA_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"milora: MILORA_CUDA must be 0 or 1, got {choice!r}")
    if choice:
        return choice == "1"
    import torch

    return torch.cuda.is_available()


class CMakeBuild(build_ext):
    def run(self) -> None:
        output = ROOT / "milora" if self.inplace else Path(self.build_lib).resolve() / "milora"
        build = ROOT / "build" / ("cuda" if wants_cuda() else "cpu")
        args = [
            f"-DMILORA_VERSION={read_version()}",
            f"-DMILORA_OUTPUT_DIR={output}",
            f"-DMILORA_CUDA={'ON' if wants_cuda() else 'OFF'}",
            f"-DTORCH_DIR={package_dir('torch')}",
            f"-Dpybind11_DIR={package_dir('pybind11') / 'share/cmake/pybind11'}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(["cmake", "-GNinja", "-S", ROOT, "-B", build, *args, *extra], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


setup(ext_modules=[Extension("milora._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
