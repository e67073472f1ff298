"""The routing heat map: blocks by experts, one panel per task (the paper's Figure 2)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from milora.cli.plots import draw_heat_map

_COLUMNS = 2


def draw_heatmap(shares: dict[str, Tensor], experts: list[str], path: Path) -> None:
    """Write a PNG of `shares`: task -> [num_blocks, num_experts], share of prompts in [0, 1]."""
    # The object interface with the Agg canvas: pyplot would touch the caller's own backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows = -(-len(shares) // _COLUMNS)
    figure = Figure(figsize=(10, 1.2 + 2.9 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, _COLUMNS, squeeze=False)
    for axis, (task, share) in zip(axes.flat, shares.items(), strict=False):
        image = draw_heat_map(axis, share.tolist(), experts, task)
    for axis in list(axes.flat)[len(shares) :]:
        axis.remove()
    figure.colorbar(image, ax=axes, label="share of held-out prompts that keep the expert")
    figure.suptitle("MiLoRA: which experts each task keeps")
    figure.savefig(path, dpi=120)
