"""A report as one self-contained HTML page, with what the numbers mean and curves as inline SVG. It loads nothing."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from .report import PER_NODE, Report, table

Curve = tuple[Sequence[float], Sequence[float]]
"""The x and y values of a line."""
INK = "#012345"
"""A stand-in for the page's text colour, which replaces it in each figure. So a dark page has light axes."""

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { overflow-wrap: anywhere; line-height: 1.2; }
h2 { margin-top: 2.5rem; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 1.75rem; }
dt { font-size: .8rem; opacity: .7; }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: right; }
.meaning td { text-align: left; vertical-align: top; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
.beside { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: start; }
.beside figure { flex: 1 1 17rem; max-width: 21rem; }
figure { margin: 0; }
figcaption { font-weight: 600; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; }
@media (max-width: 40rem) { table { font-size: .75rem; } th, td { padding: .25rem; } }
"""
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>"""


def page(
    title: str,
    report: Report | None,
    history: Sequence[Mapping[str, float]] = (),
    losses: Sequence[float] = (),
    facts: Mapping[str, Any] | None = None,
) -> str:
    """The text of an HTML page about a trained model. Write it to a file in UTF-8.

    title: the heading. report: how settled inference is, or None for backpropagation. history: the evaluations. Each
    has its step and numbers by name, as in ``{"step": 100, "perplexity": 93.2, **report.scalars()}``. Each name has a
    plot; the nodes share one for energy, residual and precision each. losses: one a training step, from step 1. facts:
    other things to state, by name.

    Raises ValueError for a row of history without its step, or with a value that is no number.
    """
    for number, row in enumerate(history):
        if "step" not in row:
            raise ValueError(f"row {number} of history has no step: give each the training step it is of")
        for name, value in row.items():
            if not isinstance(value, (int, float)):
                raise ValueError(f"row {number} of history: {name} is {value!r}: give a Python number, or leave it out")
    parts = [f"<h1>{escape(title)}</h1>"]
    if facts:
        items = (f"<div><dt>{escape(name)}</dt><dd>{escape(str(fact))}</dd></div>" for name, fact in facts.items())
        parts.append(f"<dl>{''.join(items)}</dl>")
    if report is None:
        parts.append("<p>Trained by backpropagation: there is no inference.</p>")
    else:
        moves = range(len(report.free_energies))
        fall = _plot(
            "F per item; dashed: a long run",
            [(moves, report.free_energies)],
            "moves of the states",
            report.long_run,
        )
        parts += [
            f"<h2>Inference</h2><p>{_verdict(report)}</p><div class=beside>{_meaning(report)}{fall}</div>",
            f"<h2>Value nodes, in the order of the forward pass</h2><div class=wide>{table(report)}</div>",
            "<p>Energy: nats per item. Residual: the norm of the natural gradient in the node's states that is left "
            "where the weights learn, in units of that at the prediction: 0 is settled.</p>",
        ]
    curves: dict[str, list[Curve]] = {}
    if losses:
        curves["training loss"] = [(range(1, len(losses) + 1), losses)]
    for name in dict.fromkeys(name for row in history for name in row if name != "step"):
        rows = [row for row in history if name in row]
        curve = [row["step"] for row in rows], [row[name] for row in rows]
        group = name.partition("/")[0]
        curves.setdefault(f"{group} by node" if "/" in name and group in PER_NODE else name, []).append(curve)
    if curves:
        plots = (_plot(name.replace("_", " "), lines, "training step") for name, lines in curves.items())
        parts.append(f"<h2>Training</h2><div class=plots>{''.join(plots)}</div>")
    return "\n".join([HEAD.format(title=escape(title), style=STYLE), *parts, "</body></html>\n"])


def _verdict(report: Report) -> str:
    if len(report.free_energies) == 1:
        return "The states stay at their predictions: this is backpropagation."
    if report.settled >= 0.9:
        return (
            "Inference is settled where the weights learn: they learn from predictive coding's equilibrium. With a "
            "high precision that lies close to backpropagation: see the cosine."
        )
    return (
        "Inference is <strong>not settled</strong> where the weights learn: give it more steps, or compare the nodes' "
        "residuals for where it lags."
    )


def _meaning(report: Report) -> str:
    rows = (
        ("settled", f"{report.settled:.1%}", "of the fall of F that a long run reaches is made before learning"),
        ("explained", f"{report.explained:.2%}", "of F is explained away by moving the states"),
        ("residual", f"{report.residual:.2g}", "of the states' natural gradient is left; at their predictions it is 1"),
        ("cosine", f"{report.cosine:.4f}", "of the weight gradient to backpropagation's; 1 is its direction"),
        ("worst cosine", f"{report.worst_cosine:.3f}", "of the gradient of one parameter to backpropagation's"),
        ("total to local", f"{report.total_to_local:.4f}", "norm of the weight gradient over each node's own"),
    )
    lines = "".join(f"<tr><td>{name}</td><td>{number}</td><td>{text}</td></tr>" for name, number, text in rows)
    return f"<table class=meaning><tbody>{lines}</tbody></table>"


def _plot(caption: str, lines: Sequence[Curve], xlabel: str, level: float | None = None) -> str:
    """A figure of curves, coloured in order, with a dashed line at ``level``; y is logarithmic over a wide range."""
    colors = matplotlib.colormaps["viridis"]([0.4 + 0.45 * k / max(1, len(lines) - 1) for k in range(len(lines))])
    ink = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    style: dict[Any, Any] = {**dict.fromkeys(ink, INK), "svg.fonttype": "none", "svg.hashsalt": caption}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 3), layout="constrained")
        axes = figure.subplots()
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
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r' (xmlns(:xlink)?="[^"]*"|id="[\w.]+_\d+")', "", svg[svg.index("<svg") :])
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg.replace(INK, 'currentColor')}</figure>"
