"""Draw time against batch size and against number of tenants, one SVG a picture.

python bench/plot.py results.jsonl [...] --out build/plots
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from html import escape
from pathlib import Path

from results import newest, read

AXES = {"batch": "batch size", "registered": "registered adapters", "num_tenants": "tenants"}
COLOURS = {
    "base": "#6b7280",
    "milora": "#2563eb",
    "stacked": "#d97706",
    "peft": "#dc2626",
    "reference": "#7c3aed",
}
WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 120, 40, 50  # margins; the right one holds the lines' names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jsonl", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/plots"), metavar="DIR")
    args = parser.parse_args()
    records = newest([record for path in args.jsonl for record in read(path)])
    args.out.mkdir(parents=True, exist_ok=True)
    for name, title, axis, unit, lines in pictures(records):
        path = args.out / f"{name}.svg"
        path.write_text(draw(title, AXES[axis], unit, lines))
        print(path)


def pictures(records: list[dict]) -> Iterator[tuple[str, str, str, str, dict]]:
    """Everything that was measured at two or more points of an axis, all else equal.

    Yields: file name, title, axis, unit, {provider: [(x, value)]}.
    """
    drawn = [r for r in records if r["unit"] in ("ms", "us") and r["provider"] in COLOURS]
    drawn = [r for r in drawn if not r["metric"].startswith("profile_")]
    for axis in AXES:
        found: dict[tuple, dict[str, dict[float, float]]] = {}
        for r in drawn:
            if r.get(axis) is not None and (axis == "registered" or "registered" not in r):
                values = found.setdefault(all_else(r, axis), {}).setdefault(r["provider"], {})
                values[r[axis]] = r["value"]
        for key, points in found.items():
            xs = {x for values in points.values() for x in values}
            if len(xs) < 2:
                continue
            if axis == "registered":  # the base has none: the same time at all points
                bare = [{**r, "popularity": key[-2]} for r in drawn if r["provider"] == "base"]
                base = [r for r in bare if all_else(r, axis) == key]
                if base:
                    points["base"] = dict.fromkeys(xs, base[0]["value"])
            name = "-".join(str(part) for part in (*key, axis) if part is not None)
            name = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
            bench, case, metric, dtype, shape, *_, unit = key
            title = f"{bench} {case}: {metric}, {dtype}, {shape}"
            yield name, title, axis, unit, {p: sorted(v.items()) for p, v in points.items()}


def all_else(record: dict, axis: str) -> tuple:
    """What must agree for two measurements to be points of one line along `axis`."""
    # Case names of the op benches begin with their kind and repeat what the fields say.
    key = [record["bench"], record["case"].split()[0], record["metric"], record["dtype"]]
    key += [record.get("shape"), record.get("rank"), record.get("threads")]
    key.append(None if axis == "batch" else record.get("batch"))
    is_free = axis == "num_tenants"
    key += [None if is_free else record.get(name) for name in ("tenants", "popularity")]
    return (*key, record["unit"])


def draw(title: str, axis: str, unit: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG with logarithmic axes, a line per provider, its name at its end."""
    xs = sorted({x for line in lines.values() for x, _ in line})
    ys = [y for line in lines.values() for _, y in line]
    low, high = min(ys) / 1.2, max(ys) * 1.2

    def at_x(x: float) -> float:
        share = math.log(x / xs[0]) / math.log(xs[-1] / xs[0]) if xs[-1] > xs[0] else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - math.log(y / low) / math.log(high / low) * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#111") -> str:
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
        return f"<text {place}>{escape(words)}</text>"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 22, title, "start"),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, axis),
    ]
    for x in xs:
        parts.append(text(at_x(x), HEIGHT - BOTTOM + 18, f"{x:g}"))
    for y in ticks(low, high):
        parts.append(
            f'<path d="M{LEFT} {at_y(y):.1f}H{WIDTH - RIGHT}" stroke="#e5e7eb" fill="none"/>'
        )
        parts.append(text(LEFT - 8, at_y(y) + 4, f"{y:g} {unit}", "end"))
    taken: list[float] = []  # heights of the names so far, which must not overlap
    for provider, line in sorted(lines.items(), key=lambda item: at_y(item[1][-1][1])):
        colour = COLOURS[provider]
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in line)
        parts.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        for x, y in line:
            parts.append(f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" fill="{colour}"/>')
        height = max([at_y(line[-1][1]) + 4, *(other + 14 for other in taken)])
        taken.append(height)
        parts.append(text(at_x(line[-1][0]) + 10, height, provider, "start", colour))
    return "\n".join([*parts, "</svg>", ""])


def ticks(low: float, high: float) -> list[float]:
    """Round values between two: the coarsest steps of which at least three lie there."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), [n / 10 for n in range(10, 100)]):
        every = [step * 10.0**exponent for exponent in exponents for step in steps]
        values = [value for value in every if low <= value <= high]
        if len(values) >= 3:
            break
    return values


if __name__ == "__main__":
    main()
