"""Why PC bears a larger learning rate than BP: what its gradient does to a training that begins too fast.

The transformer of ``paper_lm.py`` at a learning rate that is PC's best and too large for BP: by either, by the one in
the first tenth of the steps and the other in the rest, and by either with a longer warm-up. Along one training by PC
every parameter's gradient is compared with BP's on the same batch and weights.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from paper_lm import LONG_WARMUP, TINY, base, texts
from runs import Record, Settings, complete, markdown, spread, standing
from torch import Tensor, nn

from pc_triton import FreeEnergy
from pc_triton.data import draw, encode
from pc_triton.evaluate import perplexity
from pc_triton.settings import Settings as TrainSettings
from pc_triton.text import train_tokenizer
from pc_triton.train import adamw, build, schedule

LR = 4e-3
WARMUP = 0.05
VARIANTS: tuple[Settings, ...] = (
    {"first": "bp", "then": "bp", "warmup": WARMUP},
    {"first": "pc", "then": "pc", "warmup": WARMUP},
    {"first": "pc", "then": "bp", "warmup": WARMUP},
    {"first": "bp", "then": "pc", "warmup": WARMUP},
    {"first": "bp", "then": "bp", "warmup": LONG_WARMUP},
    {"first": "pc", "then": "pc", "warmup": LONG_WARMUP},
)
SEEDS = (0, 1, 2)
TRACED = (0, 2, 5, 8, 10, 12, 15, 20, 25, 30, 40, 60, 80, 100, 150, 200, 300, 400, 500)


def run(settings: Settings, data: Path | None) -> Record:
    """Train one model; its score is the perplexity per token of the text measured on."""
    steps, context = settings["steps"], settings["context"]
    training, held_out = texts(data, tuning=False)
    tokenizer = train_tokenizer(training, settings["vocabulary"])
    tokens = encode(tokenizer, training)
    names = ("width", "heads", "blocks", "context", "vocabulary", "batch", "lr", "seed")
    torch.manual_seed(settings["seed"])
    model, free_energy = build(
        TrainSettings(method="pc", inference_steps=3, **{name: settings[name] for name in names})
    )
    assert free_energy is not None
    optimizer = adamw(model, settings["lr"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: schedule(k, steps, settings["warmup"]))
    batches = torch.Generator().manual_seed(settings["seed"])
    record: Record = {"losses": [], "gradient_norms": [], "trace": []}
    for step in range(steps):
        at = draw(tokens, context, settings["batch"], batches)
        x, y = tokens[at], tokens[at + 1]
        if settings["trace"] and step in TRACED:
            record["trace"].append({"step": step} | compare(model, free_energy, x, y))
        by_pc = settings["first" if step < steps // 10 else "then"] == "pc"
        loss = free_energy(x, y) if by_pc else F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        record["losses"].append(loss.item())
        record["gradient_norms"].append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        if not math.isfinite(record["losses"][-1]):
            return record | {"diverged": f"loss {loss.item()} at step {step}"}
        optimizer.step()
        scheduler.step()
    return record | {"score": perplexity(model, encode(tokenizer, held_out))}


def compare(model: nn.Module, free_energy: FreeEnergy, x: Tensor, y: Tensor) -> Record:
    """The regime on a batch, the norms of both gradients, and every parameter's cosine between them."""
    report = free_energy.report(x, y)
    names, parameters = zip(*model.named_parameters())
    pc = torch.autograd.grad(free_energy(x, y), parameters)
    bp = torch.autograd.grad(F.cross_entropy(model(x).flatten(0, 1), y.flatten()), parameters)
    norms = {k: float(torch.cat([g.flatten() for g in gs]).norm()) for k, gs in (("pc_norm", pc), ("bp_norm", bp))}
    cosines = {n: float(F.cosine_similarity(a.flatten(), b.flatten(), 0)) for n, a, b in zip(names, pc, bp)}
    return standing(report) | norms | {"cosines": cosines, "energies": {n.name: n.energy for n in report.nodes}}


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of the runs and of the trace, and a PNG of the trace."""
    common = ((TINY | {"steps": 20}) if quick else base(data, quick)) | {"lr": LR}
    wanted = [
        common | variant | {"seed": seed, "trace": variant == VARIANTS[1] and seed == 0}
        for seed in (SEEDS[:1] if quick else SEEDS)
        for variant in VARIANTS
    ]
    records = complete(out, wanted, partial(run, data=data), jobs)
    traced = next(record for record in records if record["settings"]["trace"])
    plot(records, traced, out.with_suffix(".png"))
    return table(records) + "\n\n" + trace(traced)


def name(settings: Settings) -> str:
    """How a run was trained."""
    first, then = settings["first"], settings["then"]
    return first if first == then else f"{first}, after a tenth of the steps {then}"


def table(records: list[Record]) -> str:
    """Markdown: the perplexity of every variant on every seed."""
    seeds = sorted({record["settings"]["seed"] for record in records})
    rows = []
    for variant in VARIANTS:
        of_it = [record for record in records if variant.items() <= record["settings"].items()]
        by_seed = {record["settings"]["seed"]: [record] for record in of_it}
        each = [spread(by_seed[seed]) for seed in seeds]
        rows.append([name(variant), f"{variant['warmup']:.0%}", *each, spread(of_it)])
    return markdown(["trained by", "warm-up", *(f"seed {seed}" for seed in seeds), "mean ± std"], rows)


def trace(record: Record) -> str:
    """Markdown: along a training by PC, how its gradient stands to BP's."""
    rows = []
    for row in record["trace"]:
        lowest = min(row["cosines"], key=row["cosines"].get)
        cells = [str(row["step"]), f"{row['settled']:.1%}", f"{row['bp_norm']:.2f}"]
        cells += [f"{row['pc_norm'] / row['bp_norm']:.2f}", f"{row['cosine']:.4f}"]
        rows.append([*cells, f"{median(row['cosines'].values()):.4f}", f"{row['cosines'][lowest]:.3f} ({lowest})"])
    heads = ["step", "settled", "norm of bp's gradient", "pc's norm to it", "cosine", "median parameter", "lowest"]
    return markdown(heads, rows)


def plot(records: list[Record], traced: Record, png: Path) -> None:
    """Left the gradient's norm in the first fifth of the trainings, right PC's cosine to BP by parameter."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for record in records:
        s = record["settings"]
        if s["first"] == s["then"] and s["seed"] == 0:
            norms = record["gradient_norms"][: max(2, s["steps"] // 5)]
            left.plot(range(len(norms)), norms, linewidth=0.8, label=f"{name(s)}, warm-up {s['warmup']:.0%}")
    left.set(xlabel="training step", ylabel="norm of the gradient before clipping", yscale="log")
    left.legend(fontsize="small")
    rows: Any = traced["trace"]
    steps = [row["step"] + 1 for row in rows]
    for parameter in rows[0]["cosines"]:
        right.plot(steps, [row["cosines"][parameter] for row in rows], color="C0", alpha=0.3)
    right.plot(steps, [row["cosine"] for row in rows], color="black", label="all parameters together")
    right.set(xlabel="training step, from 1", ylabel="cosine of PC's gradient to BP's by parameter", xscale="log")
    right.legend()
    figure.savefig(png, dpi=120)
