"""What inference states in bfloat16 change: the same trainings with states in float32 and in bfloat16.

The model of ``pc-triton train`` by PC in error order, whose states are the errors e = u - mu, with T = 3, and shorter
with T = 8, at one learning rate; every pair of runs has its seed, and with it weights and batches, in common.
``--data`` as in ``paper_lm.py``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from paper_lm import DEFAULT, PAPER, TINY, run
from runs import Record, Settings, complete, markdown, mean_and_std, regime, score, spread

TRAINING: dict[int, Settings] = {3: {"steps": 300}, 8: {"steps": 60, "warmup": 0.25}}
"""By T; in both the rate rises for 15 training steps. Where it rises faster the loss jumps, and any rounding grows."""
KINDS = ("float32", "bfloat16")
SEEDS = (0, 1, 2)
LR = 4e-3


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of them, and a PNG of what the states' dtype changes in training."""
    model = TINY if quick else DEFAULT if data is None else PAPER
    common = model | {"method": "pc", "order": "error", "lr": LR, "tuning": False}
    wanted = [
        common | ({"steps": 20} if quick else training) | {"inference_steps": t, "state_dtype": kind, "seed": seed}
        for t, training in TRAINING.items()
        for seed in (SEEDS[:1] if quick else SEEDS)
        for kind in KINDS
    ]
    records = complete(out, wanted, partial(run, data=data), jobs)
    groups = {f"T = {t}": {kind: of(records, t, kind) for kind in KINDS} for t in TRAINING}
    plot(groups, out.with_suffix(".png"))
    return table(records)


def of(records: list[Record], t: int, kind: str) -> list[Record]:
    """Those of that T and dtype, by seed."""
    kept = [r for r in records if (r["settings"]["inference_steps"], r["settings"]["state_dtype"]) == (t, kind)]
    return sorted(kept, key=lambda record: record["settings"]["seed"])


def table(records: list[Record]) -> str:
    """Markdown: held-out perplexity by T and dtype, what bfloat16 changes in it seed by seed, and the regime."""
    seeds = sorted({record["settings"]["seed"] for record in records})
    rows = []
    for t in TRAINING:
        for kind in KINDS:
            some, other = of(records, t, kind), of(records, t, KINDS[0])
            changes = [100 * (score(a) / score(b) - 1) for a, b in zip(some, other)]
            change = "" if kind == KINDS[0] else mean_and_std(changes, 2, "+") + " %"
            steps = str(some[0]["settings"]["steps"])
            rows.append([f"{t}", steps, kind, *(spread([r]) for r in some), spread(some), change, regime(some)])
    each = [f"seed {seed}" for seed in seeds]
    heads = ["T", "training steps", "states", *each, "mean ± std", "change by bfloat16", "regime"]
    return markdown(heads, rows)


def plot(groups: dict[str, dict[str, list[Record]]], png: Path) -> None:
    """Left held-out perplexity, means over the seeds; right how far the losses of a pair of runs part.

    groups: by training and by dtype, float32's first, the runs by seed.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, by_kind) in enumerate(groups.items()):
        for (kind, some), style in zip(by_kind.items(), ("-", "--")):
            each: list[Any] = [record["evaluations"] for record in some if "evaluations" in record]
            values = [mean(row["perplexity"] for row in rows) for rows in zip(*each)]
            label = f"{name}, {kind}"
            left.plot([row["step"] for row in each[0]], values, style, color=f"C{number}", marker=".", label=label)
        for seed, pair in enumerate(zip(*by_kind.values())):
            a, b = (record["losses_every_10th"] for record in pair)
            parts = [abs(x - y) / x for x, y in zip(a, b)]
            label = None if seed else f"{name}, each seed"
            right.plot([10 * k for k in range(len(parts))], parts, color=f"C{number}", label=label)
    left.set(xlabel="training step", ylabel="held-out perplexity per token", yscale="log")
    right.set(xlabel="training step", ylabel="relative difference of the loss to float32's", yscale="log")
    left.legend()
    right.legend()
    figure.savefig(png, dpi=120)
