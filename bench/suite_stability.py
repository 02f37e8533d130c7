"""What a fixed precision does in error order while the curvature grows, beside the default.

The network is small (three ReLU layers, squared error at the output), and all train at one rate. FabricPC reports that
its error order at T = 5 loses its accuracy on CIFAR-10 as its curvature grows; this is a small case of that kind. The
curvature is the largest eigenvalue of the output energy's Hessian in the hidden errors, at the prediction. It is in
units of precision 1: a step s of gradient descent at precision pi diverges beyond a curvature of (2 / s - 1) pi.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from images import images
from matplotlib.figure import Figure
from runs import Record, Settings, markdown, mean_and_std
from torch import Tensor, nn

import pc_triton as pc

METHODS: dict[str, dict[str, Any] | None] = {
    "bp": None,
    "default": {},
    "T = 5, displacement 0.003": {"steps": 5},
    "T = 5, precision 1, step 0.1": {"steps": 5, "precision": 1.0, "step": 0.1},
    "T = 5, precision 1, step 0.3": {"steps": 5, "precision": 1.0, "step": 0.3},
    "T = 5, precision 1, step 1": {"steps": 5, "precision": 1.0, "step": 1.0},
    "T = 5, precision 1, step 0.1, local learning": {"steps": 5, "precision": 1.0, "step": 0.1, "local": True},
    "T = 5, precision 1, guarded step": {"steps": 5, "precision": 1.0},
}
LAYERS, RATE, BATCH = 3, 3e-3, 128
MEASURED, LOOKS = 64, 15
"""Images that the curvature is taken of, and how often."""
ITERATIONS = 20


def variants(data: str, device: str, seeds: int, quick: bool) -> list[Settings]:
    """The runs, seed by seed."""
    size = {"training_steps": 15, "hidden": 8} if quick else {"training_steps": 1500, "hidden": 128}
    common = {"stability": LAYERS, "data": data, "device": device, "lr": RATE, "tuning": False} | size
    return [common | {"method": method, "seed": seed} for seed in range(seeds) for method in METHODS]


def curvature(model: nn.Sequential, output: pc.Distribution, x: Tensor, y: Tensor) -> Tensor:
    """The eigenvalue of the largest size of d2E / de2 ``[S]``, E the output's energy, e the hidden errors at 0.

    By power iteration, in float64; of a `nn.Sequential` whose `pc.Linear` layers are the hidden nodes.
    """
    layers = [(m.weight.detach().double(), m.bias.detach().double()) if isinstance(m, nn.Linear) else m for m in model]
    hidden = [isinstance(m, pc.Linear) for m in model]
    x, y = x.double(), y.double()
    errors = [x.new_zeros(len(x), m.out_features, requires_grad=True) for m in model if isinstance(m, pc.Linear)]
    h, left = x, iter(errors)
    for layer, is_hidden in zip(layers, hidden):
        h = nn.functional.linear(h, *layer) if isinstance(layer, tuple) else layer(h)
        h = h + next(left) if is_hidden else h
    slopes = torch.autograd.grad(output.clamped(h, y).sum(), errors, create_graph=True)
    g = torch.Generator().manual_seed(0)
    along = [torch.randn(e.shape, dtype=e.dtype, generator=g).to(e.device) for e in errors]
    for _ in range(ITERATIONS):
        norm = sum(v.square().sum(1, keepdim=True) for v in along).sqrt().clamp(min=1e-300)  # 0 where units are dead
        along = [v / norm for v in along]
        turned = torch.autograd.grad(slopes, errors, along, retain_graph=True)
        eigenvalue = sum((v * w).sum(1) for v, w in zip(along, turned))
        along = [w.detach() for w in turned]
    return eigenvalue.detach()


def run(settings: Settings, data: Path | None) -> Record:
    """Train one network by Adam; test error and curvature on the way, ``score`` the last error in %."""
    found, device = images(data), settings["device"]
    width = settings["hidden"]
    torch.manual_seed(settings["seed"])
    sizes = [found.x.shape[1], *[width] * LAYERS]
    layers = [m for n, k in pairwise(sizes) for m in (pc.Linear(n, k), nn.ReLU())]
    model, output = nn.Sequential(*layers, nn.Linear(width, 10)).to(device), pc.Gaussian(1.0)
    options = METHODS[settings["method"]]
    loss_of = pc.FreeEnergy(model, output, **({"steps": 1} if options is None else options))  # T = 1 is backpropagation
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"])
    g = torch.Generator().manual_seed(settings["seed"])

    def batch(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.to(device), nn.functional.one_hot(y, 10).float().to(device)

    test_x = found.test_x.to(device)
    record: Record = {"steps": [], "errors": [], "curvatures": []}
    for step in range(settings["training_steps"] + 1):
        if step % (settings["training_steps"] // LOOKS) == 0:
            with torch.no_grad():
                wrong = model(test_x).argmax(-1).cpu() != found.test_y
            record["steps"].append(step)
            record["errors"].append(100 * wrong.double().mean().item())
            looked_at = batch(found.test_x[:MEASURED], found.test_y[:MEASURED])
            record["curvatures"].append(curvature(model, output, *looked_at).mean().item())
        numbers = torch.randint(len(found.x), (BATCH,), generator=g)
        loss = loss_of(*batch(found.x[numbers], found.y[numbers]))
        if not loss.isfinite():
            return record | {"diverged": f"the loss is {loss.item()} at step {step}"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return record | {"score": record["errors"][-1]}


def found_in(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of each method."""
    found: dict[str, list[Record]] = {name: [] for name in METHODS}
    for record in runs:
        if "stability" in record["settings"]:
            found[record["settings"]["method"]].append(record)
    return {name: records for name, records in found.items() if records}


def table(runs: Sequence[Record]) -> str:
    """Markdown: accuracy at its best and at the end, and the curvature; nothing where the file has no such run."""
    rows = []
    for name, records in found_in(runs).items():
        best = mean_and_std([100 - min(record["errors"]) for record in records], 1)
        last = mean_and_std([100 - record["errors"][-1] for record in records], 1)
        curvatures = [mean_and_std([record["curvatures"][at] for record in records], 2) for at in (0, -1)]
        ended = sum("diverged" in record for record in records)
        steps = max(record["steps"][-1] for record in records)
        rows.append([name, str(len(records)), best, last, *curvatures, str(ended), str(steps)])
    heads = [
        "method",
        "seeds",
        "best accuracy, %",
        "at the end",
        "curvature at first",
        "at the end",
        "not finite",
        "steps",
    ]
    return markdown(heads, rows) if rows else ""


def plot(runs: Sequence[Record], png: Path) -> None:
    """Accuracy and curvature over the steps, the mean of the seeds that came so far; each seed a thin line."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    accuracy, curved = figure.subplots(1, 2)
    for number, (name, records) in enumerate(found_in(runs).items()):
        for axes, values in ((accuracy, "errors"), (curved, "curvatures")):
            curves = [[100 - v for v in r[values]] if values == "errors" else r[values] for r in records]
            for record, curve in zip(records, curves):
                axes.plot(record["steps"], curve, color=f"C{number}", linewidth=0.6, alpha=0.4)
            shortest = min(map(len, curves))
            middle = [mean(curve[at] for curve in curves) for at in range(shortest)]
            axes.plot(records[0]["steps"][:shortest], middle, color=f"C{number}", label=name)
    accuracy.set(xlabel="training step", ylabel="test accuracy, %")
    curved.set(xlabel="training step", ylabel="largest curvature of the output's energy", yscale="log")
    figure.legend(*curved.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(png, dpi=100)
