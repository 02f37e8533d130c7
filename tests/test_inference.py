"""Inference: it lowers F, every order settles at the same states, and its gradients are what they claim to be."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pc_triton as pc
from pc_triton.models import Transformer

ORDERS = ["error", "sweep", "simultaneous"]
EPS = torch.finfo(torch.float32).eps


class Mixed(nn.Module):
    """A node of every family with a closed form, attention included."""

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


def mlp():
    return nn.Sequential(pc.Linear(5, 8), nn.Tanh(), pc.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def lm():
    return Transformer(11, width=8, heads=2, blocks=2, context=5)


MODELS = {"mlp": mlp, "mixed": Mixed, "transformer": lm}


def make(name: str, device: str = "cpu", dtype=torch.float32, samples: int = 6, seed: int = 0):
    """A model with a batch for it."""
    torch.manual_seed(seed)
    model = MODELS[name]().to(device, dtype)
    if name == "transformer":
        x, y = torch.randint(11, (2, samples, 5))
    elif name == "mixed":
        x, y = torch.randn(samples, 4, 5, dtype=dtype), torch.randint(3, (samples, 4))
    else:
        x, y = torch.randn(samples, 5, dtype=dtype), torch.randint(3, (samples,))
    return model, x.to(device), y.to(device)


def gradients(model, loss, scale: float = 1.0):
    model.zero_grad()
    (scale * loss).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def learn(model, x, y, **options):
    return gradients(model, pc.FreeEnergy(model, **options)(x, y))


def assert_close(actual, expected, tolerance: float) -> None:
    """Each tensor to a fraction of its largest value."""
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-6), (a, b)


def cosine(a, b) -> float:
    a, b = (torch.cat([x.flatten().double() for x in xs]) for xs in (a, b))
    return F.cosine_similarity(a, b, dim=0).item()


# Descent.


def free_energies(model, x, y, steps: int, **options):
    """F of every sample at the prediction and after 1, 2, ... steps: ``[steps + 1, S]``."""
    at_prediction = pc.FreeEnergy(model, precision=1e9).infer(x, y).free_energy
    runs = [pc.FreeEnergy(model, steps=t, **options).infer(x, y).free_energy for t in range(1, steps + 1)]
    return torch.stack([at_prediction, *runs])


@pytest.mark.parametrize("name", MODELS)
def test_free_energy_never_rises(name, device):
    """By default, in any sample, whatever the number of steps."""
    energies = free_energies(*make(name, device), steps=8)
    assert (energies.diff(dim=0) <= 100 * EPS * energies[0]).all()
    assert (energies[2] < 0.9995 * energies[0]).all()


@pytest.mark.parametrize("precision", ["auto", 30.0])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_every_order_and_precision_descends(name, order, precision, device):
    """A move that raises F is taken back: ten steps end below the prediction. Without an attention node none rises."""
    energies = free_energies(*make(name, device), steps=10, order=order, precision=precision)
    assert (energies[-1] < energies[0]).all()
    if name == "mlp":
        assert (energies.diff(dim=0) <= 100 * EPS * energies[0]).all()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    samples=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    labels=st.booleans(),
)
def test_random_networks_descend(widths, samples, order, scale, labels):
    """Any depth and width, small and large weights, labels or values."""
    torch.manual_seed(sum(widths))
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (pc.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 3))
    for p in model.parameters():
        p.data *= scale
    x = torch.randn(samples, widths[0])
    y = torch.randint(3, (samples,)) if labels else torch.randn(samples, 3)
    before = pc.FreeEnergy(model, precision=1e9).infer(x, y).free_energy
    after = pc.FreeEnergy(model, order=order).infer(x, y).free_energy
    assert (after <= before + 20 * EPS * (before + 1)).all()


# Equilibria.


@pytest.mark.parametrize(("name", "precision"), [("mlp", "auto"), ("mlp", 3.0), ("mixed", 3.0), ("transformer", 3.0)])
def test_all_orders_settle_at_the_same_states(name, precision):
    """And there the learning gradients agree too."""
    model, x, y = make(name, dtype=torch.float64, samples=2)
    if name == "transformer":
        nn.init.normal_(model.tokens.weight)  # at std 0.02 a fixed step of state form diverges
    results = {}
    for order in ORDERS:
        options = {"order": order, "precision": precision, "steps": 150 if name == "mlp" else 80, "step": 0.3}
        settled = pc.FreeEnergy(model, **options).infer(x, y)
        results[order] = settled.free_energy, list(settled.states.values()), learn(model, x, y, **options)
    at_prediction = pc.FreeEnergy(model, precision=1e9).infer(x, y).free_energy
    energy, states, grads = results["error"]
    assert (energy < 0.9999 * at_prediction).all()
    for other_energy, other_states, other_grads in results.values():
        assert_close([other_energy], [energy], 1e-6)
        assert_close(other_states, states, 1e-4)
        assert_close(other_grads, grads, 1e-3)


def chain_equilibrium(weights, biases, x, y, pi: float, free_input: bool):
    """States of a linear Gaussian chain with an output of variance 1: the linear system dF/du = 0, per sample."""
    sizes = [w.shape[0] for w in weights[:-1]]
    first = [x.shape[1]] if free_input else []
    offsets = torch.tensor([0, *first, *sizes]).cumsum(0)
    n = int(offsets[-1])
    blocks = [slice(int(a), int(b)) for a, b in itertools.pairwise(offsets)]
    # Each energy is rate / 2 |A u - c|^2.
    terms = []
    if free_input:
        a = torch.zeros(x.shape[1], n, dtype=x.dtype)
        a[:, blocks[0]] = torch.eye(x.shape[1], dtype=x.dtype)
        terms.append((pi, a, x))
    for layer, (w, b) in enumerate(zip(weights, biases)):
        a, c = torch.zeros(w.shape[0], n, dtype=x.dtype), b.expand(len(x), -1)
        own, below = layer + len(first), layer + len(first) - 1
        last = layer == len(weights) - 1
        if last:
            c = y - c
            a[:, blocks[below]] = w
        else:
            a[:, blocks[own]] = torch.eye(w.shape[0], dtype=x.dtype)
            if below >= 0:
                a[:, blocks[below]] = -w
            else:
                c = c + x @ w.T
        terms.append((1.0 if last else pi, a, c))
    matrix = sum(rate * a.T @ a for rate, a, _ in terms)
    right = sum(rate * c @ a for rate, a, c in terms)
    u = torch.linalg.solve(matrix, right.T).T
    energy = sum(rate / 2 * ((u @ a.T - c) ** 2).sum(1) for rate, a, c in terms)
    return [u[:, block] for block in blocks], energy


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("free_input", [False, True])
@pytest.mark.parametrize("pi", [0.5, 4.0])
def test_linear_gaussian_network_reaches_its_equilibrium(order, free_input, pi):
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(4, 5), pc.Linear(5, 3), nn.Linear(3, 2)).double()
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    with torch.no_grad():
        truth, energy = chain_equilibrium([m.weight for m in model], [m.bias for m in model], x, y, pi, free_input)
    settled = pc.FreeEnergy(model, order=order, precision=pi, steps=400, step=0.3).infer(
        x, y, clamp_input=not free_input
    )
    names = (["input"] if free_input else []) + ["0", "1"]
    assert list(settled.states) == names
    assert_close(settled.states.values(), truth, 1e-9)
    assert_close([settled.free_energy], [energy], 1e-9)
    assert (settled.input is settled.states["input"]) if free_input else (settled.input is x)


@pytest.mark.parametrize("order", ["error", "simultaneous"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda states: torch.optim.SGD(states, lr=0.1, momentum=0.5),
        lambda states: torch.optim.Adam(states, lr=0.01),
    ],
    ids=["momentum", "adam"],
)
def test_state_optimizers_settle_at_the_same_states(optimizer, order):
    model, x, y = make("mlp", dtype=torch.float64)
    truth = pc.FreeEnergy(model, precision=2.0, steps=100).infer(x, y)
    settled = pc.FreeEnergy(model, order=order, precision=2.0, steps=250, state_optimizer=optimizer).infer(x, y)
    assert_close(settled.states.values(), truth.states.values(), 1e-3)
    assert_close([settled.free_energy], [truth.free_energy], 1e-5)


def test_a_state_optimizer_is_plain_descent_with_lr_for_step():
    """SGD of lr 0.3 on the natural gradient is step=0.3."""
    model, x, y = make("mixed", dtype=torch.float64)
    ours = pc.FreeEnergy(model, order="simultaneous", precision=2.0, steps=5, step=0.3).infer(x, y)
    theirs = pc.FreeEnergy(
        model, order="simultaneous", precision=2.0, steps=5, state_optimizer=lambda s: torch.optim.SGD(s, lr=0.3)
    ).infer(x, y)
    assert_close(theirs.states.values(), ours.states.values(), 1e-6)


# Learning.


@pytest.mark.parametrize("name", MODELS)
def test_one_error_step_is_backpropagation(name, device):
    model, x, y = make(name, device)
    loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
    free_energy = pc.FreeEnergy(model, steps=1)(x, y)
    torch.testing.assert_close(free_energy, loss)
    assert_close(gradients(model, free_energy), gradients(model, loss), 100 * EPS)


@pytest.mark.parametrize("order", ORDERS)
def test_a_high_precision_is_backpropagation_in_direction(order):
    """The states stay at the prediction; the sweep carries the error through every layer in one step."""
    model, x, y = make("mlp", dtype=torch.float64)
    learned = learn(model, x, y, order=order, precision=1e4, steps=60)
    assert cosine(learned, gradients(model, F.cross_entropy(model(x), y))) > 0.999999


@pytest.mark.parametrize("steps", [1, 2])
def test_few_simultaneous_steps_leave_the_lower_layers_alone(steps):
    """The error descends one node a step, as in the paper."""
    model, x, y = make("mlp")
    free_energy = pc.FreeEnergy(model, order="simultaneous", precision=1.0, steps=steps)
    first, second, head = (g.abs().max() for g in gradients(model, free_energy(x, y))[::2])
    assert head > 0
    assert second > 0
    assert (first > 1e-6) == (steps == 2)
    assert list(pc.FreeEnergy(model, order="simultaneous", precision=1.0).infer(x, y).states) == ["0", "2"]


def test_incremental_by_hand():
    """Two scalar weights: states and weights move from the same old states (Salvatori et al. 2024, algorithm 1)."""
    pi, step, lr, steps = 2.0, 0.25, 0.1, 4
    x, y, v, w = 1.5, -0.7, 0.8, -1.1
    model = nn.Sequential(pc.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    for layer, weight in zip(model, (v, w)):
        nn.init.constant_(layer.weight, weight)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    free_energy = pc.FreeEnergy(model, order="incremental", precision=pi, step=step, steps=steps)
    u, seen = v * x, 0
    for loss in free_energy.incremental(*(torch.tensor([[t]], dtype=torch.float64) for t in (x, y))):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hidden, out = u - v * x, y - w * u
        assert loss.item() == pytest.approx(pi / 2 * hidden**2 + out**2 / 2, rel=1e-12)
        u, v, w = u - step * (hidden - w * out / pi), v + lr * pi * hidden * x, w + lr * out * u
        assert [layer.weight.item() for layer in model] == pytest.approx([v, w], rel=1e-12)
        seen += 1
    assert seen == steps


def test_incremental_with_still_weights_settles_where_inference_does():
    model, x, y = make("mixed", dtype=torch.float64)
    free_energy = pc.FreeEnergy(model, order="incremental", precision=3.0, steps=80)
    for loss in free_energy.incremental(x, y):
        grads = gradients(model, loss)
    truth = pc.FreeEnergy(model, precision=3.0, steps=50)(x, y)
    assert_close([loss.detach()], [truth.detach()], 1e-6)
    assert_close(grads, gradients(model, truth), 1e-3)


def test_incremental_descends_a_batch():
    """Repeated on one batch, F falls to half of what it was."""
    model, x, y = make("mlp")
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    free_energy = pc.FreeEnergy(model, order="incremental")
    losses = []
    for _ in range(80):
        for loss in free_energy.incremental(x, y):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Samples do not know of each other.


@pytest.mark.parametrize("precision", ["auto", 2.0])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_add_up(name, order, precision):
    """Gradients of parts of a batch, weighted by their labels, are the batch's."""
    model, x, y = make(name, dtype=torch.float64)
    y.view(-1)[:2] = -100
    options = {"order": order, "precision": precision, "steps": 5}
    whole = learn(model, x, y, **options)
    free_energy, items = pc.FreeEnergy(model, **options), (y != -100).sum()
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        (free_energy(x[part], y[part]) * (y[part] != -100).sum() / items).backward()
    assert_close([p.grad for p in model.parameters()], whole, 1e-6)  # the guard compares F's that differ by rounding


@pytest.mark.parametrize("order", ORDERS)
def test_a_wild_sample_disturbs_no_other(order):
    """Precision, unit and guard are each sample's own."""
    model, x, y = make("mlp", dtype=torch.float64)
    free_energy = pc.FreeEnergy(model, order=order, steps=6)
    calm = free_energy.infer(x, y)
    x[0] *= 1e4
    wild = free_energy.infer(x, y)
    assert wild.free_energy[0] != calm.free_energy[0]
    assert_close([wild.free_energy[1:]], [calm.free_energy[1:]], 1e-9)
    assert_close([s[1:] for s in wild.states.values()], [s[1:] for s in calm.states.values()], 1e-9)


# Random numbers.


class Sampled(nn.Module):
    """Dropout below or above a node that draws noise."""

    def __init__(self, before: float, after: float, noise: bool) -> None:
        super().__init__()
        node = pc.GaussianLogVar() if noise else pc.Gaussian()
        self.layers = nn.Sequential(
            nn.Dropout(before),
            nn.Linear(5, 16 if noise else 8),
            node,
            nn.Dropout(after),
            pc.Linear(8, 8),
            nn.Tanh(),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("before", "after", "noise"),
    [
        (0.5, 0.0, False),
        (0.0, 0.5, False),
        (0.5, 0.0, True),
        (0.0, 0.5, True),
    ],
)
def test_dropout_is_held_through_inference(order, before, after, noise):
    """With states that cannot move, F is the same at every pass."""
    torch.manual_seed(0)
    model, x, y = Sampled(before, after, noise).double(), *batch_of_labels()
    losses = []
    for options in ({"steps": 1}, {"steps": 4, "order": order, "precision": 1e9}):
        torch.manual_seed(7)
        losses.append(pc.FreeEnergy(model, **options)(x, y).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    torch.manual_seed(8)
    assert pc.FreeEnergy(model, steps=1)(x, y).item() != pytest.approx(losses[0], rel=1e-3)


def batch_of_labels(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return torch.randn(6, 5, generator=g, dtype=dtype), torch.randint(3, (6,), generator=g)


@pytest.mark.parametrize(
    ("dropout", "noise", "steps"),
    [(0.5, False, 1), (0.5, False, 3), (0.0, True, 1), (0.0, True, 3)],
)
def test_the_next_batch_draws_other_numbers(dropout, noise, steps):
    torch.manual_seed(0)
    model, (x, y) = Sampled(dropout, 0.0, noise).double(), batch_of_labels()
    free_energy = pc.FreeEnergy(model, steps=steps)
    assert free_energy(x, y).item() != free_energy(x, y).item()


def test_inference_leaves_the_generator_where_one_pass_would():
    torch.manual_seed(0)
    model, (x, y) = Sampled(0.5, 0.5, False).double(), batch_of_labels()
    torch.manual_seed(1)
    model(x)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    pc.FreeEnergy(model, steps=4)(x, y)
    assert torch.equal(torch.get_rng_state(), after)


# Clamped and free ends.


def test_reconstruction():
    """A free input moves from its prediction towards an input that explains y."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
    target = torch.randn(3, 4)
    with torch.no_grad():
        y = model(target)
    x = target + 0.5 * torch.randn(3, 4)
    settled = pc.FreeEnergy(model, steps=300, precision=0.01).infer(x, y, clamp_input=False)
    assert settled.input.shape == x.shape
    with torch.no_grad():
        assert (model(settled.input) - y).norm() < 0.7 * (model(x) - y).norm()
    assert torch.equal(pc.FreeEnergy(model).infer(x, y).input, x)


@pytest.mark.parametrize("start", [0.0, 0.7])
def test_a_free_input_has_variance_1_by_default(start, device):
    """Around what is given, also where that is 0 and has no scale of its own: the minimum of F, in closed form."""
    torch.manual_seed(0)
    model, y = nn.Sequential(pc.Linear(3, 5)).double().to(device), torch.randn(4, 5, dtype=torch.float64, device=device)
    x = torch.full((4, 3), start, dtype=torch.float64, device=device)
    w = model[0].weight.detach()
    truth = x + (y - model(x).detach()) @ torch.linalg.solve(torch.eye(3).to(w) + w.T @ w, w.T).T
    settled = pc.FreeEnergy(model, steps=60).infer(x, y, clamp_input=False)
    assert_close([settled.input], [truth], 1e-6)


def test_a_decoder_learns_more_than_the_mean_image():
    """Inputs inferred from zeros tell the images apart, and the model learns to: by default."""
    torch.manual_seed(0)
    images = 2 * nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 12))(torch.randn(64, 2)).detach()
    model = nn.Sequential(pc.Linear(2, 32), nn.Tanh(), nn.Linear(32, 12))
    optimizer, free_energy = torch.optim.Adam(model.parameters(), 1e-2), pc.FreeEnergy(model)
    for _ in range(150):
        z = free_energy.infer(torch.zeros(64, 2), images, clamp_input=False).input
        optimizer.zero_grad()
        free_energy(z, images).backward()
        optimizer.step()
    z = free_energy.infer(torch.zeros(64, 2), images, clamp_input=False).input
    with torch.no_grad():
        assert (model(z) - images).norm() < 0.5 * (images - images.mean(0)).norm()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("clamp_input", [True, False])
def test_generation(order, clamp_input):
    """Without y the states are their predictions, and the output the model's."""
    model, x, _ = make("mixed")
    settled = pc.FreeEnergy(model, order=order, precision=2.0, steps=3).infer(x, clamp_input=clamp_input)
    torch.testing.assert_close(settled.output, model(x))
    assert settled.free_energy.abs().max() < 1e-5
    torch.testing.assert_close(settled.states["inp"], model.inp(x))
    assert pc.FreeEnergy(model)(x) == 0


def test_a_last_node_is_the_output():
    """A model that returns a node's emission: its logits are clamped, and it is no free state."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), pc.Categorical())
    x, y = batch_of_labels(torch.float32)
    settled = pc.FreeEnergy(model, steps=3).infer(x, y)
    assert list(settled.states) == ["0"]
    truth = pc.FreeEnergy(model[:3], steps=3)
    torch.testing.assert_close(settled.free_energy, truth.infer(x, y).free_energy)
    assert_close(learn(model, x, y, steps=3), gradients(model, truth(x, y)), 100 * EPS)


def test_a_last_node_seen_through_a_view():
    """``squeeze(-1)`` after the last layer: y has the output's shape, as documented."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(5, 8), nn.Tanh(), pc.Linear(8, 1), nn.Flatten(0))
    loss = pc.FreeEnergy(model, steps=1)(torch.randn(6, 5), torch.randn(6))
    assert loss > 0


def test_a_last_node_transposed():
    """The energy is that of what the model returns."""
    torch.manual_seed(0)

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = pc.Linear(4, 4), pc.Linear(4, 3)

        def forward(self, x):
            return self.b(self.a(x).tanh()).transpose(1, 2)

    model, x, y = Transposed(), torch.randn(2, 3, 4), torch.randn(2, 3, 3)
    loss = pc.FreeEnergy(model, steps=1)(x, y)
    torch.testing.assert_close(loss, ((model(x) - y) ** 2).sum() / 2 / 2)


# Graphs that are no chain.


class Branches(nn.Module):
    """``dead`` reaches no output, ``again`` is visited twice, and ``tied`` has ``again``'s weight."""

    def __init__(self, dead: bool = True) -> None:
        super().__init__()
        self.first, self.again, self.tied = pc.Linear(5, 8), pc.Linear(8, 8), pc.Linear(8, 8)
        self.head, self.dead = nn.Linear(8, 3), pc.Linear(8, 8) if dead else None
        self.tied.weight = self.again.weight

    def forward(self, x):
        x = self.first(x).tanh()
        if self.dead is not None:
            self.dead(x)
        x = self.again(self.again(x).tanh())
        return self.head(x + self.tied(x).tanh())


def branches(dead: bool):
    torch.manual_seed(0)
    return Branches(dead).double()


@pytest.mark.parametrize("order", ORDERS)
def test_a_node_that_does_not_reach_the_output_changes_nothing(order):
    x, y = batch_of_labels()
    model, without = branches(True), branches(False)
    learned = dict(zip(dict(model.named_parameters()), learn(model, x, y, order=order, steps=4)))
    assert (learned.pop("dead.weight") == 0).all()
    assert (learned.pop("dead.bias") == 0).all()
    without.load_state_dict(model.state_dict(), strict=False)
    assert_close(learned.values(), learn(without, x, y, order=order, steps=4), 1e-9)


def test_visits_have_names_and_shared_weights_add_up():
    x, y = batch_of_labels()
    model = branches(False)
    settled = pc.FreeEnergy(model, precision=2.0, steps=100).infer(x, y)
    assert list(settled.states) == ["first", "again", "again#2", "tied"]
    bp = gradients(model, F.cross_entropy(model(x), y))
    assert_close(learn(model, x, y, steps=1), bp, 1e-9)

    states = [s.requires_grad_() for s in settled.states.values()]  # the local gradients at the equilibrium, by hand
    below = [x, states[0].tanh(), states[1].tanh(), states[2]]
    layers = [model.first, model.again, model.again, model.tied]
    energy = sum(
        ((u.detach() - F.linear(h.detach(), m.weight, m.bias)) ** 2).sum() for u, h, m in zip(states, below, layers)
    )
    out = (states[2] + states[3].tanh()).detach()
    local = gradients(model, energy + F.cross_entropy(model.head(out), y, reduction="sum"), 1 / 6)
    for order in ORDERS:
        assert_close(learn(model, x, y, order=order, precision=2.0, steps=100, step=0.4), local, 1e-3)


def test_frozen_parameters():
    """They get no gradient; the others get what they would have got."""
    model, x, y = make("mlp", dtype=torch.float64)
    truth = learn(model, x, y, steps=3)
    for layer in (0, 4):
        model.zero_grad()
        for p in model.parameters():
            p.requires_grad_(True)
        model[layer].requires_grad_(False)
        pc.FreeEnergy(model, steps=3)(x, y).backward()
        for p, g in zip(model.parameters(), truth):
            assert (p.grad is None) == (not p.requires_grad)
            if p.requires_grad:
                assert_close([p.grad], [g], 1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_a_frozen_model_infers(order):
    model, x, y = make("transformer", dtype=torch.float64)
    truth = pc.FreeEnergy(model, order=order, steps=4).infer(x, y)
    model.requires_grad_(False)
    settled = pc.FreeEnergy(model, order=order, steps=4).infer(x, y)
    assert_close(settled.states.values(), truth.states.values(), 1e-9)


def test_without_grad_inference_is_the_same():
    """``torch.no_grad`` round a call, as in an evaluation loop: the same value, without a graph."""
    model, x, y = make("mlp")
    free_energy = pc.FreeEnergy(model)
    with torch.no_grad():
        loss = free_energy(x, y)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, free_energy(x, y).detach())


# Refused.


@pytest.mark.parametrize("order", ORDERS)
def test_an_operation_in_place_after_a_node_is_refused(order):
    model = nn.Sequential(pc.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    x, y = batch_of_labels(torch.float32)
    with pytest.raises(RuntimeError, match=r"after node '0' changes its output in place: use inplace=False"):
        pc.FreeEnergy(model, order=order)(x, y)


@pytest.mark.parametrize("more", [True, False])
def test_a_path_that_changes_is_refused(more):
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.passes = pc.Linear(5, 5), pc.Linear(5, 5), nn.Linear(5, 3), 0

        def forward(self, x):
            self.passes += 1
            x = self.a(x)
            return self.c(self.b(x) if more == (self.passes > 1) else x)

    with pytest.raises(RuntimeError, match=r"same path at every step|same at every step"):
        pc.FreeEnergy(Changing())(*batch_of_labels(torch.float32))


# Number formats.


@pytest.mark.parametrize("order", [*ORDERS, "incremental"])
def test_a_scaled_loss_scales_the_gradients(order):
    """As GradScaler does; exactly, by a power of two."""
    model, x, y = make("mixed")

    def grads(scale):
        free_energy = pc.FreeEnergy(model, order=order, steps=3)
        if order == "incremental":
            return [g for loss in free_energy.incremental(x, y) for g in gradients(model, loss, scale)]
        return gradients(model, free_energy(x, y), scale)

    for a, b in zip(grads(2.0**12), grads(1.0)):
        torch.testing.assert_close(a, b * 2**12, rtol=1e-6, atol=1e-6 * b.abs().max().item() * 2**12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_autocast_is_close(name, order, device):
    """bfloat16 products have 8 bits; u - mu of the state forms cancels most of them."""
    model, x, y = make(name, device)
    truth = learn(model, x, y, order=order, steps=3)
    with torch.autocast(device, torch.bfloat16):
        loss = pc.FreeEnergy(model, order=order, steps=3)(x, y)
    learned = gradients(model, loss)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in learned)
    assert cosine(learned, truth) > (0.99 if order == "error" else 0.9)


def test_incremental_within_autocast():
    """The weights move between its passes: what autocast had cast of them before is not used again."""

    def losses(**options):
        model, x, y = make("mixed")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        values = []
        with torch.autocast("cpu", torch.bfloat16, **options):
            for loss in pc.FreeEnergy(model, order="incremental", steps=4).incremental(x, y):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                values.append(loss.item())
        return values

    assert losses() == losses(cache_enabled=False)
    assert losses()[3] < losses()[0]


@pytest.mark.parametrize("order", ORDERS)
def test_double_precision_is_kept(order, device):
    """In a float64 model the states and F are float64, and single precision's error is visible against them."""
    model, x, y = make("mixed", device, torch.float64)
    settled = pc.FreeEnergy(model, order=order, precision=2.0, steps=3).infer(x, y)
    assert all(s.dtype == torch.float64 for s in settled.states.values())
    assert settled.free_energy.dtype == torch.float64
    single = pc.FreeEnergy(model.float(), order=order, precision=2.0, steps=3).infer(x.float(), y)
    error = (single.free_energy - settled.free_energy).abs().max()
    assert 0 < error < 1e-5 * settled.free_energy.abs().max()


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["mixed", "transformer"])
def test_the_kernels_give_the_same_gradients(name, order, device):
    """Whole inference on Triton, in its interpreter on a CPU, against plain torch."""
    pytest.importorskip("triton")
    if device == "cpu" and not interpreted():
        pytest.skip("a CPU needs the interpreter")
    model, x, y = make(name, device, samples=2)
    with pc.use_backend("torch"):
        truth = learn(model, x, y, order=order)
    with pc.use_backend("triton"):
        kernels = learn(model, x, y, order=order)
    assert cosine(kernels, truth) > 1 - 1e-6
    assert_close(kernels, truth, 1e-3)


def test_use_backend_refuses_other_names():
    with pytest.raises(ValueError, match="choose 'triton' or 'torch'"), pc.use_backend("cuda"):
        pass


def test_simultaneous_computes_backwards_what_the_error_has_reached():
    """At step t the top t nodes move, and nothing is done beneath them; the states are those of a plain loop."""
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (pc.Linear(4, 4), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    x, y, moved = torch.randn(2, 4).double(), torch.randn(2, 3).double(), []
    for number, layer in enumerate(layers[::2]):
        step = layer.node.node_step
        layer.node.node_step = lambda *a, n=number, step=step, **k: moved.append(n) or step(*a, **k)
    settled = pc.FreeEnergy(model, order="simultaneous", steps=3, precision=2.0, step=0.1).infer(x, y)
    assert moved[: 1 + 2 + 3] == [4, 4, 3, 4, 3, 2]

    states = [x]
    for layer in layers[::2]:
        states.append(layer(states[-1].tanh() if len(states) > 1 else states[-1]).detach())
    for _ in range(3):
        leaves = [u.detach().requires_grad_() for u in states[1:]]
        below = [x, *(u.tanh() for u in leaves)]
        energy = ((model[-1](below[-1]) - y) ** 2).sum() / 2
        for layer, u, h in zip(layers[::2], leaves, below):
            energy = energy + 2.0 * ((u - F.linear(h, layer.weight, layer.bias)) ** 2).sum() / 2
        grads = torch.autograd.grad(energy, leaves)
        states = [x, *(u.detach() - 0.1 / 2.0 * g for u, g in zip(leaves, grads))]
    for number, u in enumerate(states[1:]):
        torch.testing.assert_close(settled.states[str(2 * number)], u)


def test_simultaneous_past_a_residual_connection():
    """A node whose parent has moved is not at its prediction, though no error has come down to it yet."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = pc.Linear(4, 4), pc.Linear(4, 4), pc.Linear(4, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            a = self.a(x)
            return self.head(a + self.c(self.b(a.tanh()).tanh()))

    model, x, y = Residual().double(), torch.randn(2, 4).double(), torch.randn(2, 3).double()
    options = {"order": "simultaneous", "precision": 2.0, "steps": 4}
    skipping = pc.FreeEnergy(model, step=0.3, **options).infer(x, y)
    whole = pc.FreeEnergy(model, state_optimizer=lambda s: torch.optim.SGD(s, lr=0.3), **options).infer(x, y)
    assert_close(skipping.states.values(), whole.states.values(), 1e-7)  # step is float32
