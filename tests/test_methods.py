"""The methods of docs/methods.md, run as printed there, against their papers' equations in plain torch and float64."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_inference import assert_close, gradients
from torch import nn

import pc_triton as pc

D = torch.float64
PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"


@functools.cache
def said(name: str) -> SimpleNamespace:
    """What the page's block defines in which ``name`` is; it stands on the page's first block alone."""
    first, *others = re.findall(r"^```python\n(?s:(.*?))^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    (block,) = [block for block in others if re.search(rf"^(def|class) {name}\b", block, re.MULTILINE)]
    namespace = {"__name__": "methods"}
    exec(compile(first + block, str(PAGE), "exec"), namespace)
    return SimpleNamespace(**namespace)


def deep(labels: bool = True):
    """A network of two hidden nodes with a batch."""
    torch.manual_seed(1)
    model = nn.Sequential(pc.Linear(4, 6), nn.Tanh(), pc.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    y = torch.randint(3, (4,)) if labels else torch.randn(4, 3, dtype=D)
    return model, torch.randn(4, 4, dtype=D), y


# Backpropagation exactly.


def test_z_il_updates_as_backpropagation_does():
    """Every weight after one update is that of a step of SGD, though the layers learn one after the other."""
    model, x, y = deep()
    before = [p.detach().clone() for p in model.parameters()]
    wanted = gradients(model, F.cross_entropy(model(x), y))
    layers = [model[4], model[2], model[0]]
    free_energy = pc.FreeEnergy(model, order="incremental", precision=1.0, step=1.0)
    optimizers = [torch.optim.SGD(layer.parameters(), 0.5) for layer in layers]
    said("zero_divergence").zero_divergence(free_energy, layers, optimizers, x, y)
    found = [(old - new.detach()) / 0.5 for old, new in zip(before, model.parameters())]
    assert_close(found, wanted, 1e-10)


def test_z_il_needs_its_sequence():
    """The same layer learns something else one step later."""
    model, x, y = deep()
    wanted = gradients(model, F.cross_entropy(model(x), y))
    free_energy = pc.FreeEnergy(model, order="incremental", precision=1.0, step=1.0, steps=3)
    seen = [gradients(model, loss) for loss in free_energy.incremental(x, y)]
    for turn, pair in enumerate((slice(4, 6), slice(2, 4), slice(0, 2))):
        assert_close(seen[turn][pair], wanted[pair], 1e-10)
        if turn < 2:
            assert (seen[turn + 1][pair][0] - wanted[pair][0]).abs().max() > 1e-3 * wanted[pair][0].abs().max()


def test_fixed_predictions_learn_as_torch2pc_does():
    """Rosenbaum's loop: e = v - v_hat, v <- v - eta (e - J'e above), v_hat and J of the forward pass, eta = 1."""
    model, x, y = deep()
    h0 = model[0](x)
    h1 = model[2](h0.tanh())
    loss = F.cross_entropy(model[4](h1.tanh()), y)
    derive = functools.partial(torch.autograd.grad, retain_graph=True)
    e0, e1 = torch.zeros_like(h0), torch.zeros_like(h1)
    (top,) = derive(loss, h1)
    for _ in range(3):  # as many steps as layers
        (below,) = derive(h1, h0, e1)
        e0, e1 = e0 - (e0 - below), e1 - (e1 - top)
    pairs = (h0, model[0], e0), (h1, model[2], e1), (loss, model[4], None)
    theirs = [g for of, layer, e in pairs for g in derive(of, list(layer.parameters()), e)]
    assert_close(gradients(model, pc.FreeEnergy(model, steps=1)(x, y)), theirs, 1e-10)


# Nudging.


@pytest.mark.parametrize(("kind", "order"), [("positive", 1), ("negative", 1), ("centred", 2)])
def test_the_order_of_the_error_of_nudging(kind, order):
    """Half of beta leaves a half of the error of a one-sided estimate, and a quarter of the centred one's."""
    model, x, y = deep()
    truth = torch.cat([g.flatten() for g in gradients(model, F.cross_entropy(model(x), y))])
    page, options = said("nudged"), {"order": "simultaneous", "precision": 1.0, "steps": 100, "step": 0.3}

    def error(beta):
        estimate = page.centred if kind == "centred" else page.nudged
        found = estimate(model, x, y, -beta if kind == "negative" else beta, **options)
        return (torch.cat([g.flatten() for g in found]) - truth).norm().item()

    assert error(0.05) / error(0.025) == pytest.approx(2**order, rel=0.05)
