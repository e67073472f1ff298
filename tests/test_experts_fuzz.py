"""Damaged folders of other expert kinds: as tests/test_fuzz_adapter_files.py, 200 of each.

The kinds stand for what files can differ in: frozen, fixed, anchored, one-dimensional, shared.
"""

from __future__ import annotations

import pytest
import test_fuzz_adapter_files as fuzz
from expert_cases import CASES
from saved_adapters import OPTIONS

pytestmark = pytest.mark.slow
KINDS = ("ffa_lora", "lora_xs_random", "lora_ga", "nola", "lorta")


@pytest.mark.parametrize("case", KINDS)
def test_damaged_folders(case, tmp_path, monkeypatch):
    kind, options = CASES[case]
    monkeypatch.setitem(OPTIONS, case, {"expert": kind, "expert_options": options})
    monkeypatch.setattr(fuzz, "FOLDERS", 200)
    fuzz.test_damaged_folders(case, tmp_path)
