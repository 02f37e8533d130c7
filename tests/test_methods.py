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
from test_rules import Langevin
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
    with torch.random.fork_rng(devices=[]):  # it seeds and draws
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


@pytest.mark.parametrize(("moves", "step"), [(1, 0.3), (4, 0.3), (2, 1.0)])
def test_fixed_predictions_by_hand(moves, step):
    """Rosenbaum's loop: e = v - v_hat, v <- v - eta (e - J'e above), v_hat and J of the forward pass."""
    model, x, y = deep()
    h0 = model[0](x)
    h1 = model[2](h0.tanh())
    loss = F.cross_entropy(model[4](h1.tanh()), y)
    derive = functools.partial(torch.autograd.grad, retain_graph=True)
    e0, e1 = torch.zeros_like(h0), torch.zeros_like(h1)
    (top,) = derive(loss, h1)
    for _ in range(moves):
        (below,) = derive(h1, h0, e1)
        e0, e1 = e0 - step * (e0 - below), e1 - step * (e1 - top)
    pairs = (h0, model[0], e0), (h1, model[2], e1), (loss, model[4], None)
    theirs = [g for of, layer, e in pairs for g in derive(of, list(layer.parameters()), e)]
    backpropagation = gradients(model, pc.FreeEnergy(model, steps=1)(x, y))
    model[0].node, model[2].node = (said("FixedPrediction").FixedPrediction() for _ in range(2))
    free_energy = pc.FreeEnergy(model, order="simultaneous", precision=1.0, step=step, steps=moves)
    assert_close(gradients(model, free_energy(x, y)), theirs, 1e-10)
    if step == 1:  # as many as the first layer lies below the output: there it is backpropagation
        assert_close(backpropagation, theirs, 1e-10)
    else:
        assert (backpropagation[0] - theirs[0]).abs().max() > 0.1 * backpropagation[0].abs().max()


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


# Feedback weights of their own.


def test_other_feedback_by_hand():
    """States and weights by the errors that the feedback brings down; the feedback has the weights' gradient."""
    torch.manual_seed(0)
    page = said("Feedback")
    model = nn.Sequential(
        pc.Linear(3, 5), nn.Tanh(), page.Feedback(5, 4), pc.Gaussian(), nn.Tanh(), page.Feedback(4, 2)
    )
    model = model.double()
    x, y = torch.randn(4, 3, dtype=D), torch.randn(4, 2, dtype=D)
    first, second, last = model[0], model[2], model[5]
    with torch.no_grad():
        h0 = first(x)
        h1 = second(h0.tanh())
        for moves in range(7):
            e0, e1 = h0 - first(x), h1 - second(h0.tanh())
            top = last(h1.tanh()) - y
            if moves == 6:
                break
            down0 = (1 - h0.tanh() ** 2) * (-e1 @ second.feedback)
            down1 = (1 - h1.tanh() ** 2) * (top @ last.feedback)
            h0, h1 = h0 - 0.1 * (e0 + down0), h1 - 0.1 * (e1 + down1)
        truth = []
        for error, below, learns in ((-e0, x, False), (-e1, h0.tanh(), True), (top, h1.tanh(), True)):
            weight = error.T @ below / 4
            truth += [weight, error.mean(0), weight] if learns else [weight, error.mean(0)]
    free_energy = pc.FreeEnergy(model, order="simultaneous", precision=1.0, steps=6, step=0.1)
    assert_close(gradients(model, free_energy(x, y)), truth, 1e-10)


def digits():
    """Scikit-learn's 8 x 8 digits, 1,500 to learn and 297 to test."""
    x, y = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    return (x[:1500], y[:1500]), (x[1500:], y[1500:])


@pytest.mark.parametrize("learns", [False, True])
def test_other_feedback_trains_the_digits(learns):
    """And the weights come to agree with it: random feedback in part, and feedback that learns nearly whole."""
    torch.manual_seed(0)
    page, ((x, y), test) = said("Feedback"), digits()
    upper, last = page.Feedback(32, 32, learns), page.Feedback(32, 10, learns)
    model = nn.Sequential(pc.Linear(64, 32), nn.Tanh(), upper, pc.Gaussian(), nn.Tanh(), last)
    free_energy = pc.FreeEnergy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, weight_decay=1e-3 if learns else 0.0)

    def agreement():
        pairs = [(layer.weight.flatten(), layer.feedback.flatten()) for layer in (upper, last)]
        return torch.stack([F.cosine_similarity(*pair, 0) for pair in pairs])

    before = agreement()
    for batch in torch.arange(150 * 128).remainder(1500).split(128):
        optimizer.zero_grad()
        free_energy(x[batch], y[batch]).backward()
        optimizer.step()
    assert (model(test[0]).argmax(1) == test[1]).float().mean() > 0.7
    assert (agreement() > before + 0.1).all()
    assert (agreement() > 0.6).all() == learns


def test_direct_kolen_pollack_trains_the_digits():
    """In one step of inference a batch; without the direct update the lower layers have nothing to learn from yet."""
    (x, y), test = digits()
    values = F.one_hot(y, 10).float()

    def accuracy(rate):
        torch.manual_seed(0)
        hidden = [nn.Sequential(nn.Linear(m, n), nn.Tanh(), pc.Gaussian()) for m, n in ((64, 32), (32, 32))]
        model = nn.Sequential(*hidden, nn.Linear(32, 10))
        free_energy = pc.FreeEnergy(model, order="simultaneous", precision=1.0, step=0.1, steps=1)
        feedback, optimizer = [0.2 * torch.randn(32, 10) for _ in range(2)], torch.optim.SGD(model.parameters(), 0.05)
        update = said("direct_kolen_pollack").direct_kolen_pollack
        for batch in torch.arange(100 * 128).remainder(1500).split(128):
            update(free_energy, feedback, optimizer, x[batch], values[batch], rate)
        return (model(test[0]).argmax(1) == test[1]).float().mean().item()

    direct = accuracy(0.1)
    assert direct > 0.6
    assert direct > accuracy(0.0) + 0.2


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


# Monte Carlo PC.


def test_monte_carlo_pc_learns_mean_and_variance():
    """Data of mean 1 and variance 5: w = 2 and b = 1 / 2, but for the size of the steps. Without noise w grows.

    With S the variance of y, the fixed point of Langevin's steps of size lr has 1 + w^2 = S / (1 + S lr / 2).
    """
    langevin, lr = said("langevin").langevin, 0.02
    torch.manual_seed(0)
    y = 1 + 5**0.5 * torch.randn(1024, 1, dtype=D)

    def learn(updates, **options):
        model = nn.Sequential(pc.Linear(1, 1), nn.Linear(1, 1, bias=False)).double()
        bias, weight = model[0].bias, model[1].weight
        nn.init.zeros_(bias), nn.init.constant_(weight, 0.5)
        free_energy = pc.FreeEnergy(model, order="simultaneous", precision=1.0, **options)
        optimizer, learned = torch.optim.SGD([bias, weight], 0.2), []
        for _ in range(updates):
            optimizer.zero_grad()
            free_energy(torch.zeros_like(y), y).backward()
            optimizer.step()
            learned.append((weight.item(), bias.item()))
        return torch.tensor(learned[-20:]).mean(0)

    weight, bias = learn(60, steps=40, state_optimizer=langevin(lr))
    variance = y.var(correction=0).item()
    truth = (variance / (1 + variance * lr / 2) - 1) ** 0.5
    assert 1.8 < truth < 2.1
    assert weight == pytest.approx(truth, abs=0.1)
    assert bias == pytest.approx(y.mean().item() / truth, abs=0.05)
    assert learn(30, steps=20, step=0.1)[0] > truth + 0.5


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


def test_the_amortised_network_saves_steps():
    """Once it has learnt, two steps from its proposal end lower than eight from the prior's mean."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Gaussian(), pc.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    amortised = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    images, prior = 2 * torch.randn(32, 2, dtype=D) @ torch.randn(2, 4, dtype=D), torch.zeros(32, 2, dtype=D)
    options = {"order": "simultaneous", "precision": 1.0, "step": 0.05}
    free_energy = pc.FreeEnergy(model, steps=8, **options)
    optimizer = torch.optim.Adam([*model.parameters(), *amortised.parameters()], 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        said("hybrid").hybrid(free_energy, amortised, prior, images).backward()
        optimizer.step()
    short = pc.FreeEnergy(model, steps=2, **options)
    proposed = short.infer(prior, images, start={"0": amortised(images)}).free_energy.mean()
    assert proposed < free_energy.infer(prior, images).free_energy.mean()
    assert proposed < 0.5 * short.infer(prior, images).free_energy.mean()


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


def test_bidirectional_pc_classifies_and_generates_digits():
    """One network: upwards it names most digits that it has not seen, downwards it draws each class's mean image."""
    torch.manual_seed(0)
    (x, y), test = digits()
    model = said("Bidirectional").Bidirectional(64, 32, 10)
    free_energy = pc.FreeEnergy(model, order="simultaneous", precision=1.0, steps=8, step=0.1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for batch in torch.arange(100 * 128).remainder(1500).split(128):
        values = F.one_hot(y[batch], 10).float()
        optimizer.zero_grad()
        free_energy((x[batch], values), values).backward()
        optimizer.step()
    classes = torch.eye(10)
    assert (model(test[0], torch.zeros(297, 10)).argmax(1) == test[1]).float().mean() > 0.7
    means = torch.stack([x[y == k].mean(0) for k in range(10)])
    drawn = model.generate(classes)
    assert torch.equal(torch.cdist(drawn, means).argmin(1), torch.arange(10))
    assert (drawn - means).square().mean() < 0.1 * means.var(0).mean()


# Temporal PC.


def test_temporal_pc_is_a_kalman_filter():
    """Every frame's settled state is the filter's estimate, with covariances that are no multiple of 1."""
    torch.manual_seed(0)
    transition, emission = nn.Linear(3, 3, bias=False).double(), nn.Linear(3, 2, bias=False).double()
    a, c = transition.weight.detach(), emission.weight.detach()
    roots = torch.randn(3, 3, dtype=D), torch.randn(2, 2, dtype=D)
    q, r = (0.3 * root @ root.T + torch.eye(len(root), dtype=D) for root in roots)
    ours, theirs, p = torch.zeros(1, 3, dtype=D), torch.zeros(3, dtype=D), torch.eye(3, dtype=D)
    for y in torch.randn(4, 2, dtype=D):
        predicted = a @ p @ a.T + q
        gain = predicted @ c.T @ torch.linalg.inv(c @ predicted @ c.T + r)
        theirs = a @ theirs + gain @ (y - c @ a @ theirs)
        p = predicted - gain @ c @ predicted
        ours = said("frame").frame(transition, emission, predicted, r, steps=150, step=0.5).infer(ours, y[None]).u["1"]
        assert_close([ours[0]], [theirs], 1e-9)


# Learnt precisions.


def test_an_output_learns_its_variance():
    """GaussianLogVar: mean and variance of the data are the maximum of the likelihood."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(1, 1, bias=False), nn.Linear(1, 4)).double()
    nn.init.zeros_(model[0].weight)  # so that the bias alone is fitted
    y = torch.tensor([2.0, -1.0], dtype=D) + torch.tensor([0.5, 3.0], dtype=D) * torch.randn(200, 2, dtype=D)
    free_energy = pc.FreeEnergy(model, pc.GaussianLogVar(), steps=1)
    x = torch.zeros(200, 1, dtype=D)
    mean, log_variance = model(x).chunk(2, -1)
    likelihood = torch.distributions.Normal(mean, (log_variance / 2).exp())
    truth = -likelihood.log_prob(y).sum(1).mean()
    assert_close(gradients(model, free_energy(x, y)), gradients(model, truth), 1e-12)
    with torch.no_grad():
        model[1].bias.copy_(torch.cat([y.mean(0), y.var(0, correction=0).log()]))
    assert gradients(model, free_energy(x, y))[2].abs().max() < 1e-12


def test_a_hidden_node_learns_its_variance_by_hand():
    """T steps of descent on (u - mu)^2 / 2 var + log var / 2 + |y - W u|^2 / 2, and its gradients there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), said("Spread").Spread(4), nn.Linear(4, 2)).double()
    x, y, s = torch.randn(5, 3, dtype=D), torch.randn(5, 2, dtype=D), model[1].log_variance
    with torch.no_grad():
        s.copy_(torch.randn(4))
    loss = pc.FreeEnergy(model, order="simultaneous", precision=1.0, steps=6, step=0.1)(x, y)

    def energy(u):
        own = (u - model[0](x)).square() * torch.exp(-s) / 2 + s / 2
        return own.sum() + (y - model[2](u)).square().sum() / 2

    u = model[0](x).detach()
    for _ in range(6):
        u = u.requires_grad_()
        u = u.detach() - 0.1 * torch.autograd.grad(energy(u), u)[0]
    truth = energy(u) / 5
    assert_close([loss.detach()], [truth.detach()], 1e-12)
    assert_close(gradients(model, loss), gradients(model, truth), 1e-12)


def test_a_hidden_variance_of_maximum_likelihood():
    """u ~ N(0, v), y ~ N(u, 1): learning at Langevin's samples finds v = E y^2 - 1, but for the size of their steps.

    A step of lr leaves a sample's mean y / r, and makes its variance 1 / r into 1 / (r - lr r^2 / 2), r = 1 + 1 / v.
    """
    torch.manual_seed(0)
    lr = 0.1
    model = nn.Sequential(said("Spread").Spread(1), nn.Linear(1, 1, bias=False)).double()
    nn.init.ones_(model[1].weight).requires_grad_(False)
    y = 3**0.5 * torch.randn(2000, 1, dtype=D)
    free_energy = pc.FreeEnergy(
        model, order="simultaneous", precision=1.0, steps=40, state_optimizer=lambda states: Langevin(states, lr)
    )
    optimizer = torch.optim.SGD(model[:1].parameters(), 1.0)
    learned = []
    for _ in range(40):
        optimizer.zero_grad()
        free_energy(torch.zeros_like(y), y).backward()
        optimizer.step()
        learned.append(model[0].log_variance.exp().item())
    square = y.square().mean().item()
    v = 1.0
    for _ in range(1000):
        r = 1 + 1 / v
        v = square / r**2 + 1 / (r - lr * r**2 / 2)
    assert abs(v - (square - 1)) < 0.3
    assert sum(learned[-15:]) / 15 == pytest.approx(v, rel=0.05)


# muPC.


def test_mupc_by_hand():
    """T steps of descent on the paper's energy, with its factors, and the weights' gradients there."""
    torch.manual_seed(0)
    width, depth = 5, 4
    model = said("mupc").mupc(3, width, 2, depth).double()
    x, y = torch.randn(4, 3, dtype=D), torch.randn(4, 2, dtype=D)
    weights = list(model.parameters())
    a, top = (width * depth) ** -0.5, 1 / width

    def predictions(states):
        first = x @ weights[0].T / 3**0.5
        return [first, *(z + a * z.relu() @ w.T for z, w in zip(states, weights[1:-1]))]

    def energy(states):
        terms = sum((z - mu).square().sum() for z, mu in zip(states, predictions(states)))
        return (terms + (y - top * states[-1].relu() @ weights[-1].T).square().sum()) / 2

    states = []
    for _ in range(depth - 1):
        states.append(predictions(states)[len(states)].detach())
    for _ in range(6):
        states = [z.requires_grad_() for z in states]
        states = [z.detach() - 0.1 * g for z, g in zip(states, torch.autograd.grad(energy(states), states))]
    loss = pc.FreeEnergy(model, order="simultaneous", precision=1.0, steps=6, step=0.1)(x, y)
    truth = energy(states) / 4
    assert_close([loss.detach()], [truth.detach()], 1e-12)
    assert_close(gradients(model, loss), gradients(model, truth), 1e-12)


def test_mupc_keeps_its_states_with_depth():
    """Root mean squares are of order 1 from 8 layers to 128. Without the depth in the factor they are not."""
    mupc, x = said("mupc").mupc, torch.randn(64, 16, dtype=D)

    def size(depth, forget=False):
        torch.manual_seed(0)
        model = mupc(16, 32, 2, depth).double()
        for block in model[2:-2]:
            block.linear.scale *= depth**0.5 if forget else 1
        with torch.no_grad():
            return model[:-2](x).square().mean().sqrt().item()

    assert all(0.5 < size(depth) < 3 for depth in (8, 32, 128))
    assert size(32, forget=True) > 30


@pytest.mark.parametrize("depth", [64, 128])
def test_mupc_trains_deep_networks(depth):
    torch.manual_seed(0)
    model = said("mupc").mupc(4, 16, 2, depth).double()
    x = torch.randn(16, 4, dtype=D)
    y = torch.tanh(x[:, :2] + x[:, 2:])
    free_energy = pc.FreeEnergy(model, precision=1.0, steps=3, step=0.1)
    optimizer = torch.optim.Adam(model.parameters(), 0.005)

    def loss():
        with torch.no_grad():
            return (model(x) - y).square().mean().item()

    before = loss()
    for _ in range(30):
        optimizer.zero_grad()
        free_energy(x, y).backward()
        optimizer.step()
    assert loss() < 0.5 * before


@pytest.mark.filterwarnings("ignore:the free energy is not finite")
def test_mupc_carries_a_learning_rate_over_width_and_depth():
    """SGD at a rate per unit of width: the best of three is the same one. Without the depth in the factor it is not."""
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tanh(x[:, :2] + x[:, 2:])

    def loss(width, depth, rate, forget=False):
        torch.manual_seed(0)
        model = said("mupc").mupc(4, width, 2, depth)
        for block in model[2:-2]:
            block.linear.scale *= depth**0.5 if forget else 1
        free_energy = pc.FreeEnergy(model, precision=1.0, step=0.1)
        optimizer = torch.optim.SGD(model.parameters(), rate * width)
        for _ in range(20):
            optimizer.zero_grad()
            free_energy(x, y).backward()
            optimizer.step()
        with torch.no_grad():
            return (model(x) - y).square().mean().nan_to_num(torch.inf).item()

    for width, depth in ((16, 4), (64, 4), (16, 32)):
        low, best, high = (loss(width, depth, rate) for rate in (0.1, 1.0, 10.0))
        assert best < min(0.25 * low, 0.5 * high, 0.1)
    assert loss(16, 4, 1.0, forget=True) < 0.1
    assert loss(16, 32, 1.0, forget=True) > 1
