"""The GPU benches as far as a machine without a GPU can try them: every path small on the CPU, what
is reported of absent rivals, and the report. tests/test_gpu_check.py has the script.

No test looks at a speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
CHECK = BENCH / "gpu_check.sh"
H200 = {
    "hardware": "NVIDIA H200", "capability": 90, "versions": {"torch": "2.11"}, "commit": "abc",
    "date": "2026-11-30T00:00:00+00:00",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    """The benches' modules can be imported, and leave nothing behind that is named like others."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and BENCH in Path(file).parents:
            del sys.modules[name]


def run(*command: object, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}
    )


# Runs a script where the pybind11 module is missing: only an adapter pool needs it.
WITHOUT_NATIVE = """import runpy, sys
sys.modules["milora._native"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the benches, small and on the CPU ---------------------------------------------------------


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("gpu") / "lines.jsonl"
    options = ["--quick", "--device", "cpu", "--repeat", "2", "--threads", "1", "--json", path]
    command = [sys.executable, "-c", WITHOUT_NATIVE, BENCH / "bench_gpu.py", *options]
    done = run(*command, PYTHONPATH=f"{ROOT}{os.pathsep}{BENCH}")
    assert done.returncode == 0, done.stdout + done.stderr
    return records_of(path)


def providers(lines: list[dict], case: str, metric: str) -> set[str]:
    return {r["provider"] for r in lines if r["case"] == case and r["metric"] == metric}


def test_every_stage_writes_what_its_target_reads(lines):
    from gpu_cases import TARGETS

    stages = {r["case"].split()[0] for r in lines if r["case"] != "memory"}
    assert stages == {"g1", "g2", "g3", "g4", "g5", "pool"}
    for target in TARGETS:  # sizes differ here, so G1 and G4 are found by their metric
        stage = target.case.split()[0]
        case = target.case if stage in ("g2", "g3", "g5") else None
        if target.provider == "fused" and case:
            assert {"fused"} == providers(lines, case, "time") & {"fused"}
        assert any(
            r["metric"] == target.metric and r["provider"] == target.provider
            and r["case"].startswith(stage) and case in (None, r["case"])
            for r in lines
        ), target  # fmt: skip
    assert all(r["value"] > 0 for r in lines if r["metric"] not in ("absent", "added_over_floor"))


def test_every_stage_measures_its_rivals(lines):
    torch_alone = {"milora", "stacked", "peft", "grouped_mm"}
    assert torch_alone <= providers(lines, "g1 4x4 r8 distinct 128-128", "time")
    for case in ("g3 all", "g3 top_k 3"):
        assert torch_alone | {"base", "wgmma", "fused"} <= providers(lines, case, "time")
    for case in ("g2 eager", "g2 graph"):
        assert providers(lines, case, "decode_step") == {"base", "milora", "peft"}
    for case in ("g5 eager beam 1", "g5 graph beam 3"):
        methods = {"base", "lora", "dora", "moelora", "milora"}
        assert providers(lines, case, "tokens_per_s") == methods


def test_engines_are_measured_or_absent_with_a_reason(lines):
    for case in ("g1 4x4 r8 distinct 128-128", "g3 all"):
        for engine in ("vllm", "sglang", "sglang_csgmv"):
            mine = [r for r in lines if r["case"] == case and r["provider"] == engine]
            (found,) = [r for r in mine if r["metric"] in ("time", "absent")]
            assert found["metric"] == "time" or len(found["reason"]) > 10


def test_a_gpu_is_asked_for_by_name(capsys, monkeypatch):
    import bench_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--case", "g1"])
    with pytest.raises(SystemExit):
        bench_gpu.main()
    assert "torch sees no GPU" in capsys.readouterr().err


def test_an_op_that_adds_nothing_is_refused(monkeypatch):
    import gpu_providers
    from gpu_problem import Problem

    from milora import ops

    problem = Problem.random(64, (32, 48), [1, 0, 1], [8, 16], torch.float32, "cpu")
    for name in ("milora", "stacked", "peft"):
        provider = gpu_providers.make(name, problem)
        gpu_providers.check(name, provider, provider.call(problem.weights.copy()), base=False)
    monkeypatch.setattr(ops, "grouped_lora_", lambda *args: None)
    provider = gpu_providers.make("milora", problem)
    with pytest.raises(RuntimeError, match="milora is wrong by 1 of the largest update"):
        gpu_providers.check("milora", provider, provider.call(problem.weights), base=False)


def test_rivals_are_checked_on_a_y_of_their_own():
    """What earlier calls have added to y would swallow an update in bfloat16."""
    import gpu_providers
    from gpu_problem import Problem

    problem = Problem.random(64, (32, 48), [1, 0, 1], [8, 16], torch.bfloat16, "cpu")
    for name in ("milora", "stacked", "peft", "grouped_mm"):
        provider = gpu_providers.make(name, problem)
        call = provider.call(problem.weights)
        gpu_providers.check(name, provider, call, base=False)
        for _ in range(500):
            call()


def test_torchs_own_generator_draws_nothing():
    """It refuses after a capture that failed, which must not end the other providers' times."""
    import gpu_model
    import gpu_providers
    from bench_prompt_router import Case, make_runs
    from bench_prompt_router import Problem as RouterProblem
    from gpu_cases import TINY
    from gpu_problem import Problem
    from tenants import Shape

    before = torch.get_rng_state()
    problem = Problem.random(64, (32,), [1, 0, 1], [8, 16], torch.float32, "cpu")
    provider = gpu_providers.make("peft", problem)
    gpu_providers.check("peft", provider, provider.call(problem.weights), base=False)
    gpu_model.tenants_on("cpu", Shape.parse(TINY), 8, 2, [0, 1], torch.float32)
    make_runs(RouterProblem(Case("backward", 2, 4, 16), torch.float32, "cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    import gpu_timing

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        """As torch's: ending the capture raises before the stream is put back."""

        def __init__(self, graph, stream):
            self.stream = stream

        def __enter__(self):
            current.append(self.stream)

        def __exit__(self, *error):
            raise RuntimeError("capture invalidated")

    outer = Stream()
    current = [outer]
    for name, value in {
        "Stream": Stream, "CUDAGraph": object, "graph": Graph, "set_stream": current.append,
        "current_stream": lambda: current[-1], "synchronize": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(RuntimeError, match="capture invalidated"):
        gpu_timing.captured(lambda: None)
    assert len(current) > 1 and current[-1] is outer


def test_copies_beat_the_cache_and_fit(monkeypatch):
    import gpu_timing

    cache, adapter = 50 << 20, 512 << 10
    monkeypatch.setattr(gpu_timing.machine, "cache_bytes", lambda device: cache)

    def copies(*args: int, quick: bool = False, **held: int) -> int:
        return gpu_timing.num_copies(*args, "cuda", quick=quick, **held)

    assert copies(adapter) == 400 and copies(adapter, quick=True) == 2
    assert copies(adapter, held=64 * adapter) == 256  # one of 64 adapters is read: 8 GiB
    assert copies(adapter, held=256 * adapter) == 200  # twice the cache, whatever it takes
    assert copies(1 << 10) == 512 and copies(cache * 5) == 1


def test_a_graph_of_short_calls_holds_many(monkeypatch):
    """One launch of a graph is shared by so many calls that it does not count."""
    import gpu_compare
    import gpu_router
    import gpu_timing
    from bench_prompt_router import Case
    from gpu_problem import Problem

    monkeypatch.setattr(gpu_compare, "num_copies", lambda *args, **options: 7)
    monkeypatch.setattr(gpu_router, "num_copies", lambda *args, **options: 7)
    args = argparse.Namespace(device="cpu", quick=True, repeat=1, seconds=1.0)
    setting = gpu_compare.Setting(args, Mock(), 1e9, 0)
    problem = Problem.random(64, (32,), [0, 1], [8, 8], torch.float32, "cpu")
    _, made = gpu_compare.build(setting, "case", "peft", [problem], base=False)
    update, start = problem.update(), problem.y.clone()
    made.run.step()
    assert made.number == 35  # of whole rounds over the copies
    torch.testing.assert_close(problem.y, start + 35 * update, rtol=1e-4, atol=1e-4)
    _, made = gpu_compare.build(setting, "case", "base", [problem] * 2, base=True)
    assert made.number == 7
    numbers = []

    def calls(functions, device):
        numbers.append(len(functions))
        return gpu_timing.calls(functions, device)

    monkeypatch.setattr(gpu_router, "calls", calls)
    gpu_router.measure(setting, Case("pool", 2, 4, 16), torch.float32)
    assert numbers == [35] * 3


def test_the_commit_is_told_where_there_is_no_repository(monkeypatch):
    import machine

    monkeypatch.setenv("MILORA_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"
    monkeypatch.setenv("MILORA_COMMIT", "")
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == "unknown"


def test_what_a_problem_counts():
    from gpu_problem import Problem

    gates = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    problem = Problem.random(64, (32, 48), [1, 1, -1], [4, 8], torch.bfloat16, "cpu", 5, gates)
    assert problem.active_bytes() == 8 * 2 * ((64 + 32) + (64 + 48))  # adapter 1 of both modules
    assert problem.active_flops() == 2 * 8 * (10 * (64 + 32) + 5 * (64 + 48))
    assert problem.alone(1).adapter_of == [-1, 1, -1]
    update = problem.update()
    assert not update[10:].any() and not update[:5, 32:].any() and update[:5, :32].all()
    with pytest.raises(ValueError, match="multiples of 16"):
        Problem.random(60, (32,), [0], [8], torch.bfloat16, "cpu").weights.pool()


def test_cases_have_names_of_their_own_and_targets_refer_to_them():
    from gpu_cases import TARGETS, decode_cases
    from measure import POPULARITIES

    names = [case.name for case in decode_cases(list(POPULARITIES), quick=False)]
    assert len(names) == len(set(names)) > 10
    assert {t.case for t in TARGETS if t.stage == "G1"} <= set(names)
    assert {t.stage for t in TARGETS} == {"G1", "G2", "G3", "G4", "G5"}


# ---- what the report says ----------------------------------------------------------------------


def line(provider: str, metric: str, value: float, **more: object) -> dict:
    case = "g1 64x64 r32 distinct 4096-4096"
    common = {"bench": "gpu", "case": case, "dtype": "bfloat16", "unit": "us", "quick": False}
    ratios = {"ratio": 1.0, "ratio_to": "milora", "floor": 0.8}
    return {**H200, **common, **ratios, "provider": provider, "metric": metric, "value": value,
            **more}  # fmt: skip


def report(tmp_path: Path, records: list[dict]) -> str:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    done = run(sys.executable, BENCH / "gpu_report.py", path, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    return (tmp_path / "GPU.md").read_text()


def row_of(text: str, title: str) -> list[str]:
    (found,) = [row for row in text.splitlines() if row.startswith(f"| {title} |")]
    return [cell.strip() for cell in found.split("|")[1:-1]]


def test_the_report_tells_measured_from_unmeasured(tmp_path):
    from gpu_cases import KERNELS

    proof = {**H200, "bench": "correct", "case": "decode_cluster", "kernel": "decode_cluster",
             "passed": 9, "failed": 0}  # fmt: skip
    later = {**proof, "date": "2026-12-01T00:00:00+00:00", "failed": 2}
    on_cpu = line("milora", "time", 1.0, kernel="prefill", capability=0, floor_us=1.0, share=1.0)
    text = report(tmp_path, [
        line("milora", "time", 20.0, kernel="decode_cluster", floor_us=16.0, share=0.8),
        line("vllm", "time", 50.0, kernel="decode_cluster"),
        line("sglang", "absent", 0.0, reason="Triton is not installed"),
        line("milora", "share", 0.8), line("milora", "over_best_peer", 1.2), proof, later, on_cpu,
    ])  # fmt: skip
    cluster = row_of(text, KERNELS["decode_cluster"].title)
    assert cluster[2:6] == ["16.0", "20.0", "80%", "vllm 50.0 (2.50×); sglang absent"]
    assert cluster[6] == "2026-11-30, NVIDIA H200, abc; since then 2 tests failed"
    others = [row_of(text, k.title) for name, k in KERNELS.items() if name != "decode_cluster"]
    assert all(row[1] == "*unmeasured*" and row[6] == "never on a GPU" for row in others)
    assert "| G1 | share of copy bandwidth | ≥ 0.75 | 0.800 | yes |" in text
    assert "| G1 | speed ÷ best peer | ≥ 1.5 | 1.200 | no |" in text
    assert "| sglang | g1 | Triton is not installed |" in text


def test_the_report_shows_the_rivals_of_the_cpp_benches(tmp_path):
    from gpu_cases import KERNELS

    python = {"kernel": "prefill", "floor_us": 80.0, "share": 0.8}
    cpp = {**python, "bench": "grouped_lora_cuda", "case": "prefill b8x512"}
    text = report(tmp_path, [
        line("milora", "time", 100.0, **python), line("peft", "time", 200.0, **python),
        line("base", "time", 30.0, **cpp), line("milora", "time", 40.0, **cpp),
        line("cutlass_sm80", "time", 60.0, **cpp),
        line("cutlass_sm90", "absent", 0.0, **cpp, reason="needs compute capability 9.0"),
    ])  # fmt: skip
    others = row_of(text, KERNELS["prefill"].title)[5]
    assert others == (
        "peft 200.0 (2.00×); prefill b8x512, C++: cutlass_sm80 60.0 (1.50×); cutlass_sm90 absent"
    )


def test_the_committed_report_is_what_the_script_writes(tmp_path):
    kept = BENCH / "results" / "gpu.jsonl"
    records = records_of(kept) if kept.exists() else []
    assert report(tmp_path, records) == (BENCH / "results" / "GPU.md").read_text()


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_grouped_lora" name="test_train_against_reference[cuda-dtype0]"/>
<testcase classname="tests.test_fused_lora" name="test_takes_leading_dimensions[cuda]"/>
<testcase classname="tests.test_prompt_router" name="test_widths[cuda-1]"><failure/></testcase>
<testcase classname="tests.test_pool_copies" name="test_the_budget_of_a_gpu[cuda]"><skipped/>
</testcase></testsuite></testsuites>"""


def test_what_the_gpu_tests_have_seen(tmp_path):
    from gpu_correct import count

    path = tmp_path / "tests.xml"
    path.write_text(JUNIT)
    good, bad = {"passed": 1, "failed": 0}, {"passed": 0, "failed": 1}
    train = {"train_forward": good, "train_backward": good}
    router = {"router_forward": bad, "router_backward": bad}
    assert count([path], 90) == {"fused_lora": good, **train, **router}
    assert count([path], 80) == count([path], 100) == {**train, **router}


def test_a_file_whose_process_died_has_failed(tmp_path):
    """Its process has left no report; another file's is there."""
    from gpu_correct import count

    path = tmp_path / "test_grouped_lora.xml"
    path.write_text(JUNIT)
    counts = count([path, tmp_path / "test_cores.xml"], 80)
    assert counts["train_forward"] == {"passed": 1, "failed": 0}
    for kernel in ("decode_split", "prefill"):
        assert counts[kernel]["passed"] == 0 and counts[kernel]["failed"] > 10
    with pytest.raises(FileNotFoundError, match="no report on all"):
        count([tmp_path / "all.xml"], 80)


def test_every_kernel_has_tests_on_a_gpu():
    from gpu_cases import KERNELS

    lists = re.findall(r"^(?:ops_tests|variants)=\((.*?)\)", CHECK.read_text(), re.DOTALL | re.M)
    files = " ".join(lists).split()
    done = run(sys.executable, "-m", "pytest", "-m", "cuda", "--collect-only", *files)
    ids = re.findall(r"^tests/(\w+)\.py(::.*)$", done.stdout, re.MULTILINE)
    assert len(ids) > 100, done.stdout + done.stderr
    for name, kernel in KERNELS.items():
        mine = [test for test in map("".join, ids) if re.search(kernel.tests, test)]
        assert mine, name
    decode, prefill = KERNELS["decode_cluster"].tests, KERNELS["prefill"].tests
    both = [t for t in map("".join, ids) if re.search(decode, t) and re.search(prefill, t)]
    assert not both


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_cpp_benches_of_the_cuda_kernels_compile(tmp_path):
    """The benches' own sources and the CUTLASS rivals; test_cuda_build.py has the kernels."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tools = {name: shutil.which(name, path=path) for name in ("nvcc", "cmake", "ninja")}
    if None in tools.values():
        pytest.skip(f"needs nvcc, cmake and ninja; found {tools}")
    if "CUTLASS_PATH" not in os.environ:
        try:
            metadata.distribution("nvidia-cutlass")
        except metadata.PackageNotFoundError:
            pytest.skip("needs CUTLASS: pip install nvidia-cutlass==4.2.0.0, or set CUTLASS_PATH")
    options = ["-DMILORA_BENCH=ON", "-DMILORA_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}",
               "-DCMAKE_CUDA_ARCHITECTURES=90a-real"]  # fmt: skip
    configured = run(tools["cmake"], "-GNinja", "-S", ROOT, "-B", tmp_path, *options, PATH=path)
    assert configured.returncode == 0, configured.stdout + configured.stderr
    objects = ["bench/cpp/CMakeFiles/cuda_bench.dir/cuda_harness.cu.o"]
    for noun in ("grouped_lora", "train", "prompt_router"):
        target = f"bench_{noun}_cuda"
        objects.append(f"bench/cpp/CMakeFiles/{target}.dir/{target}.cu.o")
    # Of CUTLASS those that differ in more than the numbers of a tile.
    for library, names in (("sm80", ("shrink", "expand")), ("sm90", ("shrink", "swapped_expand"))):
        folder = f"bench/cpp/CMakeFiles/cutlass_{library}.dir"
        objects += [f"{folder}/cutlass_{library}_{name}.cu.o" for name in names]
    built = run(tools["ninja"], "-C", tmp_path, *objects, PATH=path)
    assert built.returncode == 0, built.stdout[-6000:] + built.stderr
