"""Deep language models by settled predictive coding: that of ``paper_lm.py`` with 2, 6 and 12 blocks of four heads.

Nobody has published a competitive perplexity of a settled PC transformer of more than one block. BP and PC, each at the
best of the same learning rates; ``--data`` as in ``paper_lm.py``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from paper_lm import RATES, base, plot, run, table, tuning_table
from runs import load, tuned

BLOCKS = (2, 6, 12)
SEEDS = (0,)


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of each depth and of the tuning, and a PNG of the curves."""
    common = base(data, quick) | ({} if quick else {"heads": 4})
    depths = (1, 2) if quick else BLOCKS
    tables, every = [], []
    for blocks in depths:
        variants = [common | {"blocks": blocks, "method": method} for method in ("bp", "pc")]
        results = tuned(out, variants, RATES[:1] if quick else RATES, SEEDS, partial(run, data=data), jobs)
        every += results
        tables.append(f"{blocks} blocks:\n\n{table(results)}")
        plot(every, out.with_suffix(".png"))
    return "\n\n".join([*tables, tuning_table(load(out)["runs"])])
