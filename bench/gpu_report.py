"""Write bench/results/GPU.md: what a GPU has measured of each kernel, and what none has run yet.

python bench/gpu_report.py [JSONL ...]     # more measurements, kept in bench/results/gpu.jsonl
"""

from __future__ import annotations

from gpu_cases import KERNELS, TARGETS
from results import arguments, collect, everything, newest, table

UNMEASURED = "*unmeasured*"
OURS = ("milora", "wgmma", "fused")
HEAD = """# CUDA kernels

Written by `bench/gpu_report.py` from the JSON lines in `bench/results/gpu.jsonl`; never edited.
`bench/gpu_check.sh` makes them on a GPU machine. All kernels compile for sm_80, sm_90a,
sm_100 and sm_120, `fused_lora` and prefill by wgmma for sm_90a alone.
"""
TARGETS_HEAD = """
## Targets

"""
KERNELS_HEAD = """
## Kernels

One row a kernel, at the first case of its bench. *floor*: the bytes that cannot be avoided at the
measured copy bandwidth (prefill: the bare modules' time and the adapters' arithmetic at their
rate). *share*: floor ÷ time. *others*: their time in the same run, and theirs ÷ ours; then those
of the kernel's C++ bench, at its own first case. *seen correct*: the last run of the GPU tests in
which tests of the kernel passed and none failed.

"""
ABSENT_HEAD = """
## Not there to compare with

"""


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    kept = collect(args.results / "gpu.jsonl", args.jsonl)
    records = [r for r in kept if on_gpu(r)]
    measured = [r for r in records if r["bench"] != "correct" and not r.get("quick")]
    text = HEAD + machines(measured) + TARGETS_HEAD + targets(measured)
    text += KERNELS_HEAD + kernels(measured, [r for r in records if r["bench"] == "correct"])
    text += absent(measured)
    shown = [r for r in newest(measured) if r["metric"] != "absent"]
    if shown:
        text += "\n## Everything measured\n\n" + everything(shown, hardware=True)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "GPU.md").write_text(text)
    print(text.partition("\n## Everything")[0])


def on_gpu(record: dict) -> bool:
    return record.get("isa") == "cuda" or record.get("capability", 0) > 0


def machines(records: list[dict]) -> str:
    """Where and when, and the copy bandwidth there."""
    text = ""
    for hardware in dict.fromkeys(r["hardware"] for r in records):
        mine = [r for r in records if r["hardware"] == hardware]
        copies = [r["value"] for r in mine if r["metric"] == "copy_bandwidth"]
        last = max(mine, key=lambda r: r["date"])
        versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
        text += f"\nOn {hardware}; {versions}; commit {last['commit']}; {last['date'][:10]}."
        text += (
            f" Memory is copied at {max(copies):.0f} GB/s, read and written.\n" if copies else "\n"
        )
    return text


def targets(records: list[dict]) -> str:
    rows = []
    for target in TARGETS:
        goal = f"{'≥' if target.at_least else '≤'} {target.goal:g}"
        key = ("gpu", target.case, target.provider, target.metric)
        found = [r for r in records if (r["bench"], r["case"], r["provider"], r["metric"]) == key]
        last = max(found, key=lambda r: r["date"], default=None)
        if last is None:
            rows.append((target.stage, target.text, goal, UNMEASURED, "", ""))
            continue
        reached = "yes" if target.reached(last["value"]) else "no"
        where = f"{last['hardware']}, {last['date'][:10]}"
        rows.append((target.stage, target.text, goal, f"{last['value']:.3f}", reached, where))
    return table(("", "what", "target", "measured", "reached", "on"), rows)


def kernels(records: list[dict], proofs: list[dict]) -> str:
    rows = []
    for name, kernel in KERNELS.items():
        last = headline(records, name)
        correct = seen_correct(proofs, name)
        if last is None:
            rows.append((kernel.title, UNMEASURED, "", "", "", "", correct, ""))
            continue
        where = f"{last['hardware']}, {last['date'][:10]}, {last['commit']}"
        cells = (f"{last['floor_us']:.1f}", f"{last['value']:.1f}", f"{last['share']:.0%}")
        also = first(records, name, python=False)
        rivals = others(records, last)
        if also is not None and also is not last and others(records, also):
            rivals += f"; {also['case']}, C++: {others(records, also)}"
        rows.append((kernel.title, last["case"], *cells, rivals, correct, where))
    head = ("kernel", "case", "floor, µs", "time, µs", "share", "others", "seen correct", "on")
    return table(head, rows)


def headline(records: list[dict], kernel: str) -> dict | None:
    """Of the kernel's last run, with Python before without, the first case."""
    found = first(records, kernel, python=True)
    return first(records, kernel, python=False) if found is None else found


def first(records: list[dict], kernel: str, *, python: bool) -> dict | None:
    """The first case of the kernel's last run in bench_gpu.py, or in another bench."""
    mine = [
        r for r in records
        if r.get("kernel") == kernel and r["metric"] == "time" and r["provider"] in OURS
        and (r["bench"] == "gpu") == python
    ]  # fmt: skip
    if not mine:
        return None
    last = max(r["date"] for r in mine)
    return next(r for r in mine if r["date"] == last)


def others(records: list[dict], ours: dict) -> str:
    """The other providers' times in the same run, and as multiples of ours."""
    same = ("bench", "case", "dtype", "date", "hardware")
    cells = []
    for r in records:
        if any(r[key] != ours[key] for key in same) or r["provider"] == ours["provider"]:
            continue
        if r["provider"] == "base" and r["bench"] != "gpu":
            continue  # a copy of as many bytes, which the share speaks of
        if r["metric"] == "time":
            cells.append(f"{r['provider']} {r['value']:.1f} ({r['value'] / ours['value']:.2f}×)")
        elif r["metric"] == "absent":
            cells.append(f"{r['provider']} absent")
    return "; ".join(cells)


def seen_correct(proofs: list[dict], kernel: str) -> str:
    mine = [r for r in proofs if r["kernel"] == kernel]
    good = [r for r in mine if r["passed"] and not r["failed"]]
    if not mine:
        return "never on a GPU"
    last = max(mine, key=lambda r: r["date"])
    if not good:
        return f"never; {last['failed']} tests failed on {last['hardware']}, {last['date'][:10]}"
    best = max(good, key=lambda r: r["date"])
    text = f"{best['date'][:10]}, {best['hardware']}, {best['commit']}"
    return text if best is last else f"{text}; since then {last['failed']} tests failed"


def absent(records: list[dict]) -> str:
    """Who could not run, and why, of the newest runs."""
    missing = [r for r in newest(records) if r["metric"] == "absent"]
    reasons = dict.fromkeys((r["provider"], r["case"].split()[0], r["reason"]) for r in missing)
    return ABSENT_HEAD + table(("who", "in", "why"), reasons) if reasons else ""


if __name__ == "__main__":
    main()
