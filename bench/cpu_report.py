"""Write bench/results/CPU.md: measured ratios beside their floors and targets, and all the rest.

python bench/cpu_report.py [JSONL ...]     # more measurements, kept in bench/results/cpu.jsonl
"""

from __future__ import annotations

from results import arguments, collect, everything, floor, newest, ratio, table

# case -> what it is, and per dtype the target for milora's ratio
TARGETS = {
    "c1": ("decode, all modules on", {"float32": 1.14, "bfloat16": 1.16}),
    "c2": ("decode, top_k 3", {"float32": 1.05, "bfloat16": 1.07}),
    "c3": ("prefill, all modules on", {"float32": 1.12, "bfloat16": 1.12}),
    "c4": ("1 to 1000 registered adapters", {"float32": 1.03, "bfloat16": 1.03}),
    "t1": ("training step, top_k 3", {"float32": 0.85, "bfloat16": 0.85}),
}
FULL_SHAPE = "1024,8,"  # hidden size and blocks of the model that the targets are for
PROFILE = ("added", "ops", "python", "floor")
HEAD = """# CPU

Written by `bench/cpu_report.py` from the JSON lines in `bench/results/cpu.jsonl`; never edited.
"""
EXPLANATION = """
Each number is a time ÷ the time of the bare base in the same run, the fastest of many interleaved
runs; t1 is ÷ PEFT LoRA's step, and c4 is the largest growth of a decode step over the pool with the
fewest adapters. The floor adds to the base's time nothing but the bytes of the adapters in use at
the read bandwidth of this machine (prefill and training: their arithmetic at the base's own rate).
In c2 peft and stacked cannot route: they serve three modules, the same ones for every row.

"""
SWEEP_HEAD = """
## Other batches, ranks and mixes

A decode step ÷ the bare base's in the same run; batch 8, rank 32 and a tenant of its own for every
row where the table does not say otherwise. *zipf* and *uniform* draw tenants for the rows,
*identical* gives all rows one. With more rows than 8, tenants repeat. Each point had a few seconds
and this machine's memory is slow at times: single points err by up to a tenth.

"""
PROFILE_HEAD = """
## Where the added time goes

Milliseconds of one forward beyond the base's. *ops*: inside milora's ops, which cannot take less
than *floor*; *python*: what is left when the ops are left out. What was tried where a target is
missed stands in `docs/decisions.md`.

"""


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    records = newest(collect(args.results / "cpu.jsonl", args.jsonl))
    text = HEAD + machines(records) + EXPLANATION + targets(records) + profiles(records)
    text += sweeps(records)
    text += "\n## Everything measured\n\n" + everything(records, hardware=False)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "CPU.md").write_text(text)
    print(text)


def machines(records: list[dict]) -> str:
    """Where and when, and the read bandwidth there."""
    text = ""
    for hardware in dict.fromkeys(r["hardware"] for r in records):
        mine = [r for r in records if r["hardware"] == hardware]
        reads = [r["value"] for r in mine if r["metric"] == "read_bandwidth"]
        last = max(mine, key=lambda r: r["date"])
        versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
        commits = ", ".join(sorted({r["commit"] for r in mine}))
        text += f"\nOn {hardware} ({last.get('isa', '')}); {versions}; commit {commits}; "
        text += f"last on {last['date'][:10]}."
        text += f" Memory is read at {max(reads):.1f} GB/s.\n" if reads else "\n"
    return text


def targets(records: list[dict]) -> str:
    """One row a case and dtype: milora's ratio beside floor, target and the rivals' ratios.

    All cells of a row come from one run, the last one at the model's full size.
    """
    mine = [r for r in records if r["bench"] == "multitenant" and not r.get("quick")]
    rows = []
    for case, (what, goals) in TARGETS.items():
        for dtype, goal in goals.items():
            found = [r for r in mine if r["case"] == case and r["dtype"] == dtype]
            found = [r for r in found if r["ratio"] is not None and is_headline(r)]
            if not found:
                rows.append((case, what, dtype, "*unmeasured*", f"≤ {goal}", "", "", "", ""))
                continue
            last = max(r["date"] for r in found)
            found = [r for r in found if r["date"] == last]
            of = {r["provider"]: r for r in sorted(found, key=lambda r: r["ratio"])}
            reached = "yes" if of["milora"]["ratio"] <= goal else "no"
            rivals = [ratio(of.get(name)) for name in ("peft", "stacked")]
            shown = ratio(of["milora"])
            rows.append(
                (case, what, dtype, shown, f"≤ {goal}", reached, floor(of["milora"]), *rivals)
            )
    head = ("case", "what", "dtype", "milora", "target", "reached", "floor", "peft", "stacked")
    return table(head, rows)


def sweeps(records: list[dict]) -> str:
    """One row a case and point, the headline's among them; one column a provider and dtype."""
    points: dict[tuple, dict[tuple[str, str], dict]] = {}
    for r in records:
        mine = r["bench"] == "multitenant" and r["case"] in ("c1", "c2") and not r.get("quick")
        if mine and r["metric"] == "decode_step" and r["shape"].startswith(FULL_SHAPE):
            point = (r["case"], r["batch"], r["rank"], r["popularity"])
            points.setdefault(point, {})[r["provider"], r["dtype"]] = r
    if len(points) <= 2:  # the headlines alone
        return ""
    columns = [(p, d) for d in ("float32", "bfloat16") for p in ("milora", "stacked", "peft")]
    rows = [
        (*map(str, point), *(ratio(found.get(column)) for column in columns))
        for point, found in sorted(points.items())
    ]
    head = ("case", "batch", "rank", "mix", *map(", ".join, columns))
    return SWEEP_HEAD + table(head, rows)


def is_headline(record: dict) -> bool:
    """Whether a record is a case's own measure, at the shape that the targets are for."""
    own = {"c3": "prefill", "c4": "decode_step_growth", "t1": "training_step"}
    if record["metric"] != own.get(record["case"], "decode_step"):
        return False
    shape = record["shape"].startswith(FULL_SHAPE) and record["batch"] == 8 and record["rank"] == 32
    return shape and (record["case"] == "c4" or record["popularity"] == "distinct")


def profiles(records: list[dict]) -> str:
    found: dict[tuple, dict[str, float]] = {}
    for r in records:
        if r["metric"].startswith("profile_") and not r.get("quick"):
            key = (r["case"], r["dtype"])
            found.setdefault(key, {})[r["metric"].removeprefix("profile_")] = r["value"]
    if not found:
        return ""
    rows = [
        (*key, *(f"{parts[name]:.2f}" for name in PROFILE), f"{parts['op_calls']:.0f}")
        for key, parts in sorted(found.items())
    ]
    return PROFILE_HEAD + table(("case", "dtype", *PROFILE, "op calls"), rows)


if __name__ == "__main__":
    main()
