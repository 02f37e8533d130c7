"""Toy networks with the nodes that Gaussian predictive coding gets wrong (Pinchetti et al. 2022, section 4.1).

Two energies, two ways of learning, on the same weights: *generalised* gives every node and the output its own family;
*gaussian* gives each a Gaussian of variance 1 on what it emits (the output of a classifier: on the softmax of its
logits, clamped to one-hot labels); each is learned by PC and by backpropagation of the same output energy. So where a
gap is the output's, backpropagation has it too; what is left of it is the hidden nodes'. ``--data`` is a folder of
MNIST's or FashionMNIST's idx files; without it the images are scikit-learn's digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from images import images
from matplotlib.figure import Figure
from runs import DIVERGED, Record, Settings, load, markdown, regime, score, spread, standing, tuned, tuning_table
from torch import Tensor, nn

import pc_triton as pc

TASKS = {
    "softmax output": "two tanh layers, a softmax at the output alone; test error, %",
    "softmax hidden": "two hidden layers of 8 softmaxes over 16 units each; test error, %",
    "bernoulli hidden": "two sigmoid layers, Bernoulli nodes; test error, %",
    "own variance": "a function with noise whose size depends on x; negative log likelihood of test data, nats",
    "laplace noise": "a function with Laplace noise; mean distance of the prediction to the function itself",
}
REGRESSIONS = ("own variance", "laplace noise")
DEFAULT: Settings = {}  # error order, T = 3, precisions by the displacement
SETTLED: Settings = {"order": "error", "steps": 16, "precision": 1.0}  # the paper's precision, settled
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
REGRESSION_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
STEPS, BATCH = 300, 128


def variants(data: str, steps: int) -> list[Settings]:
    """Every method on every task, then the orders and T on hidden softmaxes."""
    found: list[Settings] = []
    for task in TASKS:
        base = {"data": data, "task": task, "training_steps": steps}
        found += [base | {"energies": energies, "learning": "bp"} for energies in ("generalised", "gaussian")]
        for options in (DEFAULT, SETTLED):
            kinds = ["generalised", "gaussian"]
            if task.endswith("hidden"):
                kinds.append("gaussian nodes")  # with the Categorical output: the hidden nodes' part of the gap
            found += [base | {"energies": energies, "learning": "pc", "inference": options} for energies in kinds]
    return found


def orders(data: str, steps: int) -> list[Settings]:
    """The orders of inference and T, on hidden softmaxes: with precisions by the displacement, and with precision 1."""
    base = {"data": data, "task": "softmax hidden", "training_steps": steps}
    base |= {"energies": "generalised", "learning": "pc"}
    auto = [{"order": order, "steps": t} for order in ("error", "sweep", "simultaneous") for t in (1, 3, 8)]
    one = [{"order": order, "steps": 16, "precision": 1.0} for order in ("sweep", "simultaneous")]
    return [base | {"inference": options} for options in (*auto, *one)]


# The models.


def layer(inputs: int, task: str, gaussian: bool) -> nn.Module:
    """128 units with their value nodes; gaussian: Gaussian nodes on what the generalised ones emit."""
    if task == "softmax hidden":
        node = nn.Sequential(nn.Softmax(-1), pc.Gaussian()) if gaussian else pc.Categorical()
        return nn.Sequential(nn.Linear(inputs, 128), nn.Unflatten(-1, (8, 16)), node, nn.Flatten(1))
    if task == "bernoulli hidden":
        node = nn.Sequential(nn.Sigmoid(), pc.Gaussian()) if gaussian else pc.Bernoulli()
        return nn.Sequential(nn.Linear(inputs, 128), node)
    return nn.Sequential(pc.Linear(inputs, 128), nn.Tanh())


def network(task: str, energies: str, inputs: int) -> tuple[nn.Module, pc.Distribution]:
    """The model and the family of its output."""
    hidden = energies != "generalised"
    layers = [layer(inputs, task, hidden), layer(128, task, hidden)]
    if task in REGRESSIONS:
        if energies == "gaussian":
            return nn.Sequential(*layers, nn.Linear(128, 1)), pc.Gaussian(1.0)
        if task == "laplace noise":
            return nn.Sequential(*layers, nn.Linear(128, 1)), pc.Laplace()
        return nn.Sequential(*layers, nn.Linear(128, 2)), pc.GaussianLogVar()
    if energies == "gaussian":
        return nn.Sequential(*layers, nn.Linear(128, 10), nn.Softmax(-1)), pc.Gaussian(1.0)
    return nn.Sequential(*layers, nn.Linear(128, 10)), pc.Categorical()


# The data, and the scores.


def function(task: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x in [-2, 2], y with noise, and the function itself, all ``[count, 1]``."""
    g = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(count, 1, generator=g) - 2
    truth = 2 * torch.sin(3 * x)
    if task == "own variance":
        return x, truth + (0.1 + 0.9 * torch.sigmoid(4 * x)) * torch.randn(count, 1, generator=g), truth
    u = torch.rand(count, 1, generator=g) - 0.5
    return x, truth - u.sign() * torch.log1p(-2 * u.abs()), truth


def problem(settings: Settings, data: Path | None) -> tuple[Tensor, Tensor, Callable[[nn.Module], float]]:
    """x and y to train on, and the score of a model on data of its own."""
    task, gaussian = settings["task"], settings["energies"] == "gaussian"
    if task not in REGRESSIONS:
        found = images(data, settings["tuning"])
        y = nn.functional.one_hot(found.y, 10).float() if gaussian else found.y
        return found.x, y, lambda model: 100 * (model(found.test_x).argmax(-1) != found.test_y).double().mean().item()
    x, y, _ = function(task, 2000, 1)
    test_x, test_y, truth = function(task, 10_000, 2 if settings["tuning"] else 3)
    if task == "laplace noise":
        return x, y, lambda model: (model(test_x) - truth).abs().mean().item()

    def likelihood(model: nn.Module) -> float:
        if gaussian:  # its one variance is that of the errors on the training data
            mu, s = model(test_x), ((model(x) - y) ** 2).mean().log()
        else:
            mu, s = model(test_x).chunk(2, -1)
        return (0.5 * (s + (test_y - mu) ** 2 * (-s).exp() + math.log(2 * math.pi))).mean().item()

    return x, y, likelihood


def run(settings: Settings, data: Path | None) -> Record:
    """Train one network by Adam and measure it."""
    x, y, measure = problem(settings, data)
    torch.manual_seed(settings["seed"])
    model, output = network(settings["task"], settings["energies"], x.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"])
    free_energy = pc.FreeEnergy(model, output, **{"steps": 3} | settings.get("inference", {}))
    losses = []
    for step in range(settings["training_steps"]):
        batch = torch.randint(len(x), (BATCH,))
        if settings["learning"] == "bp":
            loss = output.clamped(model(x[batch]), y[batch]).sum() / BATCH
        else:
            loss = free_energy(x[batch], y[batch])
        if not loss.isfinite():
            return {"diverged": f"the loss is {loss.item()} at step {step}"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        result = measure(model)
    if not math.isfinite(result):
        return {"diverged": f"the score is {result}"}
    record: Record = {"score": result, "losses_every_20th": losses[::20]}
    if settings["learning"] == "pc" and not settings["tuning"]:
        batch = torch.randint(len(x), (BATCH,))
        record |= standing(free_energy.report(x[batch], y[batch]))
    return record


# Tables and figure.


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of methods, orders and tuning, and a PNG beside the JSON."""
    name = data.name if data else "digits"
    images(data)  # is there
    steps, rates, seeds = (5, RATES[1:2], SEEDS[:1]) if quick else (STEPS, RATES, SEEDS)
    wanted, swept = variants(name, steps), orders(name, steps)
    if quick:
        wanted = [
            v for v in wanted if v["task"] in ("softmax hidden", "own variance") and v.get("inference") != SETTLED
        ]
        swept = swept[:9:3]
    if data is not None and data.name != "mnist":  # the other images: the task with the gap
        wanted, swept = [v for v in wanted if v["task"] == "softmax hidden"], []
    make = partial(run, data=data)
    classifiers = [v for v in wanted if v["task"] not in REGRESSIONS]
    regressions = [v for v in wanted if v["task"] in REGRESSIONS]
    methods = tuned(out, classifiers, rates, seeds, make, jobs)
    methods += tuned(out, regressions, REGRESSION_RATES[3:4] if quick else REGRESSION_RATES, seeds, make, jobs)
    sweep = tuned(out, swept, rates, seeds, make, jobs)
    plot(methods, sweep, out.with_suffix(".png"))
    tasks = [task for task in TASKS if any(of(task, records) for records in methods)]
    parts = [f"**{task}**: {TASKS[task]}\n\n{table([r for r in methods if of(task, r)])}" for task in tasks]
    if sweep:
        parts.append(f"**Orders and T**, hidden softmaxes\n\n{table(sweep)}")
    tuning = tuning_table(load(out)["runs"], ("task", "method"), lambda s: (s["task"], title(s)), 3)
    return "\n\n".join([*parts, f"**Tuning**\n\n{tuning}"])


def of(task: str, records: Sequence[Record]) -> bool:
    """Whether these runs are of the task."""
    return records[0]["settings"]["task"] == task


def title(settings: Settings) -> str:
    """A method: learning, energies, and the inference where it is not the default."""
    found = f"{settings['learning']}, {settings['energies']}"
    options = settings.get("inference", {})
    if options:
        precision = f", precision {options['precision']:g}" if "precision" in options else ""
        found += f" ({options['order']}, T = {options['steps']}{precision})"
    return found


def table(results: Sequence[Sequence[Record]]) -> str:
    """Markdown: each method's scores on the seeds, and the regime."""
    heads = ["method", "lr", *(f"seed {r['settings']['seed']}" for r in results[0]), "mean ± std", "regime"]
    rows = []
    for records in results:
        settings = records[0]["settings"]
        seeds = [spread([record], 3) for record in records]
        rows.append([title(settings), f"{settings['lr']:g}", *seeds, spread(records, 3), regime(records)])
    return markdown(heads, rows)


def plot(methods: Sequence[Sequence[Record]], sweep: Sequence[Sequence[Record]], png: Path) -> None:
    """A panel a task: every seed of every method a dot, their mean a bar; the last panel: orders and T."""
    tasks = [task for task in TASKS if any(of(task, records) for records in methods)]
    panels: list[tuple[str, Sequence[Sequence[Record]]]] = [
        (f"{task}\n({TASKS[task].rpartition('; ')[2]})", [r for r in methods if of(task, r)]) for task in tasks
    ]
    if sweep:
        panels.append(("orders and T, softmax hidden\n(test error, %)", sweep))
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.5 * columns, 3.6 * rows), layout="constrained")
    for number, (name, results) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        labels: list[Any] = []
        for records in results:
            values = [score(record) for record in records if score(record) < DIVERGED]
            settings = records[0]["settings"]
            color = f"C{('generalised', 'gaussian', 'gaussian nodes').index(settings['energies'])}"
            labels.append(title(settings) + ("" if values else ": diverged"))
            if values:
                axes.barh(len(labels) - 1, mean(values), color=color, alpha=0.35)
                axes.plot(values, [len(labels) - 1] * len(values), "o", color=color, markersize=4)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.invert_yaxis()
        shown = [score(record) for records in results for record in records if score(record) < DIVERGED]
        if shown and max(shown) > 30 * min(shown) > 0:
            axes.set_xscale("log")
        axes.set_title(name, fontsize=10)
    figure.savefig(png, dpi=110)
