"""F and the weight gradients are those on record, from before the core was rewritten: families, layers, orders, T.

In float64, with a step that both float32 and float64 hold exactly. ``python tests/test_numbers.py`` records them anew:
where that changes a number, say why in the commit.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pc_triton as pc
from pc_triton.models import Transformer

RECORD = Path(__file__).with_name("numbers.json")
DOUBLE = torch.float64


class Swish(pc.Distribution):
    """A family by its energy alone."""

    def energy(self, u, mu):
        return torch.cosh(u - mu) - 1 + mu**2 * (u - mu) ** 2

    def emission(self, u):
        return F.silu(u)


class Mixed(nn.Module):
    """Attention, a gate and a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.attn = pc.Linear(5, 8), pc.Attention(8, 2)
        self.gate = pc.Linear(8, 8, node=pc.Bernoulli())
        self.choice = nn.Sequential(nn.Linear(8, 4), pc.Categorical())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.inp(x).tanh()
        h = h + self.attn(h)
        return self.head(self.choice(h * self.gate(h)))


class Autoencoder(nn.Module):
    """A latent node with noise and a prior."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = pc.Linear(5, 8), nn.Linear(8, 6), pc.Linear(3, 8)
        self.z, self.out = pc.GaussianLogVar(prior=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.out(self.c(self.z(self.b(self.a(x).tanh()))).tanh())


class Recurrent(nn.Module):
    """One node visited three times, dropout, an energy of the model's own, a node as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out, self.drop = pc.Linear(5, 6), pc.Linear(6, 6), pc.Linear(6, 3), nn.Dropout(0.3)

    def forward(self, x):
        h = self.a(x).tanh()
        for _ in range(3):
            h = h + self.b(self.drop(h)).tanh()
        pc.add_energy(0.01 * h**2)
        return self.out(h)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), pc.Gaussian(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), pc.Bernoulli(),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


MODELS = {
    "mlp": lambda: nn.Sequential(pc.Linear(5, 8), nn.Tanh(), pc.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)),
    "variances": lambda: nn.Sequential(
        pc.Linear(5, 8, node=pc.Gaussian(0.3)), nn.Tanh(), nn.Linear(8, 8), pc.GaussianLogVar(), nn.Linear(4, 3)
    ),
    "heavy tails": lambda: nn.Sequential(
        nn.Linear(5, 8), pc.Laplace(), nn.Tanh(), nn.Linear(8, 8), pc.StudentT(2.5), nn.Linear(8, 3)
    ),
    "swish": lambda: nn.Sequential(nn.Linear(5, 8), Swish(), nn.Linear(8, 6), pc.Gaussian(), nn.Linear(6, 3)),
    "mixed": Mixed,
    "convolutions": convolutions,
    "autoencoder": Autoencoder,
    "recurrent": Recurrent,
    "transformer": lambda: Transformer(11, width=8, heads=2, blocks=2, context=5),
    "no attention state": lambda: Transformer(11, width=8, heads=2, blocks=2, context=5, attention=False),
    "packed": lambda: Transformer(11, width=8, heads=2, blocks=1, context=5, separator=0),
    "gaussian attention": lambda: Transformer(11, width=8, heads=2, blocks=2, context=5, attention=pc.Gaussian()),
}
GRID = list(itertools.product(MODELS, ("error", "sweep", "simultaneous", "incremental"), (1, 2, 3, 5), ("auto", 2.0)))


def make(name: str):
    torch.manual_seed(0)
    model, g = MODELS[name]().to(DOUBLE), torch.Generator().manual_seed(1)
    if isinstance(model, Transformer):
        return model, *torch.randint(11, (2, 4, 5), generator=g)
    shape = {"mixed": (4, 4, 5), "convolutions": (4, 1, 6, 6)}.get(name, (4, 5))
    x = torch.randn(shape, dtype=DOUBLE, generator=g)
    if name == "autoencoder":
        return model, x, x
    if name == "recurrent":
        return model, x, torch.randn(4, 3, dtype=DOUBLE, generator=g)
    return model, x, torch.randint(3, (4, 4) if name == "mixed" else (4,), generator=g)


def losses(name: str, order: str, steps: int, precision) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    model, x, y = make(name)
    free_energy = pc.FreeEnergy(model, order=order, steps=steps, precision=precision, step=0.125)
    torch.manual_seed(5)
    for loss in free_energy.incremental(x, y) if order == "incremental" else [free_energy(x, y)]:
        yield model, loss


def numbers(*case) -> list[float]:
    """The last loss, the norm of its gradient, and the gradient along three fixed directions."""
    for model, loss in losses(*case):
        model.zero_grad()
        loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    gradient = torch.cat([g.flatten() for g in grads])
    places = torch.arange(len(gradient), dtype=DOUBLE)
    along = [float(gradient @ (k * places).cos()) for k in (1.0, 2.7, 0.03)]
    return [float(loss.detach()), float(gradient.norm()), *along]


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_on_record(name):
    """To 1e-7 of the gradient's norm; along a direction of length n^(1/2), to that many times it."""
    record = json.loads(RECORD.read_text())
    for case in (case for case in GRID if case[0] == name):
        wanted = record[repr(case)]
        found = numbers(*case)
        size = sum(p.numel() for p in make(name)[0].parameters()) ** 0.5
        assert found[0] == pytest.approx(wanted[0], rel=1e-9, abs=1e-12), case
        assert found[1] == pytest.approx(wanted[1], rel=1e-7), case
        assert found[2:] == pytest.approx(wanted[2:], rel=0, abs=1e-7 * size * wanted[1]), case


if __name__ == "__main__":
    rows = [f"{json.dumps(repr(case))}: {json.dumps(numbers(*case))}" for case in GRID]
    RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n")
