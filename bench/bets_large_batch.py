"""Bet: large batches. PC at the batch B against BP at 5/3 B or of the steps, at equal products."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bets_training import (
    BP_STEPS,
    backpropagation,
    default_tokens,
    free_energy,
    language_model,
    sequences,
    train,
)
from matplotlib.figure import Figure
from runs import TUNING_SEED, Record, Settings, chosen, load, markdown, mean_and_std, score, spread, standing

from pc_triton.evaluate import perplexity, regime

VOCABULARY, WIDTH, BLOCKS, CONTEXT = 512, 64, 2, 32
BATCHES = (12, 48)
STEPS, DRAWS, SEEDS = 60, 6, (0, 1)
METHODS = ("bp", "pc", "bp, more steps")
"""BP's products make its batch larger, or, where steps are not scarce, its steps more."""
FURTHER: list[Settings] = [  # made once the draws were there, whose best had the longest warm-up
    {"lr": lr, "warmup": warmup, "beta2": 0.99} for lr, warmup in ((4e-3, 0.4), (8e-3, 0.6), (8e-3, 0.8))
]


def draws(number: int) -> list[Settings]:
    """Rates, warm-ups and beta2 to choose among, the same for all."""
    dice, found = random.Random(0), []
    for _ in range(number):
        lr, warmup = dice.choice((2e-3, 4e-3, 8e-3, 16e-3)), dice.choice((0.05, 0.2, 0.4))
        found.append({"lr": lr, "warmup": warmup, "beta2": dice.choice((0.95, 0.99))})
    return found


def run(settings: Settings, data: Path | None) -> Record:
    """Train one model: ``score`` is its perplexity on held-out text, in tuning on other text."""
    torch.manual_seed(settings["seed"])
    tokens = default_tokens(VOCABULARY, CONTEXT)
    model = language_model(VOCABULARY, WIDTH, BLOCKS, CONTEXT)
    loss = free_energy(model, settings["method"]) if settings["method"] == "pc" else None
    batches = sequences(tokens.train, CONTEXT, settings["sequences"], settings["seed"])
    record = train(model, loss or backpropagation(model), batches, settings | {"clip": 1.0})
    if record:
        return record
    record = {"score": perplexity(model, tokens.valid if settings["tuning"] else tokens.test)}
    if loss is not None and not settings["tuning"]:
        record |= standing(regime(loss, tokens.test, CONTEXT, 4))
    return record


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of each batch and method, and a PNG."""
    choices = draws(2) if quick else draws(DRAWS) + FURTHER
    variants: list[tuple[Settings, list[Settings]]] = []
    for batch in (3, 6) if quick else BATCHES:
        for method in METHODS:
            size, count = batch, 3 if quick else STEPS
            if method == "bp":
                size = size * BP_STEPS[0] // BP_STEPS[1]
            if method == "bp, more steps":
                count = count * BP_STEPS[0] // BP_STEPS[1]
            own = {"method": method, "batch": batch, "sequences": size, "steps": count}
            variants.append((own, choices))
    results = chosen(out, variants, SEEDS[:1] if quick else SEEDS, partial(run, data=data), jobs)
    tried = [record for record in load(out)["runs"] if record["settings"]["seed"] == TUNING_SEED]
    plot(results, tried, out.with_suffix(".png"))
    return table(results, tried)


def trials(settings: Settings, tried: Sequence[Record]) -> list[float]:
    """The scores in tuning of a method at a batch."""
    keys = ("method", "batch", "steps", "sequences")
    return [score(r) for r in tried if all(r["settings"][key] == settings[key] for key in keys)]


def table(results: Sequence[Sequence[Record]], tried: Sequence[Record]) -> str:
    rows = []
    for records in results:
        settings, values = records[0]["settings"], trials(records[0]["settings"], tried)
        best = f"lr {settings['lr']:g}, warm-up {settings['warmup']:.0%}, beta2 {settings['beta2']:g}"
        cells = [str(settings["batch"]), settings["method"], str(settings["sequences"])]
        cells += [str(settings["steps"]), best, spread(records)]
        settled = [record["settled"] for record in records if "settled" in record]
        rows.append([*cells, mean_and_std(values), f"{max(values):.2f}", mean_and_std(settled) if settled else ""])
    heads = [
        "B",
        "method",
        "sequences",
        "steps",
        "best draw",
        "perplexity",
        "all draws, tuning",
        "worst draw",
        "settled",
    ]
    return markdown(heads, rows)


def plot(results: Any, tried: Sequence[Record], png: Path) -> None:
    """Perplexity over B: every draw in tuning, and the best at the seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for records in results:
        settings = records[0]["settings"]
        number = METHODS.index(settings["method"])
        place, values = settings["batch"] * (1 + 0.1 * number), trials(settings, tried)
        axes.plot([place] * len(values), values, "x", color=f"C{number}", alpha=0.5)
        label = settings["method"] if records in results[: len(METHODS)] else None
        axes.plot([place] * len(records), list(map(score, records)), "o", color=f"C{number}", label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="B, sequences of PC; BP has 5/3 B, or of the steps",
        ylabel="held-out perplexity",
    )
    ticks = sorted({records[0]["settings"]["batch"] for records in results})
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set_yticks([50, 60, 80, 100, 150], ["50", "60", "80", "100", "150"])
    axes.minorticks_off()
    axes.set_title("crosses: every draw in tuning; dots: the best, other seeds", fontsize="small")
    axes.legend()
    figure.savefig(png, dpi=110)
