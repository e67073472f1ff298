"""Download the peers' wheels and unpack the kernel files that the loaders read.

    python bench/peers/fetch.py            # about 380 MB over the network, 0.5 MB kept

Run it yourself, on a machine with a network; no bench ever does. `bench/peers/unpacked/` is ignored
by git and can be copied to a machine without a network. The files keep their own licences
(Apache 2.0, both).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers import UNPACKED, VERSIONS

# Folders of a wheel of which the files directly inside are kept.
FOLDERS = {
    "vllm": ("vllm/lora/ops/triton_ops",),
    "sglang": (
        "sglang/kernels/ops/lora/common",
        "sglang/kernels/ops/lora/dense",
        "sglang/kernels/ops/lora/dense/csgmv_configs/triton_3_5_1",
        "sglang/srt/lora",
        "sglang/srt/lora/backend",
        "sglang/srt/lora/dense",
        "sglang/srt/lora/dense/configs",
    ),
}
# Wheels exist for some Pythons and systems only; no compiled part of them is used.
ANYWHERE = ("--no-deps", "--only-binary=:all:", "--python-version=3.11",
            "--platform=manylinux_2_34_x86_64", "--platform=manylinux_2_28_x86_64")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", nargs="+", choices=list(VERSIONS), default=list(VERSIONS))
    parser.add_argument("--wheels", type=Path, help="folder that has the wheels already")
    args = parser.parse_args()
    for engine in args.engine:
        with tempfile.TemporaryDirectory() as folder:
            wheel = find(args.wheels, engine) if args.wheels else download(engine, Path(folder))
            number = unpack(engine, wheel)
        print(f"{engine} {VERSIONS[engine]}: {number} files in {UNPACKED / engine}")


def download(engine: str, folder: Path) -> Path:
    wanted = f"{engine}=={VERSIONS[engine]}"
    command = [sys.executable, "-m", "pip", "download", *ANYWHERE, "--dest", str(folder), wanted]
    subprocess.run(command, check=True)
    return find(folder, engine)


def find(folder: Path, engine: str) -> Path:
    wheels = sorted(folder.glob(f"{engine}-{VERSIONS[engine]}-*.whl"))
    if not wheels:
        raise SystemExit(f"fetch: {folder} has no wheel of {engine} {VERSIONS[engine]}")
    return wheels[0]


def unpack(engine: str, wheel: Path) -> int:
    """Replace the engine's files by those of `wheel`; returns how many there are."""
    shutil.rmtree(UNPACKED / engine, ignore_errors=True)
    UNPACKED.mkdir(exist_ok=True)
    number = 0
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.rpartition("/")[0] in FOLDERS[engine] and name.endswith((".py", ".json")):
                archive.extract(name, UNPACKED)  # refuses paths that lead out of the folder
                number += 1
    (UNPACKED / f"{engine}.version").write_text(VERSIONS[engine] + "\n")
    return number


if __name__ == "__main__":
    main()
