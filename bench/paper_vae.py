"""Variational autoencoders trained by PC and by backpropagation (Pinchetti et al. 2022, section 4.2).

Encoder and decoder have a hidden layer each; the latent node between them is a Gaussian with its own variance and a
standard normal prior, the output Bernoulli or Gaussian. F at the prediction is the negative evidence lower bound (ELBO)
with one sample of the latent node: backpropagation lowers that, PC the F that inference leaves. The same seed gives
both the same weights, batches and noise. ``--data`` is a folder of MNIST's or FashionMNIST's idx files; without it the
images are scikit-learn's digits.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from images import images
from matplotlib.figure import Figure
from runs import Record, Settings, load, markdown, regime, score, spread, standing, tuned, tuning_table
from torch import Tensor, nn

import pc_triton as pc

OUTPUTS = {"bernoulli": pc.Bernoulli(), "gaussian": pc.Gaussian(0.1)}
LATENT = 16
METHODS: dict[str, Settings] = {
    "bp": {},
    "pc": {"steps": 3},  # error order, precisions by the displacement
    "pc, precision 1": {"steps": 8, "precision": 1.0},  # the paper's precision, for longer
}
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (0, 1, 2)
STEPS, BATCH = 1000, 128
SHOWN = 8
"""Images of each kind in the figure."""


class VAE(nn.Module):
    """``inputs - hidden - latent node of 16 units - hidden - inputs``; it returns the output's parameters."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(pc.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 2 * LATENT))
        self.latent = pc.GaussianLogVar(prior=True)
        self.decoder = nn.Sequential(pc.Linear(LATENT, hidden), nn.ReLU(), nn.Linear(hidden, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.latent(self.encoder(x)))


def negative_elbo(model: VAE, output: pc.Distribution, x: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction and KL to the prior ``[S]`` in nats, with one sample of the latent node; by plain torch.

    A Gaussian output's constant is left out: its reconstruction is the squared error over twice the variance.
    """
    q = model.encoder(x)
    m, s = q.chunk(2, -1)
    kl = 0.5 * (s.exp() + m**2 - 1 - s).sum(1)
    return output.clamped(model.decoder(model.latent(q)), x), kl


def run(settings: Settings, data: Path | None) -> Record:
    """Train one autoencoder by Adam; its score is the negative ELBO of the test images."""
    found = images(data, settings["tuning"])
    torch.manual_seed(settings["seed"])
    model, output = VAE(found.x.shape[1], settings["hidden"]), OUTPUTS[settings["output"]]
    free_energy = pc.FreeEnergy(model, output, **METHODS[settings["method"]])
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"])
    losses = []
    for step in range(settings["training_steps"]):
        x = found.x[torch.randint(len(found.x), (BATCH,))]
        if settings["method"] == "bp":
            loss = sum(negative_elbo(model, output, x), torch.zeros(BATCH)).mean()
        else:
            loss = free_energy(x, x)
        if not loss.isfinite():
            return {"diverged": f"the loss is {loss.item()} at step {step}"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    record = measure(model, output, found.test_x)
    if not math.isfinite(record["score"]):
        return {"diverged": f"the negative ELBO is {record['score']}"}
    record["losses_every_30th"] = losses[::30]
    if settings["method"] != "bp" and not settings["tuning"]:
        record |= standing(free_energy.report(x, x))
    if settings["seed"] == SEEDS[0]:
        record |= pictures(model, output, found.test_x[:SHOWN])
    return record


@torch.no_grad()
def measure(model: VAE, output: pc.Distribution, x: Tensor) -> Record:
    """Negative ELBO of the images with the same noise for every model, its parts, and the mean's squared error."""
    torch.manual_seed(0)
    reconstruction, kl = (part.mean().item() for part in negative_elbo(model, output, x))
    pixels = output.emission(model.decoder(model.encoder(x)[:, :LATENT]))
    error = ((pixels - x) ** 2).sum(1).mean().item()
    return {"score": reconstruction + kl, "reconstruction": reconstruction, "kl": kl, "squared_error": error}


@torch.no_grad()
def pictures(model: VAE, output: pc.Distribution, x: Tensor) -> Record:
    """Reconstructions of x from the latent mean, and samples of the prior, as bytes in base64; the same z for all."""
    z = torch.randn(len(x), LATENT, generator=torch.Generator().manual_seed(0))
    kinds = {"reconstructions": model.encoder(x)[:, :LATENT], "samples": z}
    return {name: encode(output.emission(model.decoder(latent))) for name, latent in kinds.items()}


def encode(pixels: Tensor) -> str:
    """Pixels in [0, 1] as bytes in base64."""
    return base64.b64encode((255 * pixels.clamp(0, 1)).round().byte().numpy().tobytes()).decode()


def decode(text: str) -> np.ndarray:
    """The `SHOWN` square images of an `encode`."""
    pixels = np.frombuffer(base64.b64decode(text), np.uint8)
    side = math.isqrt(pixels.size // SHOWN)
    return pixels.reshape(SHOWN, side, side)


# Tables and figure.


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of methods and tuning, and a PNG of images beside the JSON."""
    steps, rates, seeds = (5, RATES[1:2], SEEDS[:1]) if quick else (STEPS, RATES, SEEDS)
    base = {"data": data.name if data else "digits", "hidden": 32 if quick else 128, "training_steps": steps}
    originals = images(data).test_x[:SHOWN]
    variants = [base | {"output": "bernoulli", "method": method} for method in METHODS]
    variants += [base | {"output": "gaussian", "method": method} for method in ("bp", "pc")]
    if data is not None and data.name != "mnist":  # the other images: the two that are to be equal
        variants = variants[:2]
    results = tuned(out, variants, rates, seeds, partial(run, data=data), jobs)
    plot(results, originals, out.with_suffix(".png"))
    parts = []
    for output in OUTPUTS:
        chosen = [records for records in results if records[0]["settings"]["output"] == output]
        if chosen:
            parts.append(f"**{output} output**\n\n{table(chosen)}")
    tuning = tuning_table(load(out)["runs"], ("output", "method"), lambda s: (s["output"], s["method"]), 2)
    return "\n\n".join([*parts, f"**Tuning** (negative ELBO)\n\n{tuning}"])


def table(results: Sequence[Sequence[Record]]) -> str:
    """Markdown: each method's negative ELBO, its ratio to backpropagation's, its parts, and the regime."""
    seeds = [f"seed {record['settings']['seed']}" for record in results[0]]
    heads = ["method", "lr", *seeds, "negative ELBO", "ratio to bp", "reconstruction", "KL", "squared error", "regime"]
    first, rows = mean(map(score, results[0])), []
    for records in results:
        settings = records[0]["settings"]
        row = [settings["method"], f"{settings['lr']:g}"]
        row += [spread([record]) for record in records]
        row += [spread(records), f"{mean(map(score, records)) / first:.4f}"]
        for name in ("reconstruction", "kl", "squared_error"):
            values: list[Any] = [record[name] for record in records if name in record]
            row.append(f"{mean(values):.2f}" if values else "")
        rows.append([*row, regime(records)])
    return markdown(heads, rows)


def plot(results: Sequence[Sequence[Record]], originals: Tensor, png: Path) -> None:
    """Test images, and each method's reconstructions of them and samples of the prior, on the first seed."""
    rows = [("test images", "", decode(encode(originals)))]
    for kind in ("reconstructions", "samples"):
        for records in results:
            settings = records[0]["settings"]
            if kind in records[0]:
                rows.append((f"{settings['output']}\n{settings['method']}", kind, decode(records[0][kind])))
    figure = Figure(figsize=(7, 0.7 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (method, kind, shown) in zip(grid, rows):
        axes.imshow(np.hstack(list(shown)), cmap="gray_r", vmin=0, vmax=255)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(f"{method}\n{kind}".strip(), rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(png, dpi=110)
