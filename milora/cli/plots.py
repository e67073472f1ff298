"""Plots as PNG files; matplotlib is imported late, and draws without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from milora.cli.console import check_writable_file
from milora.errors import UserError
from milora.train.metrics import read_metrics, short_names


def check_plot_file(path: Path) -> None:
    """Refuse a file that cannot be drawn before the work whose result it shows.

    Raises:
        UserError: its name has no ending that matplotlib writes, or it cannot be written.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    # Not pgf: matplotlib has LaTeX measure its text, and fails where there is none.
    formats = sorted(FigureCanvasBase.get_supported_filetypes().keys() - {"pgf"})
    endings = [f".{name}" for name in formats]
    if path.suffix.lower() not in endings:
        raise UserError(f"cannot draw {path}: its name must end in one of {', '.join(endings)}")
    check_writable_file(path)


def _figure(columns: int, width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps global state and picks a backend for the whole process.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_heat_map(axis, values: Sequence[Sequence[float]], names: Sequence[str], title: str):
    """Blocks downwards, experts across; white is never, the darkest is always.

    Args:
        values: [num_blocks][num_experts] in [0, 1].
        names: of the experts, in the columns' order.
    """
    image = axis.imshow(values, aspect="auto", cmap="Blues", vmin=0.0, vmax=1.0)
    axis.set_title(title)
    axis.set_xlabel("expert")
    axis.set_ylabel("block")
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    if len(values) <= 12:
        axis.set_yticks(range(len(values)))
    if len(values) * len(names) <= 128:
        for row, shares in enumerate(values):
            for column, share in enumerate(shares):
                colour = "white" if share > 0.6 else "black"
                axis.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour)
    return image


def draw_routing(
    path: Path, panels: Sequence[tuple[str, Sequence[Sequence[float]], Sequence[str]]]
) -> None:
    """Draw heat maps side by side (the paper's Figure 2).

    Args:
        path: the file; its ending says the format.
        panels: (title, values [num_blocks][num_experts], expert names) each.

    Raises:
        UserError: the file cannot be written.
    """
    blocks = max(len(values) for _, values, _ in panels)
    figure, axes = _figure(len(panels), 1.0 + 4.4 * len(panels), max(3.2, 1.6 + 0.28 * blocks))
    for axis, (title, values, names) in zip(axes, panels, strict=True):
        image = draw_heat_map(axis, values, names, title)
    figure.colorbar(image, ax=list(axes), label="share of prompts")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def draw_training(metrics: Path, path: Path) -> None:
    """Draw a metrics file: losses over the steps, and at the end of training how often each
    expert leads in each block.

    Args:
        metrics: the file that `MiLoRACallback` wrote.
        path: PNG file.
    """
    experts, lines = read_metrics(metrics)
    routed = [line for line in lines if line.get("shares")]
    figure, axes = _figure(2 if routed else 1, 11.0 if routed else 6.0, 4.4)
    _draw_losses(axes[0], lines)
    if routed:
        shares = routed[-1]["shares"]
        columns = max(experts, key=len)
        width = len(columns)
        values = [[*row, *[0.0] * (width - len(row))] for row in shares]
        names = list(short_names(columns).values())
        title = f"share of prompts led by each expert, step {routed[-1]['step']}"
        image = draw_heat_map(axes[1], values, names, title)
        figure.colorbar(image, ax=axes[1])
    figure.savefig(path, dpi=120)


def _draw_losses(axis, lines: list[dict]) -> None:
    for key, label, style in (
        ("loss", "training loss", "-"),
        ("eval_loss", "dev loss", "o-"),
        ("balance_loss", "balance loss (1: balanced)", ":"),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=3)
    axis.set_xlabel("step")
    axis.set_title("loss")
    axis.legend()
    axis.grid(alpha=0.3)
