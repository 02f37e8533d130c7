"""What predictive coding is for beyond backpropagation's number: the tasks of Song et al. 2024, at a small scale.

Song et al. ("Inferring neural activity before plasticity as a foundation for learning beyond backpropagation", Nature
Neuroscience 27) claim that PC learns better than backpropagation where an animal learns: online, from little data, when
the world changes, and one task after another. Here are their network (784-32-32-10, sigmoid, no biases), their Gaussian
output and a categorical one, and these four settings. The learning rate is tuned for every method and optimiser.
``--data`` is a folder of FashionMNIST's or MNIST's idx files; without it the images are scikit-learn's digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from images import images
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from runs import (
    TUNING_SEED,
    Record,
    Settings,
    chosen,
    load,
    markdown,
    mean_and_std,
    regime,
    score,
    spread,
    standing,
    tuning_table,
)
from torch import Tensor, nn

import pc_triton as pc


class Case(NamedTuple):
    """A task: the samples of a batch, the training steps, whether the score is the last error or their mean."""

    batch: int
    steps: int
    last: bool
    text: str


CASES = {
    "online": Case(1, 3200, False, "one image a step, each seen once; mean test error on the way, %"),
    "drift": Case(
        1, 3200, False, "as online, and labels 5 to 9 change places four times; mean test error on the way, %"
    ),
    "10 a class": Case(20, 2000, True, "learned from 100 images; test error, %"),
    "50 a class": Case(20, 2000, True, "learned from 500 images; test error, %"),
    "two tasks": Case(
        32, 500, False, "five classes, the other five, in turns; mean test error of both after a turn, %"
    ),
}
OUTPUTS = {"gaussian": pc.Gaussian(1.0), "categorical": pc.Categorical()}
METHODS: dict[str, Settings] = {
    "bp": {},
    "pc": {"steps": 3},  # error order, precisions by the displacement
    "pc, precision 10": {"order": "error", "steps": 16, "precision": 10.0},
    "pc, precision 1": {"order": "error", "steps": 16, "precision": 1.0},  # the paper's, settled
}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
RATES = {"sgd": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
SEEDS = (0, 1, 2, 3, 4)
MEASUREMENTS = 20
TEST_IMAGES = 5000


@cache
def learner(method: str, inputs: int, outputs: int, output: str, compiled: bool) -> tuple[nn.Module, pc.FreeEnergy]:
    """The network and its free energy: one for all the runs of a process, so that its step is compiled once."""
    first, second = pc.Linear(inputs, 32, bias=False), pc.Linear(32, 32, bias=False)
    model = nn.Sequential(first, nn.Sigmoid(), second, nn.Sigmoid(), nn.Linear(32, outputs, bias=False))
    free_energy = pc.FreeEnergy(model, OUTPUTS[output], **METHODS[method])
    if compiled:
        free_energy.compile()
    return model, free_energy


def lessons(case: str, y: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step the numbers ``[B]`` of the images to learn, and for each class ``[10]`` its label at that time."""
    g, batch = torch.Generator().manual_seed(seed), CASES[case].batch
    labels = torch.arange(10)
    if case in ("online", "drift"):
        passes = -(-steps // len(y))
        stream = torch.cat([torch.randperm(len(y), generator=g) for _ in range(passes)])
        for step in range(steps):
            if case == "drift" and step and step % (steps // 5) == 0:
                labels = torch.cat([labels[:5], 5 + torch.randperm(5, generator=g)])
            yield stream[step : step + 1], labels
        return
    order = torch.randperm(len(y), generator=g)
    if case == "two tasks":
        labels = torch.randperm(10, generator=g)
        pools = [order[labels[y[order]] // 5 == task] for task in (0, 1)]
        labels = labels % 5
    else:
        each = int(case.split()[0])
        pools = [torch.cat([order[y[order] == number][:each] for number in range(10)])]
    for step in range(steps):
        pool = pools[step * MEASUREMENTS // steps % len(pools)]
        yield pool[torch.randint(len(pool), (batch,), generator=g)], labels


def run(settings: Settings, data: Path | None) -> Record:
    """Train one network, and measure it on the way: ``errors``, and ``score``, their mean or the last."""
    found, case, method = images(data, settings["tuning"]), settings["case"], settings["method"]
    output, steps = OUTPUTS[settings["output"]], settings["training_steps"]
    classes = 5 if case == "two tasks" else 10
    compiled = steps > 100 and method != "bp"  # what a compiler takes is worth more steps than that
    model, free_energy = learner(method, found.x.shape[1], classes, settings["output"], compiled)
    torch.manual_seed(settings["seed"])
    for weight in model.parameters():
        nn.init.xavier_uniform_(weight)
    optimizer = OPTIMIZERS[settings["optimizer"]](model.parameters(), settings["lr"])
    test_x, test_y = found.test_x[:TEST_IMAGES], found.test_y[:TEST_IMAGES]

    def target(y: Tensor) -> Tensor:
        return nn.functional.one_hot(y, classes).float() if settings["output"] == "gaussian" else y

    errors, seen = [], []
    for step, (numbers, labels) in enumerate(lessons(case, found.y, steps, settings["seed"]), 1):
        x, y = found.x[numbers], target(labels[found.y[numbers]])
        loss = output.clamped(model(x), y).sum() / len(x) if method == "bp" else free_energy(x, y)
        if not loss.isfinite():
            return {"diverged": f"the loss is {loss.item()} at step {step}"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(numbers)
        if step % (steps // MEASUREMENTS) == 0:
            with torch.no_grad():
                wrong = model(test_x).argmax(-1) != labels[test_y]
            errors.append(100 * wrong.double().mean().item())
    record: Record = {"score": errors[-1] if CASES[case].last else mean(errors), "errors": errors}
    if method != "bp" and not settings["tuning"]:
        numbers = torch.cat(seen)[-128:]
        record |= standing(free_energy.report(found.x[numbers], target(labels[found.y[numbers]])))
    return record


# Tables and figure.


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of the best, of the cases and of tuning, a PNG of the differences."""
    images(data)  # is there
    name = data.name if data else "digits"
    variants: list[tuple[Settings, list[Settings]]] = [
        (
            {"data": name, "case": case, "training_steps": CASES[case].steps}
            | {"optimizer": optimizer, "output": output, "method": method},
            [{"lr": lr} for lr in RATES[optimizer]],
        )
        for case in CASES
        for optimizer in OPTIMIZERS
        for output in OUTPUTS
        for method in METHODS
    ]
    seeds = SEEDS
    if quick:
        quickly = {"training_steps": MEASUREMENTS, "optimizer": "sgd", "output": "gaussian"}
        variants = [(v | quickly, rates[2:3]) for v, rates in variants[:: len(variants) // len(CASES)]]
        variants += [(v | {"method": "pc"}, rates) for v, rates in variants]
        seeds = SEEDS[:1]
    results = chosen(out, variants, seeds, partial(run, data=data), jobs)
    runs = load(out)["runs"]
    plot(results, out.with_suffix(".png"))
    parts = [f"**The better optimiser of each method**\n\n{summary(best(results, runs))}"]
    parts += [f"**{case}**: {CASES[case].text}\n\n{table(of(case, results))}" for case in CASES]
    heads = ("case", "output", "method", "optimiser")
    tuning = tuning_table(runs, heads, lambda s: (s["case"], s["output"], s["method"], s["optimizer"]), 1)
    return "\n\n".join([*parts, f"**Tuning**\n\n{tuning}"])


def of(case: str, results: Sequence[Sequence[Record]]) -> list[Sequence[Record]]:
    """The results of the case."""
    return [records for records in results if records[0]["settings"]["case"] == case]


def best(results: Sequence[Sequence[Record]], runs: Sequence[Record]) -> list[Sequence[Record]]:
    """Of each case, output and method the results with the optimiser that was better in tuning."""

    def in_tuning(records: Sequence[Record]) -> float:
        trial = records[0]["settings"] | {"seed": TUNING_SEED, "tuning": True}
        return next(score(record) for record in runs if record["settings"] == trial)

    found: dict[tuple[str, ...], Sequence[Record]] = {}
    for records in results:
        key = tuple(records[0]["settings"][name] for name in ("case", "output", "method"))
        found[key] = min(found.get(key, records), records, key=in_tuning)
    return list(found.values())


def summary(results: Sequence[Sequence[Record]]) -> str:
    """Markdown: a row for each case and output, a column for each method."""
    rows: dict[tuple[str, str], list[str]] = {}
    bp = {}
    for records in results:
        settings = records[0]["settings"]
        key = (settings["case"], settings["output"])
        if settings["method"] == "bp":
            bp[key] = records
        difference = "" if settings["method"] == "bp" else f" ({minus(records, bp[key])})"
        rows.setdefault(key, []).append(f"{spread(records)}{difference}, {settings['optimizer']}")
    methods = list(dict.fromkeys(records[0]["settings"]["method"] for records in results))
    return markdown(["case", "output", *methods], [[*key, *cells] for key, cells in rows.items()])


def table(results: Sequence[Sequence[Record]]) -> str:
    """Markdown: each method's scores, their differences to backpropagation's by the same optimiser, the last errors."""
    heads = ["optimiser", "output", "method", "lr", "mean ± std", "minus bp", "at the end", "regime"]
    rows, bp = [], results[0]
    for records in results:
        settings = records[0]["settings"]
        bp = records if settings["method"] == "bp" else bp
        row = [settings["optimizer"], settings["output"], settings["method"], f"{settings['lr']:g}", spread(records)]
        last = [{"score": record["errors"][-1]} if "errors" in record else record for record in records]
        rows.append([*row, "" if records is bp else minus(records, bp), spread(last), regime(records)])
    return markdown(heads, rows)


def differences(records: Sequence[Record], bp: Sequence[Record]) -> list[float]:
    """The scores minus backpropagation's, seed by seed; not finite where a run diverged."""
    return [score(record) - score(other) for record, other in zip(records, bp)]


def minus(records: Sequence[Record], bp: Sequence[Record]) -> str:
    """Mean and standard deviation of the `differences`, as in ``-1.20 ± 0.30``."""
    return mean_and_std(differences(records, bp), sign="+")


def plot(results: Sequence[Sequence[Record]], png: Path) -> None:
    """A panel an optimiser: every seed's score minus backpropagation's, for each case and output, their mean a bar."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels: Any = figure.subplots(1, len(OPTIMIZERS), sharey=True, squeeze=False)[0]
    methods = [method for method in METHODS if method != "bp"]
    for optimizer, axes in zip(OPTIMIZERS, panels):
        places: dict[str, int] = {}
        bp: Sequence[Record] = []
        for records in results:
            settings = records[0]["settings"]
            if settings["optimizer"] != optimizer:
                continue
            row = places.setdefault(f"{settings['case']}, {settings['output']}", len(places))
            if settings["method"] == "bp":
                bp = records
                continue
            number, values = methods.index(settings["method"]), differences(records, bp)
            height = row + 0.25 * (number - 1)
            if all(map(math.isfinite, values)):
                axes.barh(height, mean(values), 0.22, color=f"C{number}", alpha=0.4)
                axes.plot(values, [height] * len(values), "o", color=f"C{number}", markersize=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(places)), list(places))
        axes.set(title=optimizer, xlabel="test error minus backpropagation's, %")
    panels[0].invert_yaxis()
    colors = [Patch(color=f"C{number}", alpha=0.6, label=method) for number, method in enumerate(methods)]
    panels[-1].legend(handles=colors, loc="lower right")
    figure.savefig(png, dpi=110)
