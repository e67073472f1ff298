"""Write bench/results/GPU.md: what a GPU has measured of each kernel, and what none has run yet.

python bench/gpu_report.py [JSONL ...]     # more measurements, kept in bench/results/gpu.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# The CUDA kernels, and the bench whose measurements speak for each.
KERNELS = {
    "grouped_lora_ (decode, prefill)": ("grouped_lora", ("decode", "prefill")),
    "grouped_lora, forward and backward (training)": ("grouped_lora", ("train",)),
    "prompt_router, forward": ("prompt_router", ("forward", "pool")),
    "prompt_router, backward": ("prompt_router", ("backward",)),
}
HEAD = """# CUDA kernels

Written by `bench/gpu_report.py` from the JSON lines in `bench/results/gpu.jsonl`; never edited.
All of them compile for sm_80 and sm_90a. They are the first, simple form of each op.

| kernel | last measured | commit | on |
|---|---|---|---|
"""


def main(paths: list[str]) -> None:
    store = RESULTS / "gpu.jsonl"
    lines = store.read_text().splitlines() if store.exists() else []
    for path in paths:
        lines += [line for line in Path(path).read_text().splitlines() if line not in lines]
    records = [json.loads(line) for line in lines]
    if records:
        store.write_text("\n".join(lines) + "\n")
    text = HEAD
    for kernel, (bench, prefixes) in KERNELS.items():
        mine = [r for r in records if r["bench"] == bench and r["case"].startswith(prefixes)]
        if mine:
            last = max(mine, key=lambda r: r["date"])
            text += f"| {kernel} | {last['date']} | {last['commit']} | {last['hardware']} |\n"
        else:
            text += f"| {kernel} | *unmeasured* | | |\n"
    if records:
        text += table(records)
    (RESULTS / "GPU.md").write_text(text)
    print(text)


def table(records: list[dict]) -> str:
    """The newest value of each case, provider, dtype and metric."""
    newest: dict[tuple, dict] = {}
    for record in sorted(records, key=lambda r: r["date"]):
        key = tuple(record[k] for k in ("bench", "case", "dtype", "provider", "metric"))
        newest[key] = record
    text = "\n| bench | case | dtype | provider | metric | value | ratio | floor | on |\n"
    text += "|---|---|---|---|---|---|---|---|---|\n"
    for key, record in sorted(newest.items()):
        ratio, floor = (record.get(name) for name in ("ratio", "floor"))
        shown = "" if ratio is None else f"{ratio:.3f} to {record.get('ratio_to', 'base')}"
        cells = [*key, f"{record['value']:.4g} {record['unit']}", shown]
        cells += ["" if floor is None else f"{floor:.3f}", record["hardware"]]
        text += f"| {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
