"""The rivals' loaders as far as a machine without their files and a GPU can try them: what is said
of an absent one, how weights are packed, which files are fetched."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from test_bench_gpu import _on_path  # noqa: F401  (a fixture)


@pytest.fixture
def unpacked(tmp_path, monkeypatch) -> Path:
    """An empty folder in place of bench/peers/unpacked."""
    from peers import sglang_csgmv, sglang_kernels, stubs, vllm_kernels

    monkeypatch.setattr(stubs, "UNPACKED", tmp_path)
    for load in (vllm_kernels.kernels, sglang_kernels.kernels, sglang_csgmv.backend):
        load.cache_clear()
    return tmp_path


@pytest.mark.parametrize(
    "name, engine", [("vllm", "vllm"), ("sglang", "sglang"), ("sglang_csgmv", "sglang")]
)
def test_an_absent_engine_says_why(name, engine, unpacked, monkeypatch):
    import peers
    from peers import stubs

    rows = torch.tensor([0, 1], dtype=torch.int32)

    def reason() -> str:
        with pytest.raises(peers.PeerAbsent) as error:
            peers.load(name)(rows, [8, 8], decode=True)
        return str(error.value)

    assert "run bench/peers/fetch.py" in reason()
    (unpacked / engine).mkdir()
    (unpacked / f"{engine}.version").write_text("0.1")
    assert reason() == (f"unpacked files are of {engine} 0.1, wanted is {peers.VERSIONS[engine]}")
    (unpacked / f"{engine}.version").write_text(peers.VERSIONS[engine])
    monkeypatch.setattr(stubs.importlib.util, "find_spec", lambda name: None)
    assert reason() == "Triton is not installed"


def test_a_kernel_file_that_does_not_load_is_an_absent_engine(tmp_path):
    from peers import PeerAbsent, stubs

    broken = tmp_path / "broken.py"
    for text, message in (("import no_such_module", "no_such_module"), ("int.nothing", "nothing")):
        broken.write_text(text)
        with pytest.raises(PeerAbsent, match=f"broken.py cannot be loaded: .*{message}"):
            stubs.file("broken_kernels", broken)
        assert "broken_kernels" not in sys.modules
    with pytest.raises(PeerAbsent, match="cannot be loaded"):
        stubs.file("broken_kernels", tmp_path / "missing.py")


def test_grouped_mm_leaves_out_rows_without_an_adapter():
    import peers

    peer = peers.load("grouped_mm")(
        torch.tensor([2, -1, 0, 2], dtype=torch.int32), [8] * 3, decode=True
    )
    x, y = torch.randn(4, 32).bfloat16(), torch.zeros(4, 40).bfloat16()
    a = [torch.randn(3, 8, 32).bfloat16() for _ in range(2)]
    b = [torch.randn(3, n, 8).bfloat16() for n in (16, 24)]
    weights = peer.pack(a, b)
    peer.prepare()
    peer.update(y, x, weights)
    for row, adapter in ((0, 2), (2, 0), (3, 2)):
        parts = [b_s[adapter].float() @ (a_s[adapter].float() @ x[row].float())
                 for a_s, b_s in zip(a, b, strict=True)]  # fmt: skip
        torch.testing.assert_close(y[row].float(), torch.cat(parts), rtol=0.05, atol=0.5)
    assert not y[1].any()
    with pytest.raises(peers.PeerAbsent, match="bfloat16"):
        peer.pack([t.float() for t in a], b)


def test_sglangs_table_of_tiles_is_read(tmp_path):
    import enum
    import types

    from peers import sglang_kernels

    kind = enum.Enum("Kind", {"LINEAR": "linear"}, type=str)
    family = enum.Enum("Family", {"GROUPED": "grouped"}, type=str)
    plan = types.SimpleNamespace(AFamily=family, BFamily=family, Overlap=family, DenseLoraKind=kind)
    (tmp_path / "configs").mkdir()
    spec = {"a_family": "grouped", "block_size": 32}
    row = {"name": "one", "phase": "decode", "kinds": ["linear"], "max_rank": 32, "spec": spec}
    (tmp_path / "configs" / "sm90.plans.json").write_text(json.dumps({"rows": [row]}))
    (found,) = sglang_kernels.plans(plan, tmp_path, "sm90").rows
    assert found.phase is sglang_kernels.Phase.DECODE and found.kinds == [kind.LINEAR]
    assert found.max_rank == 32 and found.max_tokens is None
    assert found.spec.model_dump() == {"a_family": family.GROUPED, "block_size": 32}
    assert sglang_kernels.plans(plan, tmp_path, "sm80") is None


def test_sglangs_slots_hold_the_slices_of_an_adapter_together():
    from peers.sglang_kernels import stacked

    a = [torch.arange(1, 9).view(2, 4, 1) + shift for shift in (0, 10)]
    assert stacked(a, [4, 2])[..., 0].tolist() == [
        [1, 2, 3, 4, 11, 12, 13, 14],
        [5, 6, 15, 16, 0, 0, 0, 0],
    ]


def test_fetch_keeps_the_kernel_files_alone(tmp_path, monkeypatch):
    from peers import fetch

    monkeypatch.setattr(fetch, "UNPACKED", tmp_path / "unpacked")
    with pytest.raises(SystemExit, match="has no wheel of vllm"):
        fetch.find(tmp_path, "vllm")
    wheel = tmp_path / f"vllm-{fetch.VERSIONS['vllm']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("vllm/lora/ops/triton_ops/utils.py", "vllm/lora/ops/triton_ops/deep/x.py",
                     "vllm/lora/ops/triton_ops/README.md", "vllm/engine.py"):  # fmt: skip
            archive.writestr(name, "pass")
    assert fetch.unpack("vllm", fetch.find(tmp_path, "vllm")) == 1
    files = {p.relative_to(tmp_path / "unpacked") for p in tmp_path.glob("unpacked/**/*.*")}
    assert files == {Path("vllm/lora/ops/triton_ops/utils.py"), Path("vllm.version")}
