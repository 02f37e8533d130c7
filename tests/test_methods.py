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


# A stop by the residual.


def moves_until_settled(depth: int, form: str) -> int:
    """How many moves a linear chain takes; its states there are checked by their gradients in plain torch."""
    torch.manual_seed(0)
    model = nn.Sequential(*(pc.Linear(3, 3) for _ in range(depth)), nn.Linear(3, 3)).double()
    with torch.no_grad():
        for layer in model:
            nn.init.orthogonal_(layer.weight)
    x, y = torch.randn(2, 3, dtype=D), torch.randn(2, 3, dtype=D)
    settle = {"state": pc.orders.simultaneous, "error": pc.orders.error}[form]
    order = pc.Order(functools.partial(said("until_settled").until_settled, settle=settle), form)
    options = {"order": order, "precision": 1.0, "step": 0.1}
    free_energy = pc.FreeEnergy(model, steps=500, **options)
    moves = len(free_energy.record(x, y)) - 1
    for steps, reached in ((moves, True), (moves - 1, False)):
        states = pc.FreeEnergy(model, steps=steps, **options).infer(x, y).u
        leaves = [u.requires_grad_() for u in states.values()]
        above = [*leaves, y]
        energy = sum((b - layer(a)).square().sum() / 2 for a, b, layer in zip([x, *leaves], above, model))
        assert (max(g.norm(dim=1).max() for g in torch.autograd.grad(energy, leaves)) < 1e-4) == reached
    return moves


def test_a_stop_by_the_residual():
    """States take more moves in a deeper chain. Errors, each of whose steps reaches every depth, do not."""
    states, errors = ([moves_until_settled(depth, form) for depth in (1, 3)] for form in ("state", "error"))
    assert states[1] > 1.5 * states[0]
    assert errors[1] <= errors[0]


# Associative memory.


def test_recall_from_a_half_of_the_pixels():
    """The recalled half is near the stored one; and the states are those of the paper's energy, its free pixels too."""
    torch.manual_seed(0)
    patterns = torch.rand(4, 16, dtype=D).round()
    seen = (torch.arange(16) < 8).expand(4, 16)
    model = said("Memory").Memory(3, 16, 16).double()
    model.store(patterns, updates=80, lr=0.03, precision=0.3, steps=8)
    hidden = torch.where(seen, patterns, torch.nan)
    momentum = {"state_optimizer": lambda states: torch.optim.SGD(states, lr=0.02, momentum=0.9)}
    options = {"precision": 0.3, "steps": 300, **momentum}
    recalled = model.recall(hidden, seen, **options)
    wrong = (recalled - patterns)[~seen].square().mean()
    assert wrong < 0.1 * patterns[~seen].square().mean()  # of an image with its half blacked out
    assert wrong < 0.25 * (patterns.mean(0) - patterns)[~seen].square().mean()  # of the mean image

    settled = pc.FreeEnergy(model, **options).infer(torch.zeros(4, 3, dtype=D), hidden, mask=seen)
    pixels = torch.where(seen, patterns, recalled)
    leaves = [u.detach().requires_grad_() for u in (settled.u["0"], settled.u["1"], pixels)]
    z, h, image = leaves
    energy = 0.3 / 2 * (z.square().sum() + (h - model[1](z)).square().sum())
    energy = energy + 0.5 * (image - model[3](h.tanh())).square().sum()
    latent, above, free = torch.autograd.grad(energy, leaves)
    assert max(g.abs().max() for g in (latent, above, free[~seen])) < 1e-5


# Hybrid and bidirectional PC.


def test_hybrid_pc_by_hand():
    """T steps of descent from what the amortised network proposes; both gradients at the states reached."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Gaussian(), pc.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    amortised = nn.Linear(4, 2).double()
    images, prior = torch.randn(3, 4, dtype=D), torch.zeros(3, 2, dtype=D)
    free_energy = pc.FreeEnergy(model, order="simultaneous", precision=1.0, steps=6, step=0.1)
    loss = said("hybrid").hybrid(free_energy, amortised, prior, images)

    def energy(z, h):
        return (z.square().sum() + (h - model[1](z)).square().sum() + (images - model[3](h.tanh())).square().sum()) / 2

    z = amortised(images).detach()
    h = model[1](z).detach()
    for _ in range(6):
        leaves = [z.requires_grad_(), h.requires_grad_()]
        z, h = (u.detach() - 0.1 * g for u, g in zip(leaves, torch.autograd.grad(energy(*leaves), leaves)))
    truth = energy(z, h) / 3 + 0.5 * (amortised(images) - z).square().sum() / 3
    assert_close([loss.detach()], [truth.detach()], 1e-12)
    both = nn.ModuleList([model, amortised])
    assert_close(gradients(both, loss), gradients(both, truth), 1e-12)


def test_bidirectional_pc_by_hand():
    """T steps of descent on the paper's energy, and its gradient in the weights of both directions."""
    torch.manual_seed(0)
    model = said("Bidirectional").Bidirectional(3, 5, 2, weight=0.7).double()
    x, y = torch.randn(4, 3, dtype=D), torch.randn(4, 2, dtype=D)
    loss = pc.FreeEnergy(model, order="simultaneous", precision=1.0, steps=6, step=0.1)((x, y), y)

    def energy(h1, h2):
        up = [h1 - model.up[0](x), h2 - model.up[1](h1.tanh()), y - model.up[2](h2.tanh())]
        down = [x - model.down[0](h1.tanh()), h1 - model.down[1](h2.tanh()), h2 - model.down[2](y)]
        return sum(e.square().sum() for e in up) / 2 + 0.7 / 2 * sum(e.square().sum() for e in down)

    h1 = model.up[0](x).detach()
    h2 = model.up[1](h1.tanh()).detach()
    for _ in range(6):
        leaves = [h1.requires_grad_(), h2.requires_grad_()]
        h1, h2 = (u.detach() - 0.1 * g for u, g in zip(leaves, torch.autograd.grad(energy(*leaves), leaves)))
    truth = energy(h1, h2) / 4
    assert_close([loss.detach()], [truth.detach()], 1e-12)
    assert_close(gradients(model, loss), gradients(model, truth), 1e-12)
