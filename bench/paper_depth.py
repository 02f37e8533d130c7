"""Deep language models by settled predictive coding: 2, 6 and 12 blocks of the paper's width, with four heads.

Nobody has published a competitive perplexity of a settled PC transformer of more than one block. BP and PC, each at the
best of the same learning rates, with a warm-up that both can use (see ``paper_early.py``); ``--data`` as in
``paper_lm.py``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from paper_lm import LONG_WARMUP, TINY, run, table, tuning_table
from runs import DIVERGED, Record, Settings, load, score, tuned

BLOCKS = (2, 6, 12)
PAPER_WIDTH: Settings = {"width": 128, "heads": 4, "context": 64, "vocabulary": 2048, "batch": 16}
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0,)
STEPS = 300


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of each depth and of the tuning, and a PNG of them."""
    common = (
        TINY | {"steps": 20} if quick else PAPER_WIDTH | {"steps": STEPS, "eval_every": STEPS, "warmup": LONG_WARMUP}
    )
    tables = []
    for blocks in (1, 2) if quick else BLOCKS:
        variants = [common | {"blocks": blocks, "method": method} for method in ("bp", "pc")]
        results = tuned(out, variants, RATES[:1] if quick else RATES, SEEDS, partial(run, data=data), jobs)
        tables.append(f"{blocks} blocks:\n\n{table(results)}")
    runs = load(out)["runs"]
    plot(runs, out.with_suffix(".png"))
    return "\n\n".join([*tables, tuning_table(runs)])


def plot(runs: list[Record], png: Path) -> None:
    """Perplexity over the number of blocks, at each method's best rate; in tuning at every rate."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, color in (("bp", "C0"), ("pc", "C1")):
        styles: Any = ((True, {"linestyle": "", "marker": "x"}), (False, {"marker": "o"}))
        for tuning, style in styles:
            of_it = [r for r in runs if (r["settings"]["method"], r["settings"]["tuning"]) == (method, tuning)]
            points = sorted((r["settings"]["blocks"], score(r)) for r in of_it if score(r) < DIVERGED)
            label = f"{method}, in tuning, every rate" if tuning else method
            axes.plot(*zip(*points), color=color, label=label, alpha=0.5 if tuning else 1, **style)
    axes.set(xlabel="transformer blocks", ylabel="held-out perplexity per token", xscale="log")
    blocks = sorted({record["settings"]["blocks"] for record in runs})
    axes.set_xticks(blocks, list(map(str, blocks)))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(png, dpi=120)
