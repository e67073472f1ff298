"""The sdist and the wheel hold what they need and nothing else, and the wheel works."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from milora import __version__

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[1]
SMOKE = """
import torch, transformers, milora
from milora import _build
assert "site-packages" in milora.__file__ and _build.build_info()["version"] == milora.__version__
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
))
milora.attach(model, milora.MiLoRAConfig(rank=4))
ids = torch.arange(3, 9)[None]
out = model.generate(ids, max_new_tokens=4, do_sample=False)
milora.save(model, "adapter")
milora.load(milora.detach(model), "adapter")
assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), out)
assert milora.stats(model).routed_prompts == 2
"""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """An sdist of this tree, and a wheel built from nothing but that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    egg = folder / "egg"
    egg.mkdir()
    run(
        sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", egg,
        "sdist", "--dist-dir", folder, cwd=ROOT,
    )  # fmt: skip
    (sdist,) = folder.glob("*.tar.gz")
    run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps",
        "--wheel-dir", folder, sdist, cwd=folder, MILORA_CUDA="0",
    )  # fmt: skip
    return folder


def test_the_sdist_holds_sources_only(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()} - {""}
    for needed in (
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "csrc/bindings.cpp",
        "csrc/kernels/grouped_lora/decode/decode.cu",
        "third_party/FindCutlass.cmake",
        "milora/__init__.py",
    ):
        assert needed in names
    tops = {name.split("/")[0] for name in names}
    allowed = {"CMakeLists.txt", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in"}
    allowed |= {"README.md", "LICENSE", "PKG-INFO", "csrc", "third_party", "milora"}
    allowed |= {"milora.egg-info"}
    assert tops <= allowed
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def test_the_wheel_holds_the_package_only(dist):
    (path,) = dist.glob("*.whl")
    names = zipfile.ZipFile(path).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"milora", f"milora-{__version__}.dist-info"}
    libraries = [name for name in names if name.endswith(".so")]
    assert len(libraries) == 2 and "milora/lib/libmilora_ops.so" in libraries
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".pyc"))]
    assert path.stat().st_size < 5 << 20


def test_the_wheel_works_in_a_clean_environment(dist, tmp_path):
    """torch and transformers come from this environment's folder; milora from the wheel alone."""
    (wheel,) = dist.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    (Path(site.strip()) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-c", SMOKE, cwd=tmp_path, HF_HUB_OFFLINE="1")
    # The last line: no editable install of this tree may have served instead of the wheel.
    where = run(python, "-c", "import milora; print(milora.__file__)", cwd=tmp_path)
    assert where.strip().startswith(str(tmp_path))
