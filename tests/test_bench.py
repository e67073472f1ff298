"""The benches run, refuse wrong results, and write lines that the reports, plots and CLI read.

No test looks at a speed.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import milora
from milora import _build
from milora.cli import main
from milora.cli.bench import BENCHES
from milora.errors import UserError

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
FIELDS = {
    "bench", "case", "provider", "dtype", "metric", "value", "unit", "ratio", "ratio_to", "floor",
    "hardware", "versions", "commit", "date",
}  # fmt: skip
TINY = ["--shape", "64,2,4,96,256", "--prompt-tokens", "16", "--train-tokens", "16"]
OPTIONS = {
    "grouped_lora": ["--rank", "8", "--batch", "3"],
    "prompt_router": ["--batch", "3"],
    "multitenant": [*TINY, "--dtype", "float32", "--profile"],
}


def python(*arguments: object) -> None:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> dict[str, Path]:
    """What each bench writes, on small settings."""
    folder = tmp_path_factory.mktemp("bench")
    for name, options in OPTIONS.items():
        script = BENCH / f"bench_{name}.py"
        path = folder / f"{name}.jsonl"
        python(script, "--quick", "--repeat", 2, "--threads", 1, "--json", path, *options)
    return {name: folder / f"{name}.jsonl" for name in OPTIONS}


@pytest.fixture
def on_path(monkeypatch):
    """The benches' modules can be imported, and leave nothing behind that is named like others."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent == BENCH:
            del sys.modules[name]


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("bench", OPTIONS)
def test_lines_hold_the_fields_and_agree_with_each_other(bench, lines):
    records = records_of(lines[bench])
    base = {
        (r["case"], r["dtype"], r["metric"]): r["value"]
        for r in records
        if r["provider"] == "base" and r["ratio"] == 1
    }
    compared = 0
    for r in records:
        assert r.keys() >= FIELDS
        assert r["bench"] == bench and r["dtype"] in ("float32", "bfloat16")
        assert r["provider"] in ("base", "milora", "peft", "stacked", "reference")
        assert (r["ratio"] is None) == (r["ratio_to"] is None)
        assert r["value"] > 0 or r["metric"].startswith("profile_")
        assert r["versions"]["torch"] == torch.__version__
        value = base.get((r["case"], r["dtype"], r["metric"]))
        if r["ratio_to"] == "base" and value is not None:
            assert r["ratio"] == pytest.approx(r["value"] / value)
            compared += 1
    assert compared > 5


def test_every_case_measures_every_provider(lines):
    records = records_of(lines["multitenant"])
    everybody = {"base", "milora", "peft", "stacked", "reference"}
    expected = dict.fromkeys(("c1", "c2", "c3"), everybody)
    expected |= {"c4": {"base", "milora"}, "t1": {"base", "milora", "peft"}}
    for case, providers in expected.items():
        assert {r["provider"] for r in records if r["case"] == case} == providers
    assert {r.get("registered") for r in records if r["case"] == "c4"} == {None, 1, 10, 100, 1000}
    assert all(r["ratio_to"] == "peft" for r in records if r["case"] == "t1")
    # Three of seven experts a row and block, all seven for the cases with all on.
    active = {r["case"]: r["active_experts"] for r in records if "active_experts" in r}
    assert active["c1"] == active["c3"] == 8 * 7 and active["c2"] == 8 * 3
    # A decode step calls an op once per group of modules that share their input.
    (calls,) = {
        r["value"] for r in records if r["metric"] == "profile_op_calls" and r["case"] == "c1"
    }
    assert calls == 2 * 4


def test_reports_and_plots_read_the_lines(lines, tmp_path):
    full = tmp_path / "full.jsonl"  # as if measured at the size that the targets are for
    records = [
        {**r, "quick": False, "shape": "1024,8,16,2816,8192"}
        for r in records_of(lines["multitenant"])
    ]
    full.write_text("".join(json.dumps(r) + "\n" for r in records))
    python(BENCH / "cpu_report.py", full, "--results", tmp_path)
    python(BENCH / "cpu_report.py", full, "--results", tmp_path)  # again: nothing is kept twice
    assert len(records_of(tmp_path / "cpu.jsonl")) == len(records)
    text = (tmp_path / "CPU.md").read_text()
    for case, target in (("c1", 1.14), ("c2", 1.05), ("c3", 1.12), ("c4", 1.03), ("t1", 0.85)):
        rows = [line for line in text.splitlines() if line.startswith(f"| {case} ")]
        (row,) = [line for line in rows if f"≤ {target}" in line and "float32" in line]
        shown = float(row.split("|")[4])
        measured = [
            r["ratio"] for r in records
            if r["case"] == case and r["provider"] == "milora" and r["dtype"] == "float32"
            and r["metric"] in ("decode_step", "prefill", "training_step", "decode_step_growth")
            and (case == "c4") == (r["metric"] == "decode_step_growth")
        ]  # fmt: skip
        assert shown == pytest.approx(max(measured), abs=1e-3)
    assert "Where the added time goes" in text

    python(BENCH / "gpu_report.py", lines["grouped_lora"], "--results", tmp_path)
    assert "Everything measured" not in (tmp_path / "GPU.md").read_text()  # these are a CPU's

    batches = tmp_path / "batches.jsonl"
    more = records_of(lines["grouped_lora"])
    more += [{**r, "batch": 6} for r in more if "batch" in r]
    batches.write_text("".join(json.dumps(r) + "\n" for r in more))
    python(BENCH / "plot.py", batches, full, "--out", tmp_path / "plots")
    drawn = {path.name for path in (tmp_path / "plots").glob("*.svg")}
    assert any(name.startswith("grouped_lora-decode") for name in drawn)
    assert any("c4-decode_step" in name for name in drawn)
    for name in drawn:
        ElementTree.parse(tmp_path / "plots" / name)


def test_the_report_of_no_measurements_says_so(tmp_path):
    for name in ("cpu", "gpu"):
        python(BENCH / f"{name}_report.py", "--results", tmp_path)
        assert "*unmeasured*" in (tmp_path / f"{name.upper()}.md").read_text()


def test_wrong_logits_are_refused(on_path):
    from providers import check_logits

    want = torch.randn(2, 3, 16)
    bare = want + torch.randn(2, 3, 16)
    check_logits("right", want + 1e-5, want, bare, torch.float32)
    with pytest.raises(RuntimeError, match="wrong: the logits differ from plain torch"):
        check_logits("wrong", torch.stack([want[0], bare[1]]), want, bare, torch.float32)


def test_a_bench_refuses_a_model_whose_adapters_do_nothing(on_path, monkeypatch):
    """The check that stands in front of every timing, with an op that adds nothing."""
    from argparse import Namespace

    import multitenant_inference
    from setting import Setting
    from tenants import Shape, base_model

    from milora import ops

    monkeypatch.setattr(ops, "grouped_lora_", lambda *args: None)
    shape = Shape(32, 1, 2, 48, 64)
    args = Namespace(device="cpu", case=["c1"], pool=False, provider=["milora"], prompt_tokens=8)
    base = base_model(shape, torch.float32, "cpu")
    s = Setting(args, None, shape, torch.float32, 4, 2, 2, "distinct", base, 1e9)
    with pytest.raises(RuntimeError, match="milora: the logits differ from plain torch"):
        multitenant_inference.run(s)


def test_who_asks_for_what(on_path):
    from measure import popularity
    from tenants import Shape, Tenants

    assert popularity("distinct", 5, 3) == [0, 1, 2, 0, 1]
    assert popularity("identical", 3, 3) == [0, 0, 0]
    zipf = popularity("zipf", 2000, 100)
    assert zipf.count(0) > zipf.count(1) > zipf.count(5) > 0
    assert set(popularity("uniform", 2000, 10)) == set(range(10))

    shape = Shape(8, 1, 2, 12, 16)
    tenants = Tenants.random(shape, 2, 3, [0, 0, 2, 1], torch.float32, "cpu")
    gates = torch.zeros(1, 4, 7)
    gates[0, 0, 0] = gates[0, 1, 0] = gates[0, 2, 6] = 0.5  # q of adapter 0 twice, down of 2
    assert tenants.active_bytes(gates) == 2 * (8 + 8) * 4 + 2 * (12 + 8) * 4
    assert tenants.active_flops(gates, 5) == 2 * 2 * 5 * (16 + 16 + 20)


# ---- milora bench -----------------------------------------------------------------------------


def test_the_command_runs_benches_and_prints_tables(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    options = ["--dtype", "float32", "--threads", "1", "--json", str(path)]
    own = ["--pass", "--batch", "2", "--repeat", "2"]
    assert main(["bench", "prompt_router", "--case", "forward", *options, *own]) == 0
    out, err = capsys.readouterr()
    assert "prompt_router, float32" in out and "reference" in out
    assert "== prompt_router" in err
    records = records_of(path)
    assert {r["case"].split()[0] for r in records} == {"memory", "forward"}


@pytest.mark.parametrize("bench", BENCHES)
def test_the_command_knows_the_cases_of_each_bench(bench, on_path, monkeypatch, capsys):
    module = importlib.import_module(f"bench_{bench}")
    monkeypatch.setattr(sys, "argv", [bench, "--case", "nothing"])
    with pytest.raises(SystemExit):
        module.main()
    message = capsys.readouterr().err
    assert all(case in message for case in BENCHES[bench])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["multitenent"], "unknown bench 'multitenent'. Did you mean multitenant?"),
        (["multitenant", "--case", "c9"], "must be one of c1, c2, c3, c4, t1"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_bench_that_fails_is_an_error(capsys):
    assert main(["bench", "prompt_router", "--pass", "--batch", "none"]) == 2
    assert "bench_prompt_router.py ended with exit code 2" in capsys.readouterr().err


def test_without_a_checkout_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(milora, "__file__", str(tmp_path / "milora" / "__init__.py"))
    assert main(["bench"]) == 2
    assert "needs a source checkout" in capsys.readouterr().err
    with pytest.raises(UserError):
        from milora.cli.bench import checkout

        checkout()


# ---- the C++ benches --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cpp_benches_build_without_torch_and_write_the_same_lines(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    build, lines = tmp_path / "build", tmp_path / "cpp.jsonl"
    for command in (
        [cmake, "-GNinja", "-S", ROOT, "-B", build, "-DMILORA_BENCH=ON"],
        [cmake, "--build", build],
    ):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
        )
        assert done.returncode == 0, done.stdout + done.stderr
    for noun in ("grouped_lora", "prompt_router"):
        program = build / "bench" / "cpp" / f"bench_{noun}"
        options = ["--quick", "--repeat", "2", "--threads", "2", "--isa", "all", "--json", lines]
        done = subprocess.run([program, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        assert "torch" not in linked and "python" not in linked
        assert subprocess.run([program, "--isa", "none"], check=False).returncode == 2
    records = records_of(lines)
    assert all(r.keys() >= FIELDS for r in records)
    assert {r["bench"] for r in records} == {"grouped_lora_cpp", "prompt_router_cpp"}
    assert {r["isa"] for r in records} == set(_build.cpu_isas())
    kinds = {r["case"].split()[0] for r in records}
    assert kinds == {"decode", "prefill", "backward", "forward"}
