"""A short soak in each test run, and a longer one among the slow tests; see soak.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from soak import GROWTH, Soak, growth_of

SCRIPT = Path(__file__).with_name("soak.py")


def soak(tmp_path, seconds: float) -> None:
    lines = tmp_path / "soak.jsonl"
    options = ["--minutes", str(seconds / 60), "--json", str(lines)]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    *samples, last = map(json.loads, lines.read_text().splitlines())
    summary = last["summary"]
    assert summary["errors"] == [] and summary["seconds"] >= seconds
    assert all(sample["rss"] > 0 for sample in samples) and len(samples) >= 5
    # What has to happen for a run to have shown anything.
    happened = {key.rpartition(" ")[0] for key in summary["counts"]}
    assert happened == {action for action, _ in Soak.ACTIONS}
    assert summary["counts"]["generate done"] > 0
    assert summary["pool"]["evictions"] > 0 and summary["pool"]["failures"] > 0


def test_ten_seconds(tmp_path):
    soak(tmp_path, 10)


@pytest.mark.slow
def test_a_minute(tmp_path):
    soak(tmp_path, 60)


def test_growth_is_the_rise_of_a_line():
    def samples(rss) -> list[dict]:
        return [{"seconds": float(t), "rss": rss(t)} for t in range(40)]

    leak = GROWTH / 20
    assert growth_of(samples(lambda t: 5e8 + leak * t)) > GROWTH
    assert growth_of(samples(lambda t: 5e8 + (t % 2) * 1e6)) < GROWTH / 100
    assert growth_of(samples(lambda t: 5e8 if t < 8 else 9e8)) == 0, "warming up is no leak"
