"""Figures as inline SVG, for a page or a notebook. They load nothing, and take the text's colour, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]
"""The x and y values of a line."""
INK = "#012345"
"""A stand-in for the text's colour, which replaces it in each figure. So a dark page has light axes."""
COLORS = matplotlib.colormaps["viridis"]
"""Even to the eye, and readable by the colour-blind."""


def curves(caption: str, lines: Sequence[Curve], xlabel: str, level: float | None = None) -> str:
    """A figure of lines, coloured in order, with a dashed line at ``level``; y is logarithmic over a wide range."""
    colors = COLORS([0.5] if len(lines) == 1 else [0.35 + 0.4 * k / (len(lines) - 1) for k in range(len(lines))])

    def draw(figure: Figure, axes: Axes) -> None:
        for (x, y), color in zip(lines, colors):
            axes.plot(x, y, color=color, marker="o" if len(x) < 30 else "", markersize=3, linewidth=1.2)
        if level is not None:
            axes.plot(axes.get_xlim(), (level, level), color=INK, linestyle="--", linewidth=0.8)
        values = [v for _, y in lines for v in y if math.isfinite(v)]
        if values and 0 < 10 * min(values) < max(values):
            axes.set_yscale("log")
        axes.set_xlabel(xlabel)
        axes.locator_params("x", integer=True)
        if len(lines) > 1:
            norm = BoundaryNorm([k + 0.5 for k in range(len(lines) + 1)], len(lines))
            ticks = range(1, len(lines) + 1, -(-len(lines) // 12))
            figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=axes, label="node", ticks=ticks)

    each = [f"{y[0]:.4g} to {y[-1]:.4g}" for _, y in lines if len(y)]
    seen = f"from {each[0]}" if len(each) == 1 else f"{len(each)} lines"
    return _figure(caption, f"{caption}, by {xlabel}: {seen}", draw)


def heat_map(energies: Sequence[Sequence[float]]) -> str:
    """The energies of all nodes over inference, a row a node; ``energies[t]`` holds them after t moves.

    The colours are logarithmic over a wide range; then energies below a millionth of the largest are grey, since the
    rounding of a node's prediction can be as much. From 2 to some hundred nodes.
    """
    rows = [list(row) for row in zip(*energies)]
    values = [v for row in rows for v in row if math.isfinite(v)]
    most, lowest = max(values, default=0.0), min(values, default=0.0)
    least = min((v for v in values if v > most * 1e-6), default=most)
    wide = lowest >= 0 and 10 * least < most
    norm = LogNorm(least, most) if wide else Normalize(min(0.0, lowest), most if most > 0 else 1.0)

    def draw(figure: Figure, axes: Axes) -> None:
        area = -0.5, len(energies) - 0.5, len(rows) + 0.5, 0.5
        options: dict[str, Any] = {"cmap": COLORS.with_extremes(bad="#8884"), "norm": norm, "extent": area}
        shown = [[v if v >= least or not wide else math.nan for v in row] for row in rows]
        image = axes.imshow(shown, aspect="auto", interpolation="none", **options)
        axes.set(xlabel="moves of the states", ylabel="node")
        axes.locator_params(integer=True)
        figure.colorbar(image, ax=axes, label="nats per item")

    note = "; grey: under a millionth of the most" if wide else ""
    last = ", ".join(f"{v:.3g}" for v in energies[-1])
    about = f"energy by node and move of the states, {len(rows)} nodes; after the last move: {last}"
    return _figure(f"energy by node{note}", about, draw, height=min(6.0, max(3.0, len(rows) / 25)))


def _figure(caption: str, about: str, draw: Callable[[Figure, Axes], None], height: float = 3.0) -> str:
    """What ``draw`` puts on the axes, under a caption; about: for those who do not see it."""
    ink = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    style: dict[Any, Any] = {**dict.fromkeys(ink, INK), "svg.fonttype": "none", "svg.hashsalt": caption}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        draw(figure, figure.subplots())
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r' (xmlns(:xlink)?="[^"]*"|id="[\w.]+_\d+")', "", svg[svg.index("<svg") :])
    shown = f'<svg role="img" aria-label="{escape(about)}" style="width:100%;height:auto"'
    svg = svg.replace("<svg", shown, 1).replace(INK, "currentColor")
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
