"""Bet: a decoder of few images learns better where each image's latent state is inferred, and not only predicted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from images import images
from matplotlib.figure import Figure
from paper_vae import LATENT, VAE, negative_elbo
from runs import Record, Settings, chosen, load, markdown, mean_and_std, spread, tuning_table
from torch import Tensor

import pc_triton as pc

IMAGES, HIDDEN, STEPS, BATCH, SEEDS = 1000, 128, 1000, 100, (0, 1, 2)
METHODS = ("bp", "bp, refined", "pc")
RATES = (1e-3, 3e-3)
INNER, INNER_RATE = 8, 0.1
"""Steps of Adam by which a posterior is refined, and their rate, in training as at the end."""
OUTPUT = pc.Bernoulli()


def elbo_at(model: VAE, q: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """The negative ELBO ``[S]`` in nats where the latent posterior is q ``[S, 2 * LATENT]``, mean and log variance."""
    m, s = q.chunk(2, -1)
    kl = 0.5 * (s.exp() + m**2 - 1 - s).sum(1)
    return OUTPUT.clamped(model.decoder(m + torch.exp(0.5 * s) * noise), x) + kl


def refined(model: VAE, q: Tensor, x: Tensor) -> Tensor:
    """The posterior after `INNER` steps of Adam on the negative ELBO, from q; the weights stay."""
    q = q.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([q], INNER_RATE)
    for _ in range(INNER):
        loss = elbo_at(model, q, x, torch.randn(len(x), LATENT)).sum()
        (q.grad,) = torch.autograd.grad(loss, [q])
        optimizer.step()
    return q.detach()


def run(settings: Settings, data: Path | None) -> Record:
    """Train on few images; ``score`` is the negative ELBO of test images, ``refined`` that at refined posteriors."""
    found = images(data, settings["tuning"])
    few = found.x[:IMAGES]
    torch.manual_seed(settings["seed"])
    model = VAE(found.x.shape[1], settings["hidden"])
    free_energy = pc.FreeEnergy(model, OUTPUT)
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"])
    for step in range(settings["training_steps"]):
        x = few[torch.randint(len(few), (BATCH,))]
        if settings["method"] == "pc":
            loss = free_energy(x, x)
        elif settings["method"] == "bp":
            loss = (sum(negative_elbo(model, OUTPUT, x), torch.zeros(BATCH))).mean()
        else:  # the decoder learns at refined posteriors, the encoder from the decoder as it is
            q = model.encoder(x)
            noise = torch.randn(BATCH, LATENT)
            (grad,) = torch.autograd.grad(elbo_at(model, q, x, noise).mean(), [q], retain_graph=True)
            loss = elbo_at(model, refined(model, q, x), x, noise).mean() + (q * grad).sum()
        if not loss.isfinite():
            return {"diverged": f"the loss is {loss.item()} at step {step}"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = found.test_x[:IMAGES]
    torch.manual_seed(0)
    with torch.no_grad():
        q = model.encoder(x)
    better = refined(model, q, x)
    with torch.no_grad():
        noise = torch.randn(len(x), LATENT)
        return {name: elbo_at(model, at, x, noise).mean().item() for name, at in (("score", q), ("refined", better))}


def reproduce(data: Path | None, quick: bool, out: Path, jobs: int) -> str:
    """Make the runs that ``out`` lacks; Markdown of the methods and of tuning, and a PNG."""
    folder = None if data is None else data / "mnist"
    size = {"hidden": 16, "training_steps": 5} if quick else {"hidden": HIDDEN, "training_steps": STEPS}
    variants = [({"method": method} | size, [{"lr": lr} for lr in RATES[: 1 if quick else None]]) for method in METHODS]
    results = chosen(out, variants, SEEDS[:1] if quick else SEEDS, partial(run, data=folder), jobs)
    plot(results, out.with_suffix(".png"))
    return "\n\n".join([table(results), "**Tuning**", tuning_table(load(out)["runs"], ("method",), _method, 1)])


def _method(settings: Settings) -> tuple[str]:
    return (settings["method"],)


def table(results: Sequence[Sequence[Record]]) -> str:
    rows = []
    for records in results:
        settings, better = records[0]["settings"], [record["refined"] for record in records]
        gain = mean(record["score"] - record["refined"] for record in records)
        cells = [settings["method"], f"{settings['lr']:g}", spread(records), mean_and_std(better), f"{gain:.1f}"]
        rows.append(cells)
    return markdown(["method", "lr", "nats, one forward pass", "nats, refined at test time", "gain"], rows)


def plot(results: Any, png: Path) -> None:
    """Both scores of each method, every seed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for records in results:
        ends = [[record["score"] for record in records], [record["refined"] for record in records]]
        axes.plot(*ends, "o", label=records[0]["settings"]["method"])
    axes.set(xlabel="nats, one forward pass", ylabel="nats, refined at test time")
    axes.legend(fontsize="small")
    figure.savefig(png, dpi=110)
