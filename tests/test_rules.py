"""What goes beyond the defaults: rules as objects, other starts, output weights, masks, early stops, records, noise,
and learning by each node's own energy. In float64, against loops by hand and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_inference import ORDERS, Mixed, assert_close, chain_equilibrium, cosine, gradients
from torch import Tensor, nn

import pc_triton as pc
from pc_triton import orders

D = torch.float64


def chain():
    """A linear Gaussian chain with a batch of values."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(4, 5), pc.Linear(5, 3), nn.Linear(3, 2)).double()
    return model, torch.randn(3, 4, dtype=D), torch.randn(3, 2, dtype=D)


def deep(samples: int = 4):
    """A nonlinear network with a batch of labels."""
    torch.manual_seed(1)
    model = nn.Sequential(pc.Linear(4, 6), nn.Tanh(), pc.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(samples, 4, dtype=D), torch.randint(3, (samples,))


def choosing(samples: int = 3):
    """A network with a Categorical and a Bernoulli node, and labels."""
    torch.manual_seed(2)
    gate = pc.Linear(5, 5, node=pc.Bernoulli())
    model = nn.Sequential(pc.Linear(4, 5), gate, nn.Linear(5, 4), pc.Categorical(), nn.Linear(4, 3)).double()
    return model, torch.randn(samples, 4, dtype=D), torch.randint(3, (samples,))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# Rules as objects.


@pytest.mark.parametrize("order", [*ORDERS, "incremental"])
@pytest.mark.parametrize(
    ("short", "objects"),
    [
        ({}, {"precision": pc.Displacement(0.003)}),
        ({"displacement": 0.02}, {"precision": pc.Displacement(0.02)}),
        ({"precision": 2.0}, {"precision": pc.Fixed(2.0)}),
        ({"step": 0.1}, {"step": pc.Constant(0.1)}),
        ({"precision": 1.0, "steps": 6}, {"precision": 1.0, "steps": 6, "step": "guarded"}),
    ],
)
def test_numbers_are_short_for_objects(order, short, objects):
    """Identical F and gradients; an order given as itself, too."""
    model, x, y = deep()
    if objects.get("step") == "guarded":
        objects = objects | {"step": pc.Guarded(orders.ORDERS[order].step)}
    as_object = order if order == "incremental" else orders.ORDERS[order]
    one, other = pc.FreeEnergy(model, order=order, **short), pc.FreeEnergy(model, order=as_object, **objects)
    first, second = one.infer(x, y), other.infer(x, y)
    same(first.free_energy, second.free_energy)
    for a, b in zip(first.states.values(), second.states.values(), strict=True):
        same(a, b)
    if order == "incremental":
        losses = list(zip(one.incremental(x, y), other.incremental(x, y), strict=True))
        same(losses[1][0], losses[1][1])
    else:
        for a, b in zip(gradients(model, one(x, y)), gradients(model, other(x, y)), strict=True):
            same(a, b)


@pytest.mark.parametrize("order", ORDERS)
def test_a_precision_of_ones_own(order):
    """A function sees each node with what it needs; equal to a number where it returns that and counts no units."""
    model, x, y = chain()
    seen = []

    def by_place(node, squared, free_energy, nodes):
        seen.append((node.name, node.mu.shape, squared, free_energy, nodes))
        return torch.where(torch.arange(len(free_energy)) == 0, 0.5, 4.0)

    by_place.in_units = False
    settled = pc.FreeEnergy(model, order=order, precision=by_place, steps=300, step=0.3).infer(x, y)
    weights, biases = [m.weight for m in model], [m.bias for m in model]
    with torch.no_grad():
        for pi, rows in ((0.5, slice(0, 1)), (4.0, slice(1, 3))):
            truth, energy = chain_equilibrium(weights, biases, x[rows], y[rows], pi, False)
            assert_close([u[rows] for u in settled.states.values()], truth, 1e-9)
            assert_close([settled.free_energy[rows]], [energy], 1e-9)
    out = model(x)
    error = out - y
    free_energy = (error**2).sum(1) / 2
    first, second = [entry for entry in seen if entry[0] in ("0", "1")]
    assert (first[0], tuple(first[1]), first[4]) == ("0", (3, 5), 2)
    assert (second[0], tuple(second[1]), second[4]) == ("1", (3, 3), 2)
    assert_close([second[2], second[3]], [((error @ model[2].weight) ** 2).sum(1), free_energy], 1e-12)
    assert_close([first[2]], [((error @ model[2].weight @ model[1].weight) ** 2).sum(1)], 1e-12)


def test_a_precision_in_units_by_default():
    """Errors then count in the node's root mean square r: pi / r^2 stands in the equilibrium."""
    model, x, y = chain()
    settled = pc.FreeEnergy(
        model, precision=lambda node, squared, f, nodes: torch.full_like(f, 0.7), steps=300, step=0.3
    ).infer(x[:1], y[:1])
    (w0, b0), (w1, b1), (w2, b2) = [(m.weight.detach(), m.bias.detach()) for m in model]
    mu0 = x[:1] @ w0.T + b0
    mu1 = mu0 @ w1.T + b1
    rates = [0.7 / (mu**2).mean() for mu in (mu0, mu1)]
    u0 = mu0.clone().requires_grad_()
    u1 = mu1.clone().requires_grad_()

    def f(u0, u1):
        parts = rates[0] * (u0 - mu0) ** 2, rates[1] * (u1 - u0 @ w1.T - b1) ** 2, (y[:1] - u1 @ w2.T - b2) ** 2
        return sum(part.sum() for part in parts) / 2

    hessian = torch.autograd.functional.hessian(f, (u0, u1))
    matrix = torch.cat([torch.cat([h.reshape(a, -1) for h in row], 1) for a, row in zip((5, 3), hessian)])
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(f(u0, u1), (u0, u1))])
    truth = torch.cat([u0.flatten(), u1.flatten()]).detach() - torch.linalg.solve(matrix, slope)
    assert_close([torch.cat([u.flatten() for u in settled.states.values()])], [truth], 1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_a_precision_of_the_wrong_shape_is_refused(order):
    model, x, y = chain()
    with pytest.raises(ValueError, match=r"no tensor \(3,\)"):
        pc.FreeEnergy(model, order=order, precision=lambda *_: torch.tensor(1.0))(x, y)


class Decaying(pc.Constant):
    """A step that falls by a factor at each move, an argument of its own."""

    def __init__(self, step: float, factor: float) -> None:
        super().__init__(step)
        self.factor = factor

    def next(self, nodes, free_energy):
        keep, move = super().next(nodes, free_energy)
        self.step = self.step * self.factor
        return keep, move


@pytest.mark.parametrize("order", [*ORDERS, "incremental"])
def test_a_step_of_ones_own(order):
    """One hidden unit, by hand; each batch begins with the first step again."""
    pi, v, w, x, y, factor = 2.0, 0.8, -1.1, 1.5, -0.7, 0.5
    model = nn.Sequential(pc.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    nn.init.constant_(model[0].weight, v)
    nn.init.constant_(model[1].weight, w)
    u, step, energies = v * x, 0.25, []
    for _ in range(4):
        energies.append(pi / 2 * (u - v * x) ** 2 + (y - w * u) ** 2 / 2)
        u, step = u - step * ((u - v * x) - w * (y - w * u) / pi), step * factor
    energies.append(pi / 2 * (u - v * x) ** 2 + (y - w * u) ** 2 / 2)
    free_energy = pc.FreeEnergy(model, order=order, precision=pi, step=Decaying(0.25, factor), steps=4)
    data = torch.tensor([[x]], dtype=D), torch.tensor([[y]], dtype=D)
    for _ in range(2):
        if order != "incremental":
            settled = free_energy.infer(*data)
            assert settled.states["0"].item() == pytest.approx(u, rel=1e-12)
            assert settled.free_energy.item() == pytest.approx(energies[-1], rel=1e-12)
        else:
            seen = []
            for loss in free_energy.incremental(*data):
                loss.backward()
                seen.append(loss.item())
            assert seen == pytest.approx(energies[:-1], rel=1e-12)


@pytest.mark.parametrize("step", [0.0, -0.1, 1.5, True, math.nan])
@pytest.mark.parametrize("rule", [pc.Constant, pc.Guarded])
def test_steps_are_validated(rule, step):
    with pytest.raises(ValueError, match="between 0 and 1"):
        rule(step)


def test_a_step_shows_what_it_is():
    assert "step=Guarded(0.25)" in repr(pc.FreeEnergy(deep()[0], step=pc.Guarded(0.25)))


def twice(batch, rules, moves, start=None):
    """An order of one's own: twice the moves of the simultaneous one."""
    return orders.simultaneous(batch, rules, 2 * moves, start)


def test_an_order_of_ones_own():
    """A function settles states u from 0.2 on; `Order` says otherwise."""
    model, x, y = deep()
    ours = pc.FreeEnergy(model, order="simultaneous", steps=6, precision=2.0)
    for order in (twice, pc.Order(twice)):
        theirs = pc.FreeEnergy(model, order=order, steps=3, precision=2.0)
        same(ours.infer(x, y).free_energy, theirs.infer(x, y).free_energy)
        for a, b in zip(gradients(model, ours(x, y)), gradients(model, theirs(x, y)), strict=True):
            same(a, b)
    stepped = pc.FreeEnergy(model, order=pc.Order(twice, step=0.4), steps=3, precision=2.0)
    assert stepped.step == 0.4

    def fewer(batch, rules, moves, start=None):
        return orders.error(batch, rules, moves - 1, start)

    error, shorter = pc.FreeEnergy(model, steps=4), pc.FreeEnergy(model, order=pc.Order(fewer, "error", 0.25), steps=5)
    same(error(x, y), shorter(x, y))
    with pytest.raises(ValueError, match="choose one of"):
        pc.FreeEnergy(model, order="backwards")


def test_an_order_set_later_brings_its_defaults():
    """T and step are the order's until they are given; None gives them back."""
    model, x, y = deep()
    changed, made = pc.FreeEnergy(model), pc.FreeEnergy(model, order="sweep")
    assert (changed.steps, changed.step) == (2, 0.25)
    changed.order = "sweep"
    assert (changed.steps, changed.step) == (made.steps, made.step) == (3, 0.5)
    assert type(changed.rules.step) is type(made.rules.step)
    same(changed(x, y), made(x, y))
    changed.steps, changed.step = 5, 0.1
    same(changed(x, y), pc.FreeEnergy(model, order="sweep", steps=5, step=0.1)(x, y))
    changed.steps = changed.step = None
    same(changed(x, y), made(x, y))


# Starts.


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", [deep, choosing])
def test_more_steps_from_where_others_ended(order, make):
    """T more steps from the states of T steps are 2 T steps; a state of a Bernoulli or Categorical is its logits."""
    model, x, y = make()
    options = {"order": order, "precision": 2.0, "step": 0.2}
    half = pc.FreeEnergy(model, steps=5, **options).infer(x, y)
    whole = pc.FreeEnergy(model, steps=10, **options).infer(x, y)
    to_state = {"1": torch.logit, "3": torch.log} if make is choosing else {}
    states = {name: to_state.get(name, lambda u: u)(u) for name, u in half.states.items()}
    free_energy = pc.FreeEnergy(model, steps=5, **options)
    more = free_energy.infer(x, y, start=states)
    assert_close(more.states.values(), whole.states.values(), 1e-12)
    assert_close([more.free_energy], [whole.free_energy], 1e-12)
    assert_close(free_energy.infer(x, y, start=half.u).u.values(), whole.u.values(), 1e-12)
    one_less = pc.FreeEnergy(model, steps=9 if order != "error" else 10, **options)
    one = pc.FreeEnergy(model, steps=4 if order != "error" else 5, **options)
    learned = gradients(model, one_less(x, y)), gradients(model, one(x, y, start=lambda predictions: states))
    if order == "error":  # learns after 9 moves and after 5 + 4
        assert_close(learned[1], learned[0], 1e-11)
    else:
        assert_close(learned[1], learned[0], 1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_more_steps_of_masked_attention(order):
    """Hidden keys have logits of -inf, and no state."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(4, 8), pc.Attention(8, 2, causal=True), nn.Linear(8, 3)).double()
    x, y = torch.randn(2, 5, 4, dtype=torch.float64), torch.randint(3, (2, 5))
    options = {"order": order, "precision": 2.0, "step": 0.2}
    half, whole = (pc.FreeEnergy(model, steps=steps, **options).infer(x, y) for steps in (3, 6))
    more = pc.FreeEnergy(model, steps=3, **options).infer(x, y, start=half.u)
    assert_close(more.states.values(), whole.states.values(), 1e-12)
    assert_close([more.free_energy], [whole.free_energy], 1e-12)


def test_incremental_from_where_inference_ended():
    model, x, y = deep()
    options = {"precision": 2.0, "step": 0.2}
    half = pc.FreeEnergy(model, steps=5, order="simultaneous", **options).infer(x, y)
    whole = list(pc.FreeEnergy(model, steps=1, order="incremental", **options).incremental(x, y, start=half.states))
    assert_close([whole[0].detach()], [half.free_energy.mean()], 1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_a_start_for_some_nodes_is_where_the_forward_pass_goes_on_from(order):
    """The node that is named starts at u, the one above it at the prediction that follows from that."""
    model, x, y = deep()
    u = torch.randn(4, 6, dtype=D)
    (look, *_) = pc.FreeEnergy(model, order=order, precision=2.0, steps=1).record(x, y, start={"0": u})
    mu = model[0](x)
    above = model[2](u.tanh())
    error = F.cross_entropy(model[4](above.tanh()), y, reduction="none")
    assert_close([look["0"].energy], [((u - mu) ** 2).sum(1)], 1e-12)
    assert look["2"].energy.abs().max() < 1e-20
    stopped = pc.FreeEnergy(model, order=order, precision=2.0, steps=4, stop=lambda energies: True)
    settled = stopped.infer(x, y, start=lambda predictions: {"0": u + 0 * predictions["0"]})
    assert_close([settled.states["0"], settled.states["2"]], [u, above], 1e-12)
    assert_close([settled.free_energy], [((u - mu) ** 2).sum(1) + error], 1e-12)
    assert_close([stopped(x, y, start={"0": u}).detach()], [settled.free_energy.mean()], 1e-12)


def test_one_error_step_learns_where_it_starts():
    """T = 1 moves nothing: F and its gradient are those of the states given, with e held."""
    model, x, y = deep()
    u = torch.randn(4, 6, dtype=D)
    loss = pc.FreeEnergy(model, steps=1, precision=2.0)(x, y, start={"0": u})
    mu = model[0](x)
    e = (u - mu).detach()
    truth = (e**2).sum(1).mean() + F.cross_entropy(model[4](model[2]((mu + e).tanh()).tanh()), y)
    assert_close([loss.detach()], [truth.detach()], 1e-12)
    assert_close(gradients(model, loss), gradients(model, truth), 1e-12)


@pytest.mark.parametrize("order", [*ORDERS, "incremental"])
@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"3": torch.zeros(4, 6)}, "no free node '3'.*0, 2"),
        ({"0": torch.zeros(4, 5)}, r"state of '0' is \(4, 5\).*\(4, 6\)"),
        ({"0": 1.0}, r"state of '0' is float.*\(4, 6\)"),
        ({"0": torch.full((4, 6), math.nan)}, "NaN"),
        (lambda predictions: {"x": predictions["0"]}, "no free node 'x'"),
    ],
)
def test_a_wrong_start_is_refused(order, start, words):
    model, x, y = deep()
    free_energy = pc.FreeEnergy(model, order=order)
    with pytest.raises(ValueError, match=words):
        list(free_energy.incremental(x, y, start=start)) if order == "incremental" else free_energy(x, y, start=start)
    with pytest.raises(ValueError, match=words):
        free_energy.infer(x, y, start=start)


def test_a_start_in_a_compiled_model():
    model, x, y = deep()
    u, options = torch.randn(4, 6, dtype=D), {"precision": 2.0, "steps": 4, "step": 0.2}
    eager = pc.FreeEnergy(model, **options)(x, y, start={"0": u})
    compiled = pc.FreeEnergy(torch.compile(model, backend="eager"), **options)(x, y, start={"0": u})
    assert_close([compiled.detach()], [eager.detach()], 1e-12)
    assert_close(gradients(model, compiled), gradients(model, eager), 1e-12)


# The output's weight.


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weight", [0.3, 2.5, -0.2])
def test_output_weight(order, weight):
    """w / 2 |y - o|^2: the equilibrium of precisions pi / w, with w times its energy; for w < 0, too, if any."""
    model, x, y = chain()
    pi = 4.0
    with torch.no_grad():
        truth, energy = chain_equilibrium([m.weight for m in model], [m.bias for m in model], x, y, pi / weight, False)
    free_energy = pc.FreeEnergy(model, order=order, precision=pi, steps=400, step=0.3, output_weight=weight)
    settled = free_energy.infer(x, y)
    assert_close(settled.states.values(), truth, 1e-9)
    assert_close([settled.free_energy], [weight * energy], 1e-9)
    assert_close([free_energy(x, y).detach()], [weight * energy.mean()], 1e-9)
    u0, u1 = truth
    own = (pi / 2 * ((u0 - model[0](x)) ** 2 + 0).sum() + pi / 2 * ((u1 - model[1](u0)) ** 2).sum()) / 3
    own = own + weight / 2 * ((y - model[2](u1)) ** 2).sum() / 3
    assert_close(gradients(model, free_energy(x, y)), gradients(model, own), 1e-8)


@pytest.mark.parametrize("weight", [0.5, -0.5])
@pytest.mark.parametrize("head", [nn.Linear, pc.Head])
def test_output_weight_of_labels(weight, head):
    """T = 1 is backpropagation of w times the cross-entropy, through a `Head` too."""
    model, x, y = deep()
    model[4] = head(5, 3).double()
    loss = pc.FreeEnergy(model, steps=1, output_weight=weight)(x, y)
    truth = weight * F.cross_entropy(nn.Linear.forward(model[4], model[:4](x)), y)
    assert_close([loss.detach()], [truth.detach()], 1e-12)
    assert_close(gradients(model, loss), gradients(model, truth), 1e-12)


def test_nudging_both_ways_is_backpropagation():
    """(F(+b) - F(-b)) / 2 b of centred equilibrium propagation, at small b, has backpropagation's gradient."""
    model, x, y = deep()
    beta, options = 1e-3, {"precision": 1.0, "steps": 60, "order": "simultaneous", "step": 0.3}
    up, down = (gradients(model, pc.FreeEnergy(model, output_weight=b, **options)(x, y)) for b in (beta, -beta))
    estimate = [(a - b) / (2 * beta) for a, b in zip(up, down)]
    assert_close(estimate, gradients(model, F.cross_entropy(model(x), y)), 1e-4)


@pytest.mark.parametrize("weight", [math.nan, math.inf, True, "1"])
def test_output_weight_is_a_number(weight):
    with pytest.raises(ValueError, match="give a finite number"):
        pc.FreeEnergy(deep()[0], output_weight=weight)


# Masks.


@pytest.mark.parametrize("order", ORDERS)
def test_an_output_clamped_in_part(order):
    """A column of y that nothing clamps is as good as a network without it; NaN there is not read."""
    model, x, y = chain()
    mask = torch.tensor([True, False]).expand(3, 2)
    smaller = nn.Sequential(*model[:2], nn.Linear(3, 1).double())
    smaller[2].load_state_dict({"weight": model[2].weight[:1], "bias": model[2].bias[:1]})
    options = {"order": order, "precision": 2.0, "steps": 30, "step": 0.3}
    truth = pc.FreeEnergy(smaller, **options)
    hidden = torch.where(mask, y, math.nan)
    ours = pc.FreeEnergy(model, **options)
    a, b = ours.infer(x, hidden, mask=mask), truth.infer(x, y[:, :1])
    assert_close(a.states.values(), b.states.values(), 1e-12)
    assert_close([a.free_energy], [b.free_energy], 1e-12)
    expected = gradients(smaller, truth(x, y[:, :1]))
    learned = gradients(model, ours(x, hidden, mask=mask))
    assert_close(learned[:4], expected[:4], 1e-12)
    assert_close([learned[4][:1], learned[5][:1]], expected[4:], 1e-12)
    assert not learned[4][1].any()
    assert not learned[5][1].any()


@pytest.mark.parametrize("head", [nn.Linear, pc.Head])
def test_masked_labels_are_ignored_labels(head):
    """In F, its gradients and the number of items; a label there may be out of range."""
    model, x, y = deep(6)
    model[4] = head(5, 3).double()
    mask = torch.tensor([True, False, True, True, False, True])
    wrong, ignored = torch.where(mask, y, 99), torch.where(mask, y, -100)
    for order in ORDERS:
        free_energy = pc.FreeEnergy(model, order=order, steps=4)
        masked, plain = free_energy(x, wrong, mask=mask), free_energy(x, ignored)
        same(masked, plain)
        for a, b in zip(gradients(model, masked), gradients(model, plain), strict=True):
            same(a, b)
    incremental = pc.FreeEnergy(model, order="incremental")
    for a, b in zip(incremental.incremental(x, wrong, mask=mask), incremental.incremental(x, ignored), strict=True):
        same(a, b)
        (a + b).backward()


class Positive(pc.Distribution):
    """Log-normal: no value of it is 0."""

    def energy(self, u, mu):
        return (u.log() - mu) ** 2 / 2

    def check_values(self, target, classes):
        if (target <= 0).any():
            raise ValueError("not positive")


def _bernoulli(y, mu):
    return F.binary_cross_entropy_with_logits(mu, y, reduction="none")


def _laplace(y, mu):
    return (y - mu).abs() + (-(y - mu).abs()).exp() - 1


def _logvar(y, mu):
    m, s = mu.chunk(2, -1)
    return 0.5 * (s + (y - m) ** 2 / s.exp())


def _probabilities(y, mu):
    return torch.xlogy(y, y) - y * mu.log_softmax(-1)


@pytest.mark.parametrize(
    ("family", "columns", "energy", "values"),
    [
        (pc.Gaussian(0.1), 4, lambda y, mu: (y - mu) ** 2 / 0.2, lambda: torch.randn(3, 4, dtype=D)),
        (pc.Bernoulli(), 4, _bernoulli, lambda: torch.rand(3, 4, dtype=D)),
        (pc.GaussianLogVar(), 8, _logvar, lambda: torch.randn(3, 4, dtype=D)),
        (pc.Categorical(), 4, _probabilities, lambda: torch.rand(3, 4, dtype=D).softmax(-1)),
        (pc.Laplace(), 4, _laplace, lambda: torch.randn(3, 4, dtype=D)),
        (Positive(), 4, lambda y, mu: (y.log() - mu) ** 2 / 2, lambda: torch.rand(3, 4, dtype=D) + 0.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_output_family_takes_a_mask(family, columns, energy, values):
    """T = 1 is backpropagation of the energies that the mask leaves."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(4, 6), nn.Tanh(), nn.Linear(6, columns)).double()
    x, y = torch.randn(3, 4, dtype=D), values()
    mask = torch.rand(3, 4) < 0.5
    truth = energy(y, model(x))[mask].sum() / 3
    loss = pc.FreeEnergy(model, family, steps=1)(x, torch.where(mask, y, math.nan), mask=mask)
    assert_close([loss.detach()], [truth.detach()], 1e-12)
    assert_close(gradients(model, loss), gradients(model, truth), 1e-12)
    none = pc.FreeEnergy(model, pc.Gaussian(), steps=3)(x, y[:, :1].expand(3, columns), mask=mask.new_zeros(3, columns))
    assert none.item() == 0


class Old(pc.Distribution):
    """A family of before there were masks."""

    def energy(self, u, mu):
        return (u - mu) ** 2 / 2

    def clamped(self, mu, target):
        return 3 * self.energy(target, mu).flatten(1).sum(1)


def test_a_family_that_knows_no_mask():
    model, x, y = chain()
    truth = 3 * ((model(x) - y) ** 2).sum(1).mean() / 2
    assert_close([pc.FreeEnergy(model, Old(), steps=1)(x, y).detach()], [truth.detach()], 1e-12)
    with pytest.raises(TypeError, match="takes no mask"):
        pc.FreeEnergy(model, Old())(x, y, mask=torch.ones(3, 2, dtype=torch.bool))


@pytest.mark.parametrize("mask", [torch.ones(3, 2), torch.ones(3) > 0, torch.ones(2, 3) > 0])
def test_a_wrong_mask_is_refused(mask):
    model, x, y = chain()
    with pytest.raises(ValueError, match=r"give a bool tensor \(3, 2\)"):
        pc.FreeEnergy(model)(x, y, mask=mask)


@pytest.mark.parametrize("order", ORDERS)
def test_an_input_clamped_in_part(order):
    """Its free units settle at the equilibrium given the others, here by Newton's method."""
    model, x, y = chain()
    clamped, pi = torch.tensor([[True, False, True, False]]).expand(3, 4), 2.0
    free_energy = pc.FreeEnergy(model, order=order, precision=pi, steps=400, step=0.3)
    settled = free_energy.infer(x, y, clamp_input=clamped)
    same(settled.input[clamped], x[clamped])
    parts = [settled.input, *list(settled.states.values())[1:]]
    leaves = [part.detach().requires_grad_() for part in parts]
    v, u0, u1 = leaves
    terms = (v - x) ** 2, (u0 - model[0](v)) ** 2, (u1 - model[1](u0)) ** 2
    f = pi / 2 * sum(term.sum(1) for term in terms) + ((y - model[2](u1)) ** 2).sum(1) / 2
    assert_close([settled.free_energy], [f.detach()], 1e-12)
    for grad, where in zip(torch.autograd.grad(f.sum(), leaves), (~clamped, ..., ...)):
        assert grad[where].abs().max() < 1e-10
    assert (settled.input - x)[~clamped].abs().min() > 1e-3
    everything = free_energy.infer(x, y, clamp_input=torch.ones_like(clamped))
    assert_close([everything.free_energy], [free_energy.infer(x, y).free_energy], 1e-12)
    nothing = free_energy.infer(x, y, clamp_input=torch.zeros_like(clamped))
    assert_close([nothing.input], [free_energy.infer(x, y, clamp_input=False).input], 1e-12)
    (first, *_, last) = free_energy.record(x, y, clamp_input=clamped)
    assert_close([last["input"].energy], [pi / 2 * terms[0].detach().sum(1)], 1e-9)
    assert first["input"].energy.max() < 1e-20
    started = free_energy.infer(x, y, clamp_input=clamped, start={"input": x + 1})
    assert_close(started.states.values(), settled.states.values(), 1e-9)


def test_a_wrong_mask_of_the_input_is_refused():
    model, x, y = chain()
    with pytest.raises(ValueError, match="True where x is clamped"):
        pc.FreeEnergy(model).infer(x, y, clamp_input=torch.ones(3, dtype=torch.bool))


# Stops.


@pytest.mark.parametrize("order", [*ORDERS, "incremental"])
@pytest.mark.parametrize("precision", ["auto", 1.0])
@pytest.mark.parametrize("optimizer", [False, True])
def test_a_stop_sees_every_free_energy_and_ends_there(order, precision, optimizer):
    """F at the start and after each move, as `infer` at fewer steps has it; the loss is that of the states reached."""
    if optimizer and order in ("sweep", "incremental"):
        return
    model, x, y = deep()
    step = {"state_optimizer": lambda s: torch.optim.SGD(s, lr=0.2)} if optimizer else {"step": 0.2}
    options = {"order": order, "precision": precision, **step}
    at_prediction = F.cross_entropy(model(x), y, reduction="none").detach()
    after = [at_prediction] + [pc.FreeEnergy(model, steps=t, **options).infer(x, y).free_energy for t in (1, 2, 3)]
    seen = []

    def three(energies):
        seen.append(list(energies))
        return len(energies) == 4

    stopped = pc.FreeEnergy(model, steps=9, stop=three, **options)
    settled = stopped.infer(x, y)
    assert len(seen[-1]) == 4
    assert_close(seen[-1], after, 1e-9)
    assert [len(energies) for energies in seen] == list(range(2 if order == "error" and not optimizer else 1, 5))
    assert_close([settled.free_energy], [after[3]], 1e-9)
    assert len(stopped.record(x, y)) == 4
    same(seen[-1][-1], seen[2 if order == "error" and not optimizer else 3][-1])
    if order == "incremental":
        losses = []
        for loss in stopped.incremental(x, y):
            loss.backward()
            losses.append(loss.detach())
        assert_close(losses, [energy.mean() for energy in after], 1e-9)
    else:
        loss = stopped(x, y)
        assert_close([loss.detach()], [after[3].mean()], 1e-9)
        whole = pc.FreeEnergy(model, steps=4 if order == "error" else 3, **options)
        assert_close(gradients(model, loss), gradients(model, whole(x, y)), 1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_a_tolerance(order):
    """It stops at the first move that changes no sample's F by more than that, and not before."""
    model, x, y = deep()
    options = {"order": order, "precision": 1.0, "step": 0.2, "steps": 200}
    counted = pc.FreeEnergy(model, stop=(rule := Counting(1e-6)), **options)
    settled = counted.infer(x, y)
    energies = torch.stack(rule.seen)
    change = energies.diff(dim=0).abs() / energies[1:].abs()
    assert 10 < len(energies) < 150
    assert (change[-1] <= 1e-6).all()
    assert (change[:-1] > 1e-6).any(1).all()
    assert_close([settled.free_energy], [energies[-1]], 1e-12)
    same(settled.free_energy, pc.FreeEnergy(model, stop=1e-6, **options).infer(x, y).free_energy)


class Counting(pc.Tolerance):
    """A tolerance that keeps what it saw."""

    def __call__(self, energies):
        object.__setattr__(self, "seen", list(energies))
        return super().__call__(energies)


def test_a_move_that_raises_f_does_not_stop():
    rule = pc.Tolerance(0.01)
    assert not rule([torch.tensor([1.0])])
    assert not rule([torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])])
    assert not rule([torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])])
    assert rule([torch.tensor([9.0, 9.0]), torch.tensor([1.0, -2.0]), torch.tensor([0.995, -2.01])])


@pytest.mark.parametrize("stop", [-0.1, 1.0, "soon", True])
def test_a_wrong_stop_is_refused(stop):
    with pytest.raises(ValueError, match="a fraction of the free energy"):
        pc.FreeEnergy(deep()[0], stop=stop)


def test_compile_takes_no_stop():
    with pytest.raises(ValueError, match="stop=None"):
        pc.FreeEnergy(deep()[0], stop=0.1).compile()


# Records.


@pytest.mark.parametrize("order", [*ORDERS, "incremental"])
@pytest.mark.parametrize("options", [{}, {"precision": 2.0, "step": 0.2}], ids=["default", "fixed"])
@pytest.mark.parametrize("make", [deep, choosing])
def test_a_record_is_of_the_inference_that_it_watches(order, options, make):
    """T + 1 entries; entry t is that of a run of t steps, by an independent computation of every node's energy."""
    model, x, y = make()
    free_energy = pc.FreeEnergy(model, order=order, steps=5, **options)
    before = free_energy.infer(x, y).free_energy
    steps = free_energy.record(x, y)
    same(free_energy.infer(x, y).free_energy, before)
    names = ["0", "1", "3"] if make is choosing else ["0", "2"]
    assert [list(step) for step in steps] == [names] * 6
    assert all(node.energy.shape == node.residual.shape == (len(x),) for step in steps for node in step.values())
    assert max(node.energy.abs().max() for node in steps[0].values()) < 1e-12
    assert all(node.energy.max() > 0 for node in steps[-1].values())
    if options:
        for t in (1, 3, 5):
            batch, settled = settle(model, x, y, order, t, options)
            probed = batch.named_nodes()
            output = F.cross_entropy(settled.output, y, reduction="none")
            total = sum(steps[t][name].energy for name in names)
            assert_close([total + output], [settled.free_energy], 1e-12)
            for name in names:
                assert_close([steps[t][name].energy], [probed[name].energy], 1e-12)
                assert_close([steps[t][name].residual], [probed[name].residual], 1e-12)


def settle(model, x, y, order, steps, options):
    """A batch after so many moves, probed; and what `infer` has there."""
    free_energy = pc.FreeEnergy(model, order=order, steps=steps, **options)
    batch = free_energy.batch(x, y, shows=True)
    free_energy.settle(batch, steps)
    batch.probe()
    return batch, free_energy.infer(x, y)


def test_a_residual_by_hand():
    """|u - mu + J'g / pi| of Gaussian nodes, g the gradient of what lies above."""
    model, x, y = deep()
    pi, steps = 2.0, 4
    options = {"order": "simultaneous", "precision": pi, "step": 0.2}
    record = pc.FreeEnergy(model, steps=steps, **options).record(x, y)
    settled = pc.FreeEnergy(model, steps=steps, **options).infer(x, y)
    u0, u1 = (u.detach().requires_grad_() for u in settled.states.values())
    above = F.cross_entropy(model[4](u1.tanh()), y, reduction="none")
    e0, e1 = pi / 2 * ((u0 - model[0](x)) ** 2).sum(1), pi / 2 * ((u1 - model[2](u0.tanh())) ** 2).sum(1)
    grads = torch.autograd.grad((above + e0 + e1).sum(), [u0, u1])
    assert_close([record[-1]["0"].energy, record[-1]["2"].energy], [e0.detach(), e1.detach()], 1e-12)
    residuals = [(g / pi).norm(dim=1) for g in grads]
    assert_close([record[-1]["0"].residual, record[-1]["2"].residual], residuals, 1e-12)


@pytest.mark.parametrize("order", ["error", "simultaneous"])
def test_a_record_leaves_random_numbers_as_they_were(order):
    """With noise in the model and in the optimiser, watched and unwatched inference end at the same states."""
    model, x, y = deep()
    model[1] = nn.Dropout(0.4)
    options = {"order": order, "precision": 1.0, "steps": 4, "state_optimizer": lambda s: Langevin(s, 0.05)}
    free_energy = pc.FreeEnergy(model, **options)
    torch.manual_seed(3)
    settled = free_energy.infer(x, y)
    after = torch.rand(1)
    torch.manual_seed(3)
    record = free_energy.record(x, y)
    same(after, torch.rand(1))
    output = F.cross_entropy(settled.output, y, reduction="none")
    assert_close([record[-1]["0"].energy + record[-1]["2"].energy + output], [settled.free_energy], 1e-12)


# Noise.


@pytest.mark.parametrize("order", ["error", "simultaneous"])
@pytest.mark.parametrize("draws", ["start", "step", "precision", "order", "stop"])
def test_rules_that_draw_get_new_numbers(draws, order):
    """The passes go back to the batch's numbers, for dropout; what is drawn between them must not come again."""
    drawn = []

    def draw():
        drawn.append(float(torch.rand(())))

    class Step(pc.Constant):
        def next(self, nodes, free_energy):
            draw()
            return super().next(nodes, free_energy)

    def settle(batch, rules, moves, start=None):
        draw()
        return orders.simultaneous(batch, rules, moves, start)

    rules = {
        "start": {},
        "step": {"step": Step(0.1)},
        "precision": {"precision": lambda node, squared, free_energy, nodes: (draw(), torch.ones_like(free_energy))[1]},
        "order": {"order": settle},
        "stop": {"stop": lambda energies: draw() is not None},
    }[draws]
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))  # draws nothing itself
    free_energy = pc.FreeEnergy(model, steps=3, **{"order": order, **rules})
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    for _ in range(2):
        free_energy(x, y, start=(lambda predictions: (draw(), predictions)[1]) if draws == "start" else None)
    draw()
    assert len(drawn) >= 3
    assert len(set(drawn)) == len(drawn)


class Langevin(torch.optim.Optimizer):
    """u <- u - lr grad + sqrt(2 lr) xi, xi standard normal of torch's own generator: samples exp(-F) at precision 1."""

    def __init__(self, states, lr):
        super().__init__(states, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for u in group["params"]:
                u -= group["lr"] * u.grad - math.sqrt(2 * group["lr"]) * torch.randn_like(u)


@pytest.mark.parametrize("order", ["error", "simultaneous"])
def test_langevin_samples_the_posterior(order):
    """u ~ N(v, 1), y ~ N(w u, 1): mean (v + w y) / (1 + w^2), variance 1 / (1 + w^2) / (1 - lr (1 + w^2) / 2)."""
    v, w, y, lr, samples = 0.5, 1.5, 2.0, 0.05, 20000
    model = nn.Sequential(pc.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    nn.init.constant_(model[0].weight, v)
    nn.init.constant_(model[1].weight, w)
    free_energy = pc.FreeEnergy(
        model, order=order, precision=1.0, steps=60, state_optimizer=lambda states: Langevin(states, lr)
    )
    torch.manual_seed(0)
    u = free_energy.infer(torch.ones(samples, 1, dtype=D), torch.full((samples, 1), y, dtype=D)).states["0"]
    rate = 1 + w**2
    mean, variance = (v + w * y) / rate, 1 / rate / (1 - lr * rate / 2)
    assert abs(u.mean().item() - mean) < 5 * math.sqrt(variance / samples)
    assert abs(u.var().item() / variance - 1) < 5 * math.sqrt(2 / samples)


@pytest.mark.parametrize("order", ["error", "simultaneous"])
def test_noise_is_new_at_every_step_and_batch_and_dropout_the_same(order):
    """The model's random numbers are those of the first pass in every pass of a batch, and new in the next batch."""
    noise, masks = [], []

    class Noisy(Langevin):
        def step(self):
            noise.append(torch.randn(2, dtype=D))

    class Drop(nn.Module):
        def forward(self, x):
            masks.append(torch.rand(2, dtype=D))
            return x

    model, x, y = deep()
    model[1] = Drop()
    free_energy = pc.FreeEnergy(model, order=order, steps=4, precision=1.0, state_optimizer=lambda s: Noisy(s, 0.1))
    free_energy(x, y)
    moves, passes = len(noise), len(masks)
    free_energy(x, y)
    assert len(torch.stack(noise).unique(dim=0)) == len(noise) == 2 * moves
    assert len(torch.stack(masks[:passes]).unique(dim=0)) == 1
    assert len(torch.stack(masks).unique(dim=0)) == 2
    assert len(torch.cat([torch.stack(noise), torch.stack(masks)]).unique(dim=0)) == 2 * moves + 2


# Learning by each node's own energy.


def own_gradients(model, x, y, states, pi):
    """By hand: the gradient of each node's energy in its own weights, every state held. pi: of each node ``[S]``."""
    u0, u1 = (u.detach() for u in states)
    parts = (
        (pi[0] / 2 * ((u0 - model[0](x)) ** 2).sum(1)).sum(),
        (pi[1] / 2 * ((u1 - model[2](u0.tanh())) ** 2).sum(1)).sum(),
        F.cross_entropy(model[4](u1.tanh()), y, reduction="sum"),
    )
    pairs = zip(parts, (model[0], model[2], model[4]), strict=True)
    return [g / len(x) for part, layer in pairs for g in torch.autograd.grad(part, list(layer.parameters()))]


@pytest.mark.parametrize("order", ORDERS)
def test_local_learning_by_hand(order):
    """With local=True in every order; a state order learns so anyhow, an unsettled error order does not."""
    model, x, y = deep()
    options = {"order": order, "precision": 2.0, "step": 0.2}
    moves = 3
    states = pc.FreeEnergy(model, steps=moves, **options).infer(x, y).states.values()
    truth = own_gradients(model, x, y, states, (2.0, 2.0))
    steps = moves + 1 if order == "error" else moves
    free_energy = pc.FreeEnergy(model, steps=steps, local=True, **options)
    total = pc.FreeEnergy(model, steps=steps, **options)
    loss = free_energy(x, y)
    assert_close([loss.detach()], [total(x, y).detach()], 1e-12)
    assert_close(gradients(model, loss), truth, 1e-12)
    learned = gradients(model, total(x, y))
    ratio = math.sqrt(sum(g.square().sum() for g in learned) / sum(g.square().sum() for g in truth))
    assert total.report(x, y).total_to_local == pytest.approx(ratio, rel=1e-9)
    assert free_energy.report(x, y).total_to_local == pytest.approx(1, rel=1e-12)
    if order == "error":
        assert ratio > 1.15
        assert cosine(learned[:2], truth[:2]) < 0.99999
    else:
        assert ratio == pytest.approx(1, rel=1e-12)


def test_total_and_local_agree_where_settled():
    model, x, y = deep()
    options = {"precision": 2.0, "steps": 100}
    total, local = (gradients(model, pc.FreeEnergy(model, local=flag, **options)(x, y)) for flag in (False, True))
    assert_close(total, local, 1e-6)
    assert pc.FreeEnergy(model).report(x, y).total_to_local == pytest.approx(1, abs=0.01)


def test_local_at_the_prediction_leaves_hidden_weights_alone():
    """T = 1: no node but the output has an energy of its own."""
    model, x, y = deep()
    learned = gradients(model, pc.FreeEnergy(model, steps=1, local=True)(x, y))
    expected = gradients(model, F.cross_entropy(model(x), y))
    assert not any(g.any() for g in learned[:4])
    assert_close(learned[4:], expected[4:], 1e-12)


def test_local_learning_of_every_family():
    """Attention, Bernoulli and Categorical nodes: in error order what a state order learns at the same equilibrium."""
    torch.manual_seed(0)
    model = Mixed().double()
    x, y = torch.randn(3, 4, 5, dtype=D), torch.randint(3, (3, 4))
    truth = gradients(model, pc.FreeEnergy(model, precision=3.0, order="simultaneous", steps=50, step=0.4)(x, y))
    local = gradients(model, pc.FreeEnergy(model, precision=3.0, steps=30, step=0.4, local=True)(x, y))
    assert_close(local, truth, 1e-3)


def test_local_learning_through_a_head():
    model, x, y = deep()
    options = {"precision": 2.0, "steps": 4, "step": 0.2, "local": True}
    plain = gradients(model, pc.FreeEnergy(model, **options)(x, y))
    head = nn.Sequential(*model[:4], pc.Head(5, 3).double())
    head[4].load_state_dict(model[4].state_dict())
    assert_close(gradients(head, pc.FreeEnergy(head, **options)(x, y)), plain, 1e-12)


def test_local_learning_of_a_compiled_model():
    model, x, y = deep()
    options = {"precision": 2.0, "steps": 4, "step": 0.2, "local": True}
    eager = gradients(model, pc.FreeEnergy(model, **options)(x, y))
    compiled = gradients(model, pc.FreeEnergy(torch.compile(model, backend="eager"), **options)(x, y))
    assert_close(compiled, eager, 1e-12)


# float64.


@pytest.mark.parametrize("order", [*ORDERS, "incremental"])
@pytest.mark.parametrize("precision", ["auto", 3.0])
@pytest.mark.parametrize("step", [None, 0.3])
def test_float64_is_float64_throughout(order, precision, step):
    """F, states and gradients do not know torch's default dtype; no float32 number comes into them."""
    model, x, y = choosing()
    results = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            free_energy = pc.FreeEnergy(model, order=order, precision=precision, step=step, steps=5)
            settled = free_energy.infer(x, y)
            losses = list(free_energy.incremental(x, y)) if order == "incremental" else [free_energy(x, y)]
            grads = gradients(model, losses[0])
            results.append([settled.free_energy, *settled.states.values(), losses[0].detach(), *grads])
        finally:
            torch.set_default_dtype(torch.float32)
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == D
        same(a, b)


@pytest.mark.parametrize(
    ("output", "y"),
    [
        (None, torch.full((4, 3), torch.inf)),
        (None, torch.full((4,), 99)),
        (pc.Bernoulli(), torch.full((4, 3), 7.0)),
        (pc.Bernoulli(), torch.full((4, 3), torch.nan)),
    ],
    ids=["infinite", "no class", "no probability", "nan"],
)
def test_a_mask_that_clamps_nothing_reads_nothing(output, y):
    """The output's energy is 0, whatever y holds."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    loss = pc.FreeEnergy(model, output)(torch.randn(4, 5), y, mask=torch.zeros(y.shape, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("order", ["error", "sweep", "simultaneous"])
def test_a_fixed_precision_of_ones_own(order):
    """A subclass is asked in every order: here it gives what another number would."""

    class Doubled(pc.Fixed):
        def __call__(self, node, squared, free_energy, nodes):
            return 2 * super().__call__(node, squared, free_energy, nodes)

    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    found, wanted = (
        pc.FreeEnergy(model, order=order, precision=precision, step=0.125).infer(x, y)
        for precision in (Doubled(1.0), pc.Fixed(2.0))
    )
    torch.testing.assert_close(found.free_energy, wanted.free_energy, rtol=1e-12, atol=0)


# Rules that are set later, and arguments that are none.


def test_float32_states_may_be_set_later():
    model, x, y = deep()
    free_energy = pc.FreeEnergy(model, steps=3)
    free_energy.state_dtype = torch.float32
    assert free_energy(x, y) == pc.FreeEnergy(model, steps=3)(x, y)


@pytest.mark.parametrize("clamp", [None, 1, [True], torch.tensor(True), torch.ones(4, 4)])
def test_what_is_no_clamp_is_refused(clamp):
    """Nothing but False frees the whole input."""
    model, x, y = deep()
    with pytest.raises(ValueError, match=r"clamp_input is .*: give a bool"):
        pc.FreeEnergy(model).infer(x, y, clamp_input=clamp)


def test_what_is_no_mask_and_no_start_is_refused():
    model, x, y = deep()
    with pytest.raises(ValueError, match="mask is list: give a bool tensor"):
        pc.FreeEnergy(model)(x, y, mask=[True] * len(y))
    for start in ([x], x, lambda predictions: None):
        with pytest.raises(TypeError, match=r"start is .*: give a dict"):
            pc.FreeEnergy(model)(x, y, start=start)


def test_an_order_of_the_wrong_form_is_refused():
    """Its states would be read as what they are not."""
    model, x, y = deep()
    with pytest.raises(ValueError, match="form='error'"):
        pc.FreeEnergy(model, order=orders.error)(x, y)
    with pytest.raises(ValueError, match="form='state'"):
        pc.FreeEnergy(model, order=pc.Order(orders.simultaneous, form="error"), steps=3)(x, y)
    with pytest.raises(ValueError, match="'state', if a state holds u"):
        pc.Order(orders.error, form="errors")


@pytest.mark.parametrize("order", [orders.incremental, lambda batch, rules, moves, start=None: None])
def test_an_order_that_returns_no_step_rule_is_refused(order):
    model, x, y = deep()
    with pytest.raises(TypeError, match="must return the step rule"):
        pc.FreeEnergy(model, order=order)(x, y)


@pytest.mark.parametrize("pi", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("order", ["error", "simultaneous"])
def test_a_precision_that_is_none_is_refused(order, pi):
    model, x, y = deep()

    def rule(node, squared, free_energy, nodes):
        return torch.full_like(free_energy, pi)

    with pytest.raises(ValueError, match="not positive and finite"):
        pc.FreeEnergy(model, order=order, precision=rule, steps=3)(x, y)
