"""What products of 8 bits in the passes of inference change: the same trainings with and without them.

The model of ``pc-triton train`` by PC in error order with T = 2, and one of twice its depth and half its width; every
pair of runs has its seed, and with it weights and batches, in common. A CPU emulates the products: their operands are
rounded, and multiplied in float32. ``--data`` as in ``paper_lm.py``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import paper_lm
from paper_lm import DEFAULT, PAPER, TINY
from paper_states import plot
from runs import Record, Settings, complete, markdown, mean_and_std, regime, score, spread

CASES: dict[str, Settings] = {
    "2 blocks of width 128, 500 steps": {"steps": 500},
    "4 blocks of width 64, 250 steps": {"steps": 250, "blocks": 4, "width": 64},
}
KINDS = ("float32", "float8_e4m3fn")
"""What products in the passes of inference are made of; the learning pass is in float32."""
SEEDS = (0, 1, 2)
LR = 4e-3


def run(settings: Settings, data: Path | None) -> Record:
    """As `paper_lm.run`, with the dtype of inference."""
    kind = settings["inference_dtype"]
    return paper_lm.run(settings | {"inference_dtype": "same" if kind == KINDS[0] else kind}, data)


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of them, and a PNG of how far the trainings part."""
    cases = {"tiny": TINY | {"steps": 20}} if quick else {name: DEFAULT | case for name, case in CASES.items()}
    if data is not None and not quick:
        cases = {"the paper's": PAPER | {"steps": 500}}
    common: Settings = {"method": "pc", "order": "error", "inference_steps": 2, "lr": LR, "tuning": False}
    groups: dict[str, dict[str, list[Record]]] = {}
    for name, case in cases.items():
        seeds = SEEDS[:1] if quick else SEEDS
        wanted = [case | common | {"seed": seed, "inference_dtype": kind} for seed in seeds for kind in KINDS]
        records = complete(out, wanted, partial(run, data=data), jobs)
        groups[name] = {kind: records[number :: len(KINDS)] for number, kind in enumerate(KINDS)}
    plot(groups, out.with_suffix(".png"))
    return table(groups)


def table(groups: dict[str, dict[str, list[Record]]]) -> str:
    """Markdown: held-out perplexity by case and dtype, what 8 bits change in it seed by seed, and the regime."""
    rows = []
    for name, by_kind in groups.items():
        for kind, some in by_kind.items():
            changes = [100 * (score(a) / score(b) - 1) for a, b in zip(some, by_kind[KINDS[0]])]
            change = "" if kind == KINDS[0] else mean_and_std(changes, 2, "+") + " %"
            rows.append([name, kind, *(spread([r]) for r in some), spread(some), change, regime(some)])
    seeds = sorted({r["settings"]["seed"] for by_kind in groups.values() for some in by_kind.values() for r in some})
    heads = ["training", "inference", *(f"seed {seed}" for seed in seeds), "mean ± std", "change by 8 bits", "regime"]
    return markdown(heads, rows)
