"""The CUDA build, without a GPU: no spills, the meant instructions, small enough to build.

The first run compiles every kernel for the architectures of CMakeLists.txt (minutes on two cores,
kept under build/); later runs compile what changed. Nothing here says how fast a kernel is.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from milora._version import __version__

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BUILD = ROOT / "build" / "cuda-check"
ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120")

# Two cores for ten minutes, and two compilers at a time in 20 GB.
MAX_CPU_SECONDS = 2 * 600
MAX_PEAK_BYTES = 10 * 2**30
MAX_LIBRARY_BYTES = 16 * 2**20

# Kernel (searched in the demangled name), architecture, instruction, how often at least.
INSTRUCTIONS = [
    # Decode: weights arrive by the copy engine, or by 16-byte loads: 4 in flight for each of the
    # codes for 1, 2 and 4 rows, and one for 8.
    *(
        ("decode_cluster_kernel", arch, instruction, count)
        for arch in ("sm_90a", "sm_100")
        for instruction, count in ((r"UBLKCP", 1), (r"UCGABAR_ARV", 2))
    ),
    *(
        (f"decode_split_kernel<.*, {expands}>", arch, r"LDG\.E\.128\.CONSTANT", 13)
        for expands in ("false", "true")
        for arch in ("sm_80", "sm_120")
    ),
    # Router: all vectors of a group of tokens at once.
    *(
        (f"router_pool_kernel<.*, {each}>", arch, r"LDG\.E\.128", loads)
        for each, loads in ((1, 8), (2, 16), (4, 16), (8, 16))
        for arch in ARCHS
    ),
    ("router_dots_kernel<.*, [48]>", "sm_90a", r"LDG\.E\.128", 3),
    ("router_scatter_kernel<.*, [48]>", "sm_90a", r"STG\.E\.128", 2),
    # Prefill: tensor cores behind asynchronous 16-byte copies.
    *(
        (f"{name}_kernel<({types})", arch, instruction, 1)
        for name in ("shrink", "expand")
        for types in ("__nv_bfloat16|__half",)
        for arch in ARCHS
        for instruction in (r"HMMA", r"LDGSTS\.E\..*128")
    ),
    # Prefill by wgmma: four products for each width of the sums, x and y by tensor copies.
    ("shrink_wgmma_kernel", "sm_90a", r"HGMMA", 16),
    ("shrink_wgmma_kernel", "sm_90a", r"UTMALDG", 4),
    ("expand_wgmma_kernel", "sm_90a", r"HGMMA", 10),
    ("expand_wgmma_kernel", "sm_90a", r"UTMALDG", 1),
    ("expand_wgmma_kernel", "sm_90a", r"UTMASTG", 1),
    # Fused base + LoRA: tensor copies and the warpgroup's matrix instruction.
    ("fused_kernel", "sm_90a", r"HGMMA", 1),
    ("fused_kernel", "sm_90a", r"UTMALDG", 1),
]


def find_tool(name: str) -> str | None:
    """A CUDA program on PATH, beside nvcc, or in the PyPI packages nvidia-cuda-*."""
    nvcc = shutil.which("nvcc")
    folders = [Path(os.path.realpath(nvcc)).parent] if nvcc else []
    for package in ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"):
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        folders += [Path(file.locate()).parent for file in files if Path(file).name == name]
    path = os.pathsep.join([*os.environ["PATH"].split(os.pathsep), *map(str, folders)])
    return shutil.which(name, path=path)


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    """Compile and link the library; the object files of the kernels, each with a .json beside."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tools = {name: shutil.which(name, path=path) for name in ("nvcc", "cmake", "ninja")}
    if None in tools.values():
        pytest.skip(f"needs nvcc, cmake and ninja; found {tools}")
    if "CUTLASS_PATH" not in os.environ:
        try:
            metadata.distribution("nvidia-cutlass")
        except metadata.PackageNotFoundError:
            pytest.skip("needs CUTLASS: pip install nvidia-cutlass==4.2.0.0, or set CUTLASS_PATH")
    pybind11 = pytest.importorskip("pybind11")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        launcher = f"{sys.executable};{TESTS / 'compiler_log.py'}"
        configure = [
            tools["cmake"], "-GNinja", "-S", ROOT, "-B", BUILD, "-DMILORA_CUDA=1",
            f"-DCMAKE_CUDA_COMPILER_LAUNCHER={launcher}", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
            f"-DMILORA_VERSION={__version__}", f"-DMILORA_OUTPUT_DIR={BUILD / 'package'}",
            f"-DTORCH_DIR={Path(torch.__file__).parent}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        build = [tools["cmake"], "--build", BUILD, "--target", "milora_ops", "--parallel", "2"]
        for command in (configure, build):
            done = subprocess.run(
                command, env={**os.environ, "PATH": path}, capture_output=True, text=True
            )
            assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    # Those of this configuration: an object of a file that is gone may still lie there.
    listed = subprocess.run(
        [tools["ninja"], "-C", BUILD, "-t", "targets", "all"], capture_output=True, text=True
    ).stdout
    found = [BUILD / name for name in re.findall(r"^(\S+\.cu\.o):", listed, re.MULTILINE)]
    assert found
    return found


def record_of(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".json").read_text())


def test_no_kernel_spills(objects):
    """Every entry function, for every architecture, in the compiler's report."""
    seen, spilled = 0, []
    report = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'(?:(?!Compiling entry).)*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads",
        re.DOTALL,
    )
    for path in objects:
        for name, arch, stores, loads in report.findall(record_of(path)["output"]):
            seen += 1
            if (stores, loads) != ("0", "0"):
                spilled.append(f"{path.name}, {arch}: {name}: {stores} + {loads} bytes")
    assert seen > 20
    assert not spilled, "\n".join(spilled)


def test_no_wgmma_waits_for_the_one_before(objects):
    """The compiler says so where it had to put a wait behind every product."""
    said = [line for path in objects for line in record_of(path)["output"].splitlines()]
    assert not [line for line in said if "wgmma" in line and "serialized" in line]


def test_the_build_fits_a_small_machine(objects):
    assert (BUILD / "package" / "lib" / "libmilora_ops.so").stat().st_size < MAX_LIBRARY_BYTES
    records = [record_of(path) for path in objects]
    assert sum(record["cpu_seconds"] for record in records) < MAX_CPU_SECONDS
    assert max(record["peak_bytes"] for record in records) < MAX_PEAK_BYTES


def test_the_library_loads_beside_a_torch_without_cuda(objects, tmp_path):
    """In a package folder of its own, since this process has opened the installed library."""
    package = tmp_path / "milora"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("_build.py", "_version.py", "ops.py"):
        shutil.copy(ROOT / "milora" / name, package / name)
    (package / "lib").symlink_to(BUILD / "package" / "lib")
    code = "from milora import _build, ops; print(*_build.cuda_archs())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{arch.removeprefix('sm_')}-real" for arch in ARCHS]


@pytest.mark.parametrize("archs", ["90-real", "80", "90a-real;native"])
def test_architectures_that_would_lack_instructions_are_refused(archs, tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        pytest.skip("needs cmake")
    options = ["-DMILORA_BENCH=ON", "-DMILORA_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={archs}"]
    done = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path, *options], capture_output=True, text=True
    )
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert f"90a-real for 9.0, got '{archs.split(';')[-1]}'" in message


@pytest.fixture(scope="module")
def sass(objects) -> dict[tuple[str, str], list[str]]:
    """(architecture, demangled kernel) -> its instructions."""
    tools = {name: find_tool(name) for name in ("cuobjdump", "nvdisasm")}
    if None in tools.values():
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    folders = {str(Path(tool).parent) for tool in tools.values()}
    env = {**os.environ, "PATH": os.pathsep.join([*folders, os.environ["PATH"]])}
    found: dict[tuple[str, str], list[str]] = {}
    for path in objects:
        dump = subprocess.run(
            [tools["cuobjdump"], "--dump-sass", path], env=env, capture_output=True, text=True
        )
        assert dump.returncode == 0, dump.stderr
        demangled = subprocess.run(["c++filt"], input=dump.stdout, capture_output=True, text=True)
        arch = kernel = ""
        for line in demangled.stdout.splitlines():
            if match := re.search(r"code for (sm_\w+)", line):
                arch = match[1]
            elif match := re.search(r"Function : (.*)", line):
                kernel = match[1]
                found[arch, kernel] = []
            elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
                found[arch, kernel].append(match[1])
    return found


@pytest.mark.parametrize(
    "kernel, arch, instruction, count", INSTRUCTIONS, ids=lambda value: str(value)
)
def test_kernels_use_the_instructions_that_were_meant(sass, kernel, arch, instruction, count):
    chosen = {
        name: code for (of, name), code in sass.items() if of == arch and re.search(kernel, name)
    }
    assert chosen, f"no kernel {kernel} for {arch}"
    for name, code in chosen.items():
        found = sum(re.match(instruction, opcode) is not None for opcode in code)
        assert found >= count, f"{name} for {arch}: {found} x {instruction}, not {count}"


def test_no_kernel_uses_local_memory(sass):
    """An array indexed at run time would live there, and so would spills."""
    local = {
        f"{arch}: {name}"
        for (arch, name), code in sass.items()
        if any(opcode.startswith(("LDL", "STL")) for opcode in code)
    }
    assert not local, "\n".join(sorted(local))
