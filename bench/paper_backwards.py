"""One network used backwards: learned from images alone, it fills in whichever half of an image is hidden.

A decoder, 32-128-784, has no input in the data: predictive coding infers it, ``infer(..., clamp_input=False)``, and
learns at what it inferred; a hidden half is an output that is observed in part. Against it stand what a user of
backpropagation would do with the same decoder, gradient descent in its input, and a network with the images' visible
half as its input, which knows the four halves from its training. ``--data`` as in ``paper_toy.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from images import images
from matplotlib.figure import Figure
from paper_vae import SHOWN, decode, encode
from runs import Record, Settings, chosen, load, markdown, regime, spread, standing
from torch import Tensor, nn

import pc_triton as pc

LATENT, BATCH, TEST_IMAGES = 32, 64, 1000
PIXELS = pc.Gaussian(0.1)
"""The output: a Gaussian of that variance for each pixel."""
LEARNING_STEPS, FILLING_STEPS = 8, 32  # of the input, in PC with all states
RATES = (1e-3, 3e-3)
CHOICES: dict[str, list[Settings]] = {
    "pc": [{"lr": lr, "precision": p} for lr, p in product(RATES, (1.0, 3.0, 10.0, 30.0))],
    "bp, descent in the input": [{"lr": lr, "step": s} for lr, s in product(RATES, (0.003, 0.01, 0.03, 0.1))],
    "bp, from the visible half": [{"lr": lr} for lr in (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2, 3e-2)],
}
SEEDS = (0, 1, 2)
STEPS = 1000


def halves(pixels: int) -> list[Tensor]:
    """Masks ``[D]`` of the visible pixels: the upper, lower, left and right half."""
    side = math.isqrt(pixels)
    places = torch.arange(pixels)
    upper, left = places // side < side // 2, places % side < side // 2
    return [upper, ~upper, left, ~left]


def descend(model: nn.Module, y: Tensor, steps: int, step: float, mask: Tensor | None = None) -> Tensor:
    """The input ``[B, LATENT]`` of an image, or of what a mask leaves of it, standard normal a priori, by descent."""
    z = torch.zeros(len(y), LATENT)
    for _ in range(steps):
        z.requires_grad_()
        loss = PIXELS.clamped(model(z), y, mask).sum() + 0.5 * (z**2).sum()
        z = (z - step * torch.autograd.grad(loss, z)[0]).detach()
    return z


def run(settings: Settings, data: Path | None) -> Record:
    """Train one network by Adam; its score is the hidden halves' squared error, in that of the mean image."""
    found, method = images(data, settings["tuning"]), settings["method"]
    pixels = found.x.shape[1]
    masks = halves(pixels)
    torch.manual_seed(settings["seed"])
    inputs = pixels if method == "bp, from the visible half" else LATENT
    model = nn.Sequential(pc.Linear(inputs, 128), nn.Tanh(), nn.Linear(128, pixels))
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"])
    inference: Settings = {"order": "error", "precision": settings.get("precision", 1.0)}
    free_energy = pc.FreeEnergy(model, PIXELS, steps=LEARNING_STEPS, **inference)
    for step in range(settings["training_steps"]):
        y = found.x[torch.randint(len(found.x), (BATCH,))]
        if method == "pc":
            z = free_energy.infer(torch.zeros(BATCH, LATENT), y, clamp_input=False).input
            loss = free_energy(z, y)
        elif inputs == LATENT:
            loss = PIXELS.clamped(model(descend(model, y, LEARNING_STEPS, settings["step"])), y).mean()
        else:
            loss = PIXELS.clamped(model(masks[step % len(masks)] * y), y).mean()
        if not loss.isfinite():
            return {"diverged": f"the loss is {loss.item()} at step {step}"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def fill(mask: Tensor, y: Tensor) -> Tensor:
        if method == "pc":
            backwards = pc.FreeEnergy(model, PIXELS, steps=FILLING_STEPS, **inference)
            return backwards.infer(torch.zeros(len(y), LATENT), y, clamp_input=False, mask=mask.expand_as(y)).output
        if inputs == LATENT:
            return model(descend(model, y, FILLING_STEPS, settings["step"], mask.expand_as(y))).detach()
        return model(mask * y).detach()

    test, errors, of_mean = found.test_x[:TEST_IMAGES], 0.0, 0.0
    for mask in masks:
        errors += ((fill(mask, test) - test)[:, ~mask] ** 2).sum().item()
        of_mean += ((found.x.mean(0) - test)[:, ~mask] ** 2).sum().item()
    if not math.isfinite(errors):
        return {"diverged": f"the error is {errors}"}
    record: Record = {"score": errors / of_mean}
    if method == "pc" and not settings["tuning"]:
        record |= standing(free_energy.report(z, y))
    if settings["seed"] == SEEDS[0]:
        shown = test[:SHOWN]
        record["pictures"] = [encode(torch.where(mask, shown, fill(mask, shown))) for mask in masks[::2]]
    return record


# Tables and figure.


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of the methods and the tuning, and a PNG of filled-in images."""
    base = {"data": data.name if data else "digits", "training_steps": 5 if quick else STEPS}
    shown = images(data).test_x[:SHOWN]
    variants = [(base | {"method": name}, choices[:1] if quick else choices) for name, choices in CHOICES.items()]
    results = chosen(out, variants, SEEDS[:1] if quick else SEEDS, partial(run, data=data), jobs)
    plot(results, shown, out.with_suffix(".png"))
    trials = [record for record in load(out)["runs"] if record["settings"]["tuning"]]
    heads = ["method", "tuned", "error / mean image's"]
    tuning = markdown(heads, [row([record]) for record in trials])
    seeds_table = markdown([*heads, "regime"], [[*row(records), regime(records)] for records in results])
    return f"{seeds_table}\n\n**Tuning**\n\n{tuning}"


def row(records: Sequence[Record]) -> list[str]:
    """A method, what was tuned of it, and its scores."""
    settings = records[0]["settings"]
    tuned = ", ".join(f"{name} {settings[name]:g}" for name in ("lr", "precision", "step") if name in settings)
    return [settings["method"], tuned, spread(records, 3)]


def plot(results: Sequence[Sequence[Record]], originals: Tensor, png: Path) -> None:
    """Test images, and their lower and right halves filled in by each method."""
    rows = [("test images", decode(encode(originals)))]
    for records in results:
        for half, picture in zip(("lower", "right"), records[0].get("pictures", ())):
            name = records[0]["settings"]["method"].replace(", ", "\n")
            rows.append((f"{name}\n{half} half", decode(picture)))
    figure = Figure(figsize=(8.5, 0.8 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (name, shown) in zip(grid, rows):
        axes.imshow(np.hstack(list(shown)), cmap="gray_r", vmin=0, vmax=255)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(png, dpi=110)
