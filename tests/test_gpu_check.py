"""bench/gpu_check.sh on a machine without a GPU: its stages, and what it does with what fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from test_bench_gpu import CHECK, ROOT, WITHOUT_NATIVE, run

from milora import _build

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
STAGES = ["load", "test", "quick", "model", "memcheck", "racecheck", "initcheck",
          "memcheck_variants", "racecheck_variants", "initcheck_variants",
          "g1", "g2", "g3", "g4", "g5", "pool", "train", "cpp", "report"]  # fmt: skip


@pytest.fixture
def fake(tmp_path):
    """Makes a program of a shell script that writes its arguments into `<name>.log`."""

    def make(name: str, script: str = "") -> Path:
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho "$@" >>"{path}.log"\n{script}\n')
        path.chmod(0o755)
        return path

    return make


def calls_of(program: Path) -> list[str]:
    return Path(f"{program}.log").read_text().splitlines()


def lists(name: str) -> list[str]:
    (found,) = re.findall(rf"^{name}=\((.*?)\)", CHECK.read_text(), re.DOTALL | re.MULTILINE)
    return found.split()


FILES = [*lists("ops_tests"), *lists("variants")]


def test_the_scripts_stages(tmp_path):
    assert run("bash", "-n", CHECK).returncode == 0
    assert run("bash", CHECK, "--list").stdout.split() == STAGES
    text = CHECK.read_text()
    assert all(f"stage_{stage}()" in text for stage in STAGES)
    wrong = run("bash", CHECK, "load", "g9", OUT=str(tmp_path))
    assert wrong.returncode == 2 and "no stage is called g9" in wrong.stderr
    assert "== load" not in wrong.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_nothing_follows_a_load_that_fails(tmp_path):
    done = run("bash", CHECK, "load", "test", "g1", OUT=str(tmp_path), PYTHON=sys.executable)
    assert done.returncode == 1
    assert "torch sees no GPU" in done.stderr and "== load: FAILED" in done.stdout
    assert done.stdout.endswith("failed: load\nnot run: test g1\n")


@pytest.mark.skipif(bool(_build.cuda_archs()), reason="is about libraries without CUDA")
def test_nothing_follows_a_library_without_cuda(tmp_path, fake):
    seeing = f'exec {sys.executable} -c "import torch; torch.cuda.is_available = lambda: True; $2"'
    answers = f"*EXT_SUFFIX*) echo {SUFFIX} ;; *cuda_archs*) {seeing} ;;"
    python = fake("python", f'case "$*" in {answers} esac')
    done = run("bash", CHECK, "load", "g1", OUT=str(tmp_path), PYTHON=str(python))
    assert done.returncode == 1 and "was built without CUDA" in done.stderr
    assert done.stdout.endswith("failed: load\nnot run: g1\n")


def test_load_says_what_is_absent(tmp_path, fake):
    answers = f"*EXT_SUFFIX*) echo {SUFFIX} ;; *find_spec*xdist) exit 1 ;;"
    python = fake("python", f'case "$*" in {answers} esac')
    done = run("bash", CHECK, "load", OUT=str(tmp_path), PYTHON=str(python))
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    assert "absent: xdist\n" in done.stdout and "absent: peft" not in done.stdout
    places = {"bench/peers/unpacked": "no engines", "build/bench-cuda": "no stage cpp"}
    for place, what in places.items():
        line = f"absent: {place}, so {what}"
        assert (line in done.stdout) != any((ROOT / place).glob("**/*"))


def test_no_stage_outlasts_the_deadline(tmp_path, fake):
    python = fake("python", "echo limit $STAGE_SECONDS")
    where = {"OUT": str(tmp_path), "PYTHON": str(python)}
    late = run("bash", CHECK, "model", "g1", DEADLINE="19", **where)
    assert late.returncode == 1 and late.stdout == "not run: model g1\n"
    for deadline, allowed in (("30", {29, 30}), ("1000", {480}), ("", {480})):
        done = run("bash", CHECK, "model", DEADLINE=deadline, **where)
        assert done.returncode == 0, done.stdout
        assert int(re.search(r"limit (\d+)", done.stdout)[1]) in allowed
    slow = fake("slow", "exec sleep 60")
    stopped = run("bash", CHECK, "model", LIMIT="1", OUT=str(tmp_path), PYTHON=str(slow))
    assert stopped.returncode == 1 and "stopped after 1 s" in stopped.stdout


@pytest.mark.parametrize("xdist", [True, False])
def test_what_fails_takes_no_other_file_along(xdist, tmp_path, fake):
    python = fake("python", "" if xdist else 'case "$*" in *find_spec*xdist) exit 1 ;; esac')
    done = run("bash", CHECK, "test", OUT=str(tmp_path), PYTHON=str(python))
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [call for call in calls_of(python) if call.startswith("-m pytest")]
    assert all("--timeout 60 --timeout-method thread --junitxml=" in call for call in tests)
    (read,) = [call.split() for call in calls_of(python) if "gpu_correct.py" in call]
    reports = [report for report in read if report.endswith(".xml")]
    if xdist:
        (call,) = tests
        assert " -n 8 " in call and call.endswith(" ".join(FILES)) and "--dist" not in call
        assert reports == [f"{tmp_path}/tests/all.xml"]
    else:
        assert [call.split()[-1] for call in tests] == FILES
        assert reports == [f"{tmp_path}/tests/{Path(file).stem}.xml" for file in FILES]


def test_every_file_is_run_where_one_fails(tmp_path, fake):
    python = fake("python", 'case "$*" in *find_spec*|*-m*test_cores.py) exit 1 ;; esac')
    done = run("bash", CHECK, "test", OUT=str(tmp_path), PYTHON=str(python))
    assert done.returncode == 1
    tests = [call for call in calls_of(python) if call.startswith("-m pytest")]
    assert len(tests) == len(FILES)


def test_without_the_pybind_module():
    """The tests that the script runs are collected, and those of a pool alone are skipped."""
    script = WITHOUT_NATIVE.replace("runpy.run_path(sys.argv[0], run_name=\"__main__\")",
                                    "import pytest; sys.exit(pytest.main(sys.argv))")  # fmt: skip
    command = [sys.executable, "-c", script]
    whole = run(*command, "-m", "cuda", "--collect-only", *FILES, "tests/test_cuda_model.py")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    pool = run(*command, "-rs", "-m", "not cuda", "tests/test_pool_copies.py")
    assert pool.returncode == 0, pool.stdout + pool.stderr
    assert "was not built for this Python" in pool.stdout and " passed" in pool.stdout


def test_every_small_bench_is_tried(tmp_path, fake):
    python = fake("python", 'case "$*" in *"--case g3 "*) exit 1 ;; esac')
    done = run("bash", CHECK, "quick", OUT=str(tmp_path), PYTHON=str(python))
    assert done.returncode == 1 and "failed when small: g3" in done.stdout
    calls = calls_of(python)
    assert [call.split("--case ")[1].split()[0] for call in calls] == lists("bench_cases")
    assert all(f"--json {tmp_path}/quick.jsonl" in call for call in calls)
    assert all("--quick --device cuda" in call for call in calls)


@pytest.mark.parametrize("version", ["2025.3.1.0", "2026.4.0.0", "2027.1.0.0"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_what_the_sanitizer_watches(tool, version, tmp_path, fake):
    sanitizer = fake(
        "compute-sanitizer", f'[ "$1" != --version ] || echo "Version {version} (build 1)"'
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = run("bash", CHECK, tool, OUT=str(tmp_path / "out"), PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    (call,) = [call for call in calls_of(sanitizer) if "--tool" in call]
    assert f"--tool {tool} " in call and "--kernel-name kernel_substring=milora " in call
    left_out = re.findall(r"--kernel-name-exclude kernel_substring=(\S+)", call)
    early = tool == "racecheck" and version < "2026.4"
    assert left_out == (lists("hopper_kernels") if early else [])


def test_kernels_left_out_are_those_of_hopper():
    """By their barriers, which only sm90.cuh has (init_stages in boxes.cuh starts a stage's)."""
    kernels = ROOT / "csrc" / "kernels" / "grouped_lora"
    found = []
    for path in [kernels / "decode" / "cluster.cuh", *(kernels / "sm90").glob("*.cuh")]:
        text = path.read_text()
        for name, body in re.findall(r"__global__[^{]*?(\w+_kernel)\((.*?)\n}", text, re.DOTALL):
            if re.search(r"barrier|init_stages", body):
                found.append(name)
    assert sorted(found) == sorted(lists("hopper_kernels"))


def test_a_worker_whose_gpu_is_lost_ends(monkeypatch):
    import conftest

    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    conftest.pytest_runtest_logfinish()
    assert not ended
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    conftest.pytest_runtest_logfinish()
    assert ended == [1]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    conftest.pytest_runtest_logfinish()
    assert ended == [1]


def test_the_pybind_module_gets_what_cmake_gives_it():
    (given,) = re.findall(
        r"target_compile_definitions\(_native PRIVATE(.*?)\)\n",
        (ROOT / "CMakeLists.txt").read_text(), re.DOTALL,
    )  # fmt: skip
    names = re.findall(r"^ *(MILORA_\w+)=", given, re.MULTILINE)
    assert set(re.findall(r"-D(MILORA_\w+)=", CHECK.read_text())) == set(names) and len(names) == 4
    sources = r"csrc/module\.cpp csrc/pool/allocator\.cpp"
    for file in (CHECK, ROOT / "CMakeLists.txt"):
        assert re.search(sources, file.read_text())


LOAD_NATIVE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("milora._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps([module.build_info(), module.PoolAllocator(4096, 64).allocate([10, 20])]))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_load_builds_the_pybind_module_for_this_python(tmp_path):
    pytest.importorskip("pybind11")
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    for name in ("bench", "csrc", "milora"):
        left_out = shutil.ignore_patterns("_native*", "unpacked", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": ""}
    script = tmp_path / "bench" / "gpu_check.sh"
    done = subprocess.run(["bash", script, "load"], env=env, capture_output=True, text=True)
    assert "no test of the adapter pool" not in done.stdout, done.stderr
    # A process of its own: pybind11 gives this one the module that it has loaded already.
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD_NATIVE, tmp_path / "milora" / f"_native{SUFFIX}"],
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr
    info, places = json.loads(loaded.stdout)
    want = _build.build_info()
    assert info["version"] == want["version"] and info["cpu_isas"] == [*want["cpu_isas"]]
    assert info["cuda_compiler"] == "nvcc"
    assert places == [0, 64]
