"""Damaged folders of the other expert kinds: as tests/test_fuzz_adapter_files.py, fewer of each."""

from __future__ import annotations

import pytest
import test_fuzz_adapter_files as fuzz
from expert_cases import CASES
from saved_adapters import OPTIONS

pytestmark = pytest.mark.slow
KINDS = ("ffa_lora", "lora_xs_random", "lora_ga", "loldu", "melora", "prolora", "nola", "mora",
         "lorta")  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_damaged_folders(case, tmp_path, monkeypatch):
    kind, options = CASES[case]
    monkeypatch.setitem(OPTIONS, case, {"expert": kind, "expert_options": options})
    monkeypatch.setattr(fuzz, "FOLDERS", 60)
    fuzz.test_damaged_folders(case, tmp_path)
