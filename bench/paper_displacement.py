"""What sets PC apart from BP: how far inference moves, from next to nothing to all it can, through a whole training.

A four-block transformer at one learning rate. The displacement delta, the part of F that inference may explain away,
sets each node's precision: per sample, as the library does, or per batch, one precision for all its samples. Against it
stand precisions fixed for the whole training, and more inference steps where three do not settle. For every run the
table says where its inference ended; ``--data`` as in ``paper_lm.py``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import paper_lm
from matplotlib.figure import Figure
from paper_lm import LONG_WARMUP, TINY, table
from runs import Record, Settings, complete, score
from torch import Tensor

from pc_triton.node import Node
from pc_triton.rules import Displacement

FOUR_BLOCKS: Settings = {"width": 64, "heads": 4, "blocks": 4, "context": 32, "vocabulary": 1024, "batch": 16}
DISPLACEMENTS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
PRECISIONS = ("1", "10", "100", "1000")
SEVERAL = 8  # inference steps, where three may not settle
STEPS = 600


class PerBatch(Displacement):
    """One precision for all samples of a batch, by the displacement of the whole batch's F."""

    def __call__(self, node: Node, squared: Tensor, free_energy: Tensor, nodes: int) -> Tensor:
        weight = free_energy.abs()
        pi = super().__call__(node, squared, free_energy, nodes)
        return ((pi * weight).sum() / weight.sum()).expand_as(pi)


def run(settings: Settings, data: Path | None) -> Record:
    """As `paper_lm.run`; with ``per`` "batch" the displacement is that of the batch's F, and not of each sample's."""
    options = {name: value for name, value in settings.items() if name != "per"}
    return paper_lm.run(options, data, PerBatch(settings["displacement"]) if settings.get("per") == "batch" else None)


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of the runs, and a PNG of perplexity and settling over training."""
    common = TINY | {"steps": 20} if quick else FOUR_BLOCKS | {"steps": STEPS}
    common |= {"lr": 2e-3, "seed": 0, "warmup": LONG_WARMUP, "tuning": False}
    pc = common | {"method": "pc"}
    variants = [common | {"method": "bp"}]
    variants += [pc | {"displacement": delta} for delta in DISPLACEMENTS]
    variants += [pc | {"displacement": delta, "per": "batch"} for delta in DISPLACEMENTS[1::2]]
    variants += [pc | {"precision": precision} for precision in PRECISIONS]
    variants += [pc | {"displacement": delta, "inference_steps": SEVERAL} for delta in DISPLACEMENTS[-2:]]
    variants += [pc | {"precision": precision, "inference_steps": SEVERAL} for precision in PRECISIONS[:1]]
    if quick:
        variants = variants[:2]
    records = complete(out, variants, partial(run, data=data), jobs)
    plot(records, out.with_suffix(".png"))
    return table([[record] for record in records])


def plot(records: list[Record], png: Path) -> None:
    """Left the final perplexity over the displacement; right the cosine to BP's gradient over the training."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    at_three: Any = [r for r in records if "displacement" in r["settings"] and "inference_steps" not in r["settings"]]
    by_delta = [r for r in at_three if "per" not in r["settings"]]
    for some, label in ((by_delta, "pc, delta per sample"), ([r for r in at_three if r not in by_delta], "per batch")):
        left.plot([r["settings"]["displacement"] for r in some], list(map(score, some)), marker="o", label=label)
    left.axhline(score(records[0]), color="gray", linestyle="--", label="bp")
    left.set(xscale="log", yscale="log", xlabel="displacement delta", ylabel="held-out perplexity per token")
    left.legend()
    for record in by_delta:
        rows = record.get("evaluations", [])
        right.plot(
            [r["step"] for r in rows], [r["cosine"] for r in rows], label=f"{record['settings']['displacement']:g}"
        )
    right.set(xlabel="training step", ylabel="cosine of the weight gradient to BP's")
    right.legend(title="delta", fontsize="small")
    figure.savefig(png, dpi=120)
