"""The routing heat map: blocks by experts, one panel per task (the paper's Figure 2)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

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
        image = axis.imshow(share.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(task)
        axis.set_xticks(range(len(experts)), experts, rotation=45, ha="right")
        axis.set_yticks(range(len(share)))
        axis.set_ylabel("block")
        for block, row in enumerate(share.tolist()):
            for expert, value in enumerate(row):
                color = "black" if value > 0.6 else "white"
                axis.text(
                    expert, block, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7
                )
    for axis in list(axes.flat)[len(shares) :]:
        axis.remove()
    figure.colorbar(image, ax=axes, label="share of held-out prompts that keep the expert")
    figure.suptitle("MiLoRA: which experts each task keeps")
    figure.savefig(path, dpi=120)
