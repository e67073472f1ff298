"""Write bench/results/GPU.md: what a GPU has measured of each kernel, and what none has run yet.

python bench/gpu_report.py [JSONL ...]     # more measurements, kept in bench/results/gpu.jsonl
"""

from __future__ import annotations

from results import arguments, collect, everything, newest, table

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

"""


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    records = collect(args.results / "gpu.jsonl", args.jsonl)
    rows = []
    for kernel, (bench, prefixes) in KERNELS.items():
        mine = [r for r in records if r["bench"] == bench and r["case"].startswith(prefixes)]
        last = max(mine, key=lambda r: r["date"], default=None)
        cells = (
            (last["date"], last["commit"], last["hardware"]) if last else ("*unmeasured*", "", "")
        )
        rows.append((kernel, *cells))
    text = HEAD + table(("kernel", "last measured", "commit", "on"), rows)
    if records:
        text += "\n" + everything(newest(records), hardware=True)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "GPU.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
