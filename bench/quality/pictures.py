"""The report's plots, small PNG files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

Points = Mapping[str, Mapping[int, float]]  # label -> seed -> value


def _figure(columns: int, width: float, height: float, share_y: bool = False):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # pyplot would touch the caller's own backend
    return figure, figure.subplots(1, columns, squeeze=False, sharey=share_y)[0]


def shrink(path: Path) -> None:
    """Rewrite a PNG with a palette of 128 colours: a third of its size, and no eye sees it."""
    image = Image.open(path).convert("RGB")
    image.quantize(128).save(path, optimize=True)


def draw_methods(panels: Mapping[str, Points], path: Path) -> None:
    """A dot per seed and a bar at the median; one panel per metric."""
    figure, axes = _figure(len(panels), 9, 3.2)
    for axis, (title, methods) in zip(axes, panels.items(), strict=True):
        for place, values in enumerate(methods.values()):
            every = list(values.values())
            axis.plot([place] * len(every), every, "o", color="#2563eb", alpha=0.5, markersize=4)
            axis.hlines(statistics.median(every), place - 0.3, place + 0.3, color="#111")
        axis.set_xticks(range(len(methods)), list(methods), rotation=45, ha="right")
        axis.set_title(title)
        axis.grid(axis="y", color="#e5e7eb")
    figure.savefig(path, dpi=90)


def draw_ablations(
    panels: Mapping[str, Points], reference: Mapping[int, float], path: Path
) -> None:
    """Loss against a setting's values; the default's median is the dashed line."""
    figure, axes = _figure(len(panels), 11, 3.2, share_y=True)
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        medians = [statistics.median(values.values()) for values in points.values()]
        axis.plot(range(len(points)), medians, "-", color="#2563eb")
        for place, values in enumerate(points.values()):
            axis.plot([place] * len(values), list(values.values()), "o", color="#2563eb", alpha=0.5,
                      markersize=4)  # fmt: skip
        axis.axhline(statistics.median(reference.values()), color="#6b7280", linestyle="--")
        axis.set_xticks(range(len(points)), list(points))
        axis.set_xlabel(title)
        axis.grid(axis="y", color="#e5e7eb")
    axes[0].set_ylabel("held-out loss")
    figure.savefig(path, dpi=90)


def draw_entropy(by_step: Mapping[int, Mapping[int, float]], limit: float, path: Path) -> None:
    """Mean entropy of the routes over training, a line per seed."""
    figure, (axis,) = _figure(1, 6, 3)
    steps = sorted(by_step)
    for seed in sorted(by_step[steps[0]]):
        axis.plot(steps, [by_step[s][seed] for s in steps], label=f"seed {seed}")
    axis.axhline(limit, color="#6b7280", linestyle="--", label="indifferent")
    axis.set(xlabel="step", ylabel="entropy of p, nats")
    axis.legend()
    axis.grid(axis="y", color="#e5e7eb")
    figure.savefig(path, dpi=90)
