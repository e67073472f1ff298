"""Builds the two libraries with CMake; everything else about the package stands in pyproject.toml.

MILORA_CUDA=1 or 0 forces the CUDA kernels on or off; without it they are compiled when torch sees a
GPU. CMAKE_ARGS adds arguments, e.g. CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=90a-real".
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def run(self) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            sys.exit(f"milora: {error}; install it first, then use pip --no-build-isolation")
        choice = os.environ.get("MILORA_CUDA") or str(int(torch.cuda.is_available()))
        if choice not in ("0", "1"):
            sys.exit(f"milora: MILORA_CUDA must be 0 or 1, got {choice!r}")

        build = ROOT / "build" / ("cuda" if choice == "1" else "cpu")
        output = ROOT / "milora" if self.inplace else Path(self.build_lib).resolve() / "milora"
        args = [
            f"-DMILORA_VERSION={self.distribution.get_version()}",
            f"-DMILORA_OUTPUT_DIR={output}",
            f"-DMILORA_CUDA={choice}",
            f"-DTORCH_DIR={Path(torch.__file__).parent}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        # The cmake and ninja of this environment come before those of the system.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        env = {**os.environ, "PATH": path}
        cmake = shutil.which("cmake", path=path) or "cmake"
        subprocess.run([cmake, "-GNinja", "-S", ROOT, "-B", build, *args], check=True, env=env)
        subprocess.run([cmake, "--build", build], check=True, env=env)


setup(ext_modules=[Extension("milora._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
