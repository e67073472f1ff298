"""The compiled part: build info, choice of instruction set, and what a broken installation says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import milora
from milora import _build
from milora._version import __version__

PACKAGE = Path(milora.__file__).parent


def python(code: str, cwd: Path | str = ".", **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        timeout=120,
    )


def test_build_info():
    info = _build.build_info()
    assert info["version"] == __version__
    assert info["cpu_isa"] in info["cpu_isas"]
    assert info["cuda"] == (info["cuda_compiler"] is not None) == bool(info["cuda_archs"])


def test_best_isa_is_the_default():
    code = "from milora import _build; print(_build.cpu_isa(), _build.cpu_isas()[-1])"
    result = python(code, MILORA_CPU_ISA="")
    chosen, best = result.stdout.split()
    assert chosen == best


def test_isa_from_the_environment():
    code = "from milora import _build; print(_build.cpu_isa())"
    for isa in _build.cpu_isas():
        assert python(code, MILORA_CPU_ISA=isa).stdout.strip() == isa


def test_unknown_isa_names_the_possible_ones():
    names = ", ".join(_build.cpu_isas())
    message = f"MILORA_CPU_ISA: must be one of {names} on this CPU, got 'avx9'"
    with pytest.raises(ValueError, match=message):
        _build.set_cpu_isa("avx9")
    result = python("import milora.ops", MILORA_CPU_ISA="avx9")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == f"ImportError: {message}"


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """The loader and the ops in a folder of their own, without the library."""
    copy = tmp_path / "milora"
    copy.mkdir()
    (copy / "__init__.py").write_text("")
    for name in ("_build.py", "_version.py", "ops.py"):
        shutil.copy(PACKAGE / name, copy / name)
    return copy


def import_error(package: Path) -> str:
    result = python("import milora.ops", cwd=package.parent)
    assert result.returncode == 1, result.stdout
    return result.stderr.strip().splitlines()[-1]


def test_missing_library(package_copy):
    error = import_error(package_copy)
    assert error.startswith("ImportError: milora's compiled library ")
    assert "does not exist; run `pip install" in error


def test_library_that_is_none(package_copy):
    (package_copy / "lib").mkdir()
    (package_copy / "lib/libmilora_ops.so").write_text("not a library")
    error = import_error(package_copy)
    assert "cannot be used with torch" in error and "; run `pip install" in error


def test_library_of_another_version(package_copy):
    (package_copy / "lib").mkdir()
    shutil.copy(_build.LIBRARY_PATH, package_copy / "lib")
    (package_copy / "_version.py").write_text('__version__ = "99.0"\n')
    error = import_error(package_copy)
    assert f"is of version {__version__}, but the package is 99.0; run `pip install" in error


def test_library_needs_only_torch_cpu_and_system_libraries():
    """One build serves CPU and GPU installs: it must not depend on libtorch_cuda or libcudart."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf on this machine")
    dynamic = subprocess.run(
        ["readelf", "-d", _build.LIBRARY_PATH], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split("[")[1].split("]")[0] for line in dynamic.splitlines() if "NEEDED" in line}
    system = ("libstdc++", "libm.", "libgcc_s", "libc.", "ld-linux", "libdl", "librt", "libpthread")
    foreign = {name for name in needed if not name.startswith(system)}
    assert foreign <= {"libtorch_cpu.so", "libc10.so"}
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic


def test_ops_are_registered_for_cpu_and_cuda():
    for name in ("grouped_lora_", "grouped_lora", "prompt_router"):
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"milora::{name}", key)
