"""Deep language models by settled predictive coding: 2, 6 and 12 blocks of the paper's width, with four heads.

Nobody has published a competitive perplexity of a settled PC transformer of more than one block. BP and PC, each at the
best of the same learning rates, with a warm-up that both can use (see ``paper_early.py``); ``--data`` as in
``paper_lm.py``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from paper_lm import LONG_WARMUP, TINY, plot, run, table, tuning_table
from runs import Settings, load, tuned

BLOCKS = (2, 6, 12)
PAPER_WIDTH: Settings = {"width": 128, "heads": 4, "context": 64, "vocabulary": 2048, "batch": 16}
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0,)
STEPS = 300


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of each depth and of the tuning, and a PNG of the curves."""
    common = TINY | {"steps": 20} if quick else PAPER_WIDTH | {"steps": STEPS, "warmup": LONG_WARMUP}
    depths = (1, 2) if quick else BLOCKS
    tables, every = [], []
    for blocks in depths:
        variants = [common | {"blocks": blocks, "method": method} for method in ("bp", "pc")]
        results = tuned(out, variants, RATES[:1] if quick else RATES, SEEDS, partial(run, data=data), jobs)
        every += results
        tables.append(f"{blocks} blocks:\n\n{table(results)}")
        plot(every, out.with_suffix(".png"))
    return "\n\n".join([*tables, tuning_table(load(out)["runs"])])
