"""Bet: the price of tuning. The expected test score of the best of k random trials, at equal products."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial
from math import comb
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from bets_training import (
    METHODS,
    Batches,
    Deep,
    backpropagation,
    batches_of,
    default_tokens,
    error,
    free_energy,
    language_model,
    sequences,
    standard_images,
    steps,
    train,
)
from matplotlib.figure import Figure
from runs import DIVERGED, Record, Settings, complete, markdown, mean_and_std, score, standing
from torch import Tensor, nn

import pc_triton as pc
from pc_triton.evaluate import perplexity, regime

TASKS = ("mnist", "careful", "residual", "adding")
STEPS = {"adding": 480, "text": 120}
IMAGE_STEPS = 240
TRIALS, TEXT_TRIALS = 16, 8
BEST_OF = (1, 2, 4, 8, 16)
RESAMPLED = 1000
REPORTED = 6
"""So many trials of a task also say how settled inference is at their end."""
BATCH, LENGTH = 64, 20
VOCABULARY, WIDTH, CONTEXT, SEQUENCES = 512, 64, 32, 16
CAREFUL: Settings = {"gain": 1.0, "warmup": 0.2, "clip": 1.0}
SWEEP: Settings = {"depth": 20, "width": 32, "gain": 1.0, "beta2": 0.999}
RATES = tuple(2e-4 * 2**k for k in range(8))
SWEEP_SEEDS = (0,)
NEAR = 1.2
"""A rate is on the plateau where the error is at most so many times the best of any method."""
GUESS = {"adding": 1 / 6}
"""What a constant guess scores, where it is not a class: the variance of a sum of two uniform numbers."""


def drawn(trial: int, task: str) -> Settings:
    """What a trial draws: the same for every method, and in tasks of one kind the same for every task."""
    dice = random.Random(trial)

    def between(low: float, high: float) -> float:
        return float(f"{math.exp(dice.uniform(math.log(low), math.log(high))):.4g}")

    own: Settings = {"depth": round(between(6, 30)), "width": dice.choice((16, 32, 64)), "gain": between(0.7, 1.6)}
    if task == "adding":
        del own["depth"]
    if task == "text":
        own = {"depth": dice.choice((1, 2, 4)), "gain": between(0.5, 4)}
    own |= {"lr": between(3e-4, 3e-2), "warmup": dice.choice((0.0, 0.05, 0.2))}
    own |= {"clip": dice.choice((0.0, 1.0)), "beta2": dice.choice((0.95, 0.99, 0.999))}
    return own | (CAREFUL if task == "careful" else {})


class Recurrent(nn.Module):
    """A tanh network that reads a sequence ``[B, N, 2]`` and gives a number, with a value node at every step."""

    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        self.read, self.again, self.last = nn.Linear(2, width), nn.Linear(width, width, bias=False), nn.Linear(width, 1)
        self.node = pc.Gaussian()
        nn.init.orthogonal_(self.again.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.again.in_features)
        for column in self.read(x).unbind(1):
            h = self.node(column + self.again(h)).tanh()
        return self.last(h)


def sums(length: int, size: int, seed: int) -> Batches:
    """The adding problem: numbers in [0, 1], two of them marked, one in each half; y is the sum of these two."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        numbers, marks = torch.rand(size, length, generator=generator), torch.zeros(size, length)
        for low, high in ((0, length // 2), (length // 2, length)):
            marks.scatter_(1, torch.randint(low, high, (size, 1), generator=generator), 1.0)
        yield torch.stack([numbers, marks], -1), (numbers * marks).sum(1, keepdim=True)


def run(settings: Settings, data: Path | None) -> Record:
    """One trial: ``score`` on the test set, ``valid`` on the one to choose by, ``guess`` of a constant."""
    task, seed = settings["task"], settings["seed"]
    torch.manual_seed(seed)
    folder = data and data / ("fashion" if task == "residual" else "mnist")
    measure: Any
    if task == "adding":
        model: nn.Module = Recurrent(settings["width"], settings["gain"])
        batches = sums(LENGTH, BATCH, seed)
        held_out = [next(sums(LENGTH, 2000, -1 - part)) for part in range(2)]
        measure, guess = lambda x, y: F.mse_loss(model(x), y).item(), GUESS[task]
    elif task == "text":
        tokens = default_tokens(VOCABULARY, CONTEXT)
        model = language_model(VOCABULARY, WIDTH, settings["depth"], CONTEXT, settings["gain"])
        batches = sequences(tokens.train, CONTEXT, SEQUENCES, seed)
        held_out, guess = [(tokens.valid,), (tokens.test,)], tokens.unigram
        measure = partial(perplexity, model)
    else:
        tuning, whole = standard_images(folder)
        both = task == "residual"
        model = Deep(tuning.x.shape[1], settings["width"], settings["depth"], settings["gain"], both, both)
        batches = batches_of(tuning.x, tuning.y, BATCH, seed)
        held_out = [(tuning.test_x, tuning.test_y), (whole.test_x, whole.test_y)]
        measure, guess = partial(error, model), 90.0
    loss = free_energy(model, settings["method"])
    record = train(model, loss or backpropagation(model), batches, settings)
    if record:
        return record | {"guess": guess}
    with torch.no_grad():
        valid, test = (measure(*part) for part in held_out)
    if not math.isfinite(valid + test):
        return {"diverged": f"the score is {test}", "guess": guess}
    record = {"score": test, "valid": valid, "guess": guess}
    if loss is not None and settings["trial"] < REPORTED:
        found = regime(loss, tokens.test, CONTEXT, 4) if task == "text" else loss.report(*next(batches))
        record |= standing(found)
    return record


def wanted(quick: bool) -> list[Settings]:
    """The trials, those of all tasks in turns, the sweeps of the rate, and the trials on text, which cost most."""
    tasks, trials, rates, seeds, texts = TASKS, TRIALS, RATES, SWEEP_SEEDS, TEXT_TRIALS
    if quick:
        tasks, trials, rates, seeds, texts = ("careful", "adding"), 2, RATES[3:5], SWEEP_SEEDS[:1], 2
    runs: list[Settings] = []

    def add(task: str, trial: int) -> None:
        for method in METHODS:
            own = {"task": task, "method": method, "trial": trial, "seed": trial}
            own["steps"] = steps(6 if quick else STEPS.get(task, IMAGE_STEPS), method)
            runs.append(own | drawn(trial, task))

    for trial in range(trials):
        for task in tasks:
            add(task, trial)
    for seed in seeds:
        for name, extra in (("sweep", {"warmup": 0.0, "clip": 0.0}), ("careful sweep", CAREFUL)):
            for lr in rates:
                for method in METHODS:
                    own = {"task": name, "method": method, "trial": REPORTED, "seed": seed, "lr": lr}
                    own["steps"] = steps(6 if quick else IMAGE_STEPS, method)
                    runs.append(own | SWEEP | extra)
    for trial in range(texts):
        add("text", trial)
    return runs


# What the trials say.


def best_of(records: Sequence[Record], k: int) -> float:
    """The expected test score of the trial with the lowest validation score, of k drawn from these without return.

    A run that diverged counts as a constant guess.
    """
    ranked = sorted(records, key=lambda record: record.get("valid", DIVERGED))
    chances = [comb(len(ranked) - 1 - place, k - 1) / comb(len(ranked), k) for place in range(len(ranked))]
    return sum(
        chance * min(score(r), r["guess"] if "diverged" in r else DIVERGED) for chance, r in zip(chances, ranked)
    )


def resampled(groups: dict[str, list[Record]], k: int) -> dict[str, list[float]]:
    """`best_of` of each method for resampled trials, the same for all methods."""
    dice, count = random.Random(0), len(groups["bp"])
    found: dict[str, list[float]] = {method: [] for method in groups}
    for _ in range(RESAMPLED):
        trials = [dice.randrange(count) for _ in range(count)]
        for method, records in groups.items():
            found[method].append(best_of([records[trial] for trial in trials], k))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 90 %."""
    ranked = sorted(values)
    return ranked[len(ranked) // 20], ranked[-1 - len(ranked) // 20]


def by_task(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """The records of each task and method, in the order of trials; trials that some method lacks are left out."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        settings = record["settings"]
        found.setdefault(settings["task"], {}).setdefault(settings["method"], []).append(record)
    for groups in found.values():
        count = min(map(len, groups.values()))
        groups.update({method: rows[:count] for method, rows in groups.items()})
    return found


def failed(record: Record) -> bool:
    return score(record) > 0.9 * record["guess"]


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of the best of k, of failures and of the plateau, and a PNG."""
    all_runs = complete(out, wanted(quick), partial(run, data=data), jobs)
    tasks = by_task([r for r in all_runs if "sweep" not in r["settings"]["task"]])
    sweeps = by_task([r for r in all_runs if "sweep" in r["settings"]["task"]])
    counts = [k for k in BEST_OF if k <= max(len(groups["bp"]) for groups in tasks.values())]
    pairs = [(task, k) for task, groups in tasks.items() for k in counts if k <= len(groups["bp"])]
    spreads = {(task, k): resampled(tasks[task], k) for task, k in pairs}
    plot(tasks, sweeps, spreads, counts, out.with_suffix(".png"))
    parts = ["**Expected test score of the best of k trials**", best_table(tasks, spreads, counts)]
    parts += ["**Failures and regime**", failure_table(tasks)]
    parts += ["**Rates, depth 20: test error, %**", sweep_table(sweeps)]
    return "\n\n".join(parts)


def best_table(tasks: Any, spreads: Any, counts: Sequence[int]) -> str:
    """Markdown: for each task, method and k the expected score, and its difference to BP with the 90 % interval."""
    rows = []
    for task, groups in tasks.items():
        for method, records in groups.items():
            cells = []
            for k in counts:
                if (task, k) not in spreads:
                    cells.append("")
                    continue
                value, drawn_again = best_of(records, k), spreads[task, k]
                cell = f"{value:.3g}"
                if method != "bp":
                    low, high = interval([a - b for a, b in zip(drawn_again[method], drawn_again["bp"])])
                    cell += f" ({value - best_of(groups['bp'], k):+.2g}, {low:+.2g} to {high:+.2g})"
                cells.append(cell)
            rows.append([task, str(len(records)), method, *cells])
    return markdown(["task", "trials", "method", *(f"k = {k}" for k in counts)], rows)


def failure_table(tasks: Any) -> str:
    """Markdown: the share of trials that failed, all and by means, and how settled inference is at the end."""
    rows = []
    for task, groups in tasks.items():
        for method, records in groups.items():

            def share(some: Sequence[Record]) -> str:
                return f"{mean(map(failed, some)):.0%} of {len(some)}" if some else ""

            both = [r for r in records if r["settings"]["clip"] and r["settings"]["warmup"] >= 0.2]
            none = [r for r in records if not r["settings"]["clip"] and not r["settings"]["warmup"]]
            settled = [r["settled"] for r in records if "settled" in r]
            cosines = [r["cosine"] for r in records if "cosine" in r]
            cells = [f"{mean(settled):.1%}", f"{mean(cosines):.3f}"] if settled else ["", ""]
            rows.append([task, method, share(records), share(none), share(both), *cells])
    heads = ["task", "method", "failed", "without warm-up and clipping", "with 20 % and clipping", "settled", "cosine"]
    return markdown(heads, rows)


def at_rates(records: Sequence[Record]) -> dict[float, list[float]]:
    """The scores of a sweep by rate."""
    found: dict[float, list[float]] = {}
    for record in records:
        found.setdefault(record["settings"]["lr"], []).append(min(score(record), record["guess"]))
    return found


def sweep_table(sweeps: Any) -> str:
    """Markdown: the error at every rate, and how many rates, each twice the last, are near the best or learn at all."""
    rows = []
    for name, groups in sweeps.items():
        best = min(mean(scores) for records in groups.values() for scores in at_rates(records).values())
        for method, records in groups.items():
            rates = at_rates(records)
            near = sum(mean(scores) <= NEAR * best for scores in rates.values())
            learns = sum(mean(scores) < 50 for scores in rates.values())
            cells = [mean_and_std(scores, 1) for scores in rates.values()]
            rows.append([name, method, *cells, str(near), str(learns)])
    rates = list(at_rates(next(iter(sweeps.values()))["bp"]))
    return markdown(["network", "method", *(f"lr {lr:g}" for lr in rates), "plateau", "below 50 %"], rows)


def plot(tasks: Any, sweeps: Any, spreads: Any, counts: Sequence[int], png: Path) -> None:
    """A panel a task: the best of k over k, with 90 % intervals; a panel a sweep: the error over the rate."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    panels = iter(figure.subplots(2, 4).flat)
    for task, groups in tasks.items():
        axes = next(panels)
        ks = [k for k in counts if (task, k) in spreads]
        for number, (method, records) in enumerate(groups.items()):
            axes.plot(ks, [best_of(records, k) for k in ks], "o-", color=f"C{number}", label=method)
            bands = [interval(spreads[task, k][method]) for k in ks]
            axes.fill_between(ks, *zip(*bands), color=f"C{number}", alpha=0.15)
        unit = {"adding": "squared error", "text": "perplexity"}.get(task, "test error, %")
        axes.set(title=f"{task}, {len(groups['bp'])} trials", xlabel="best of k trials", ylabel=unit, xscale="log")
        axes.set(yscale="log" if task in ("adding", "text") else "linear")
        axes.set_xticks(ks, list(map(str, ks)))
        axes.minorticks_off()
    for name, groups in sweeps.items():
        axes = next(panels)
        for number, (method, records) in enumerate(groups.items()):
            rates = at_rates(records)
            axes.plot(list(rates), list(map(mean, rates.values())), "o-", color=f"C{number}", label=method)
        axes.set(title=name, xlabel="learning rate", ylabel="test error, %", xscale="log")
    for axes in panels:
        axes.set_axis_off()
    figure.axes[0].legend()
    figure.savefig(png, dpi=100)
