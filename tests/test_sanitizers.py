"""The CPU kernels under AddressSanitizer and UBSan: nothing outside of a tensor is read or written.

A second library is built with MILORA_SANITIZE (about a minute on two cores the first time, kept
under build/), and the tests of the ops run with it in a process of their own, in which every
tensor's memory has guards on both sides. What the sanitizers cannot see, guard pages show.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import milora

pytestmark = pytest.mark.timeout(900)  # compiling takes its time on a machine that is busy

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BUILD = ROOT / "build" / "sanitize"
PACKAGE = BUILD / "package" / "milora"
LIBRARY = PACKAGE / "lib" / "libmilora_ops.so"
# opcheck and gradcheck run plain torch for most of their time.
TESTED = ["test_op_edges.py", "test_grouped_lora.py", "test_cores.py", "test_prompt_router.py"]
SELECTED = "not opcheck and not gradcheck"


def runtimes() -> list[str]:
    """The sanitizers' libraries, to be loaded before Python's own; empty where there are none."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return []
    found = []
    # libstdc++ beside it: ASan looks for __cxa_throw when it starts, before torch brings it.
    for name in ("libasan.so", "libstdc++.so"):
        command = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path):  # a compiler that has no such file repeats the bare name
            return []
        found.append(os.path.realpath(path))
    return found


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Build the library, and a package folder around it; how a process is run with it."""
    preload = runtimes()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tools = {name: shutil.which(name, path=path) for name in ("cmake", "ninja")}
    if not preload or None in tools.values():
        pytest.skip(f"needs GCC with libasan, cmake and ninja; found {preload}, {tools}")
    pybind11 = pytest.importorskip("pybind11")
    PACKAGE.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for source in (ROOT / "milora").iterdir():
            if source.name not in ("lib", "__pycache__"):
                link = PACKAGE / source.name
                link.unlink(missing_ok=True)
                link.symlink_to(source)
        configure = [
            tools["cmake"], "-GNinja", "-S", ROOT, "-B", BUILD, "-DMILORA_SANITIZE=ON",
            # Fast enough, and half the time to compile; asserts stay as they are.
            "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1",
            f"-DMILORA_VERSION={milora.__version__}", f"-DMILORA_OUTPUT_DIR={PACKAGE}",
            f"-DTORCH_DIR={Path(torch.__file__).parent}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        for command in (configure, [tools["cmake"], "--build", BUILD, "--target", "milora_ops"]):
            done = subprocess.run(
                command, env={**os.environ, "PATH": path}, capture_output=True, text=True
            )
            assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        # Python frees little at its end, so leaks say nothing. Deep stacks of every allocation
        # would take most of the time.
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=2:quarantine_size_mb=16",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(TESTS)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run(environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=BUILD, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def report_in(output: str) -> str:
    """Where a sanitizer speaks, from there on; otherwise how pytest ended."""
    found = re.search(r"==\d+==ERROR: AddressSanitizer|\S+: runtime error:", output)
    return output[found.start() :][:6000] if found else output[-6000:]


def test_the_sanitizers_are_on(environment):
    """A process that writes one byte too far is ended, and the library is built to say so."""
    compiled = LIBRARY.read_bytes()
    assert b"__asan_report_load" in compiled and b"__ubsan_handle" in compiled
    code = "import ctypes, torch; t = torch.zeros(24, dtype=torch.uint8); "
    assert run(environment, "-c", code + "ctypes.memset(t.data_ptr(), 0, 24)")[0] == 0
    status, output = run(environment, "-c", code + "ctypes.memset(t.data_ptr(), 0, 25)")
    assert status != 0 and "heap-buffer-overflow" in output, output[-2000:]


def test_ops_stay_inside_their_tensors(environment):
    files = [str(TESTS / name) for name in TESTED]
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-k", SELECTED]
    status, output = run(environment, "-m", "pytest", *options, *files)
    assert status == 0, report_in(output)
    passed = int(re.search(r"(\d+) passed", output)[1])
    assert passed > 500, output[-6000:]  # skipped: what needs a GPU or another CPU


def test_the_process_uses_the_sanitized_library(environment):
    code = "import milora; print(milora._build.LIBRARY_PATH)"
    status, output = run(environment, "-c", code)
    assert status == 0 and output.strip().splitlines()[-1] == str(LIBRARY)


def test_no_byte_beside_a_tensor_is_touched():
    """The ordinary library, on tensors beside pages that nobody may read; see guard_pages.py."""
    command = [sys.executable, str(TESTS / "guard_pages.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert int(done.stdout.split()[-1]) > 500
    fault = subprocess.run([*command, "--fault"], capture_output=True, text=True)
    assert fault.returncode < 0 and "Fatal Python error" in fault.stderr
