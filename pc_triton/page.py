"""A report as one self-contained HTML page, with what the numbers mean and curves as inline SVG. It loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .plots import Curve, curves, heat_map
from .report import PER_NODE, Report, table, words

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
body { overflow-wrap: anywhere; }
h1 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 1.75rem; }
dt { font-size: .8rem; opacity: .7; }
dd { margin: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: right; }
th, td { overflow-wrap: normal; }
.meaning { margin-bottom: 1.5rem; }
.meaning td { text-align: left; vertical-align: top; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-weight: 600; }
@media (max-width: 40rem) {
  table { font-size: .75rem; }
  th, td { padding: .25rem .2rem; }
  td[style] { min-width: 0 !important; }
}
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
        falls = [(moves, report.free_energies)]
        plots = curves("F per item; dashed: a long run", falls, "moves of the states", report.long_run)
        plots += heat_map(report.energies) if report.energies and report.nodes else ""
        parts += [
            f"<h2>Inference</h2><p>{words(report)}</p>{_meaning(report)}<div class=plots>{plots}</div>",
            f"<h2>Value nodes, in the order of the forward pass</h2>{table(report)}",
            "<p>Energy: nats per item. Residual: the norm of the natural gradient in the node's states that is left "
            "where the weights learn, in units of that at the prediction: 0 is settled.</p>",
        ]
    lines: dict[str, list[Curve]] = {}
    if losses:
        lines["training loss"] = [(range(1, len(losses) + 1), losses)]
    for name in dict.fromkeys(name for row in history for name in row if name != "step"):
        rows = [row for row in history if name in row]
        curve = [row["step"] for row in rows], [row[name] for row in rows]
        group = name.partition("/")[0]
        lines.setdefault(f"{group} by node" if "/" in name and group in PER_NODE else name, []).append(curve)
    if lines:
        plots = "".join(curves(name.replace("_", " "), each, "training step") for name, each in lines.items())
        parts.append(f"<h2>Training</h2><div class=plots>{plots}</div>")
    return "\n".join([HEAD.format(title=escape(title), style=STYLE), *parts, "</body></html>\n"])


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
