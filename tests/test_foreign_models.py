"""What models and programs of others do around a training step: made right, or refused in words."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.autograd.forward_ad
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import pc_triton as pc
from pc_triton import dispatch, orders

ORDERS = ["error", "sweep", "simultaneous"]


def mlp(dtype=torch.float64, **options):
    torch.manual_seed(0)
    layers = pc.Linear(4, 5), nn.Tanh(), pc.Linear(5, 5, **options), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(dtype)


def batch(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(6, 4, dtype=dtype), torch.randint(3, (6,))


def loss_of(free_energy, x, y):
    """The loss of a call, or of the first step of "incremental"."""
    return next(free_energy.incremental(x, y)) if free_energy.order == "incremental" else free_energy(x, y)


# Second derivatives.


def penalty_gradient(loss, parameters):
    """The gradient of the squared gradient of the loss, as of a gradient penalty."""
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.autograd.grad(sum((g * g).sum() for g in grads), parameters, materialize_grads=True)


@pytest.mark.parametrize(
    "node", [pc.Gaussian(), pc.Bernoulli(), pc.Categorical()], ids=lambda node: type(node).__name__
)
@pytest.mark.parametrize("values", [False, True])
def test_one_error_step_has_second_derivatives(values, node):
    """At T = 1 F is the plain loss: so is the gradient of its gradient."""
    model, (x, y) = mlp(node=node), batch()
    parameters = list(model.parameters())
    y = torch.randn(6, 3, dtype=torch.float64) if values else y
    plain = 0.5 * ((model(x) - y) ** 2).sum() / 6 if values else F.cross_entropy(model(x), y)
    truth = penalty_gradient(plain, parameters)
    for a, b in zip(penalty_gradient(pc.FreeEnergy(model, steps=1)(x, y), parameters), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_second_derivatives_of_ignored_labels():
    model, (x, y) = mlp(), batch()
    y[2] = -100
    parameters = list(model.parameters())
    truth = penalty_gradient(F.cross_entropy(model(x), y), parameters)
    for a, b in zip(penalty_gradient(pc.FreeEnergy(model, steps=1)(x, y), parameters), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2},
        {"steps": 1, "local": True},
        {"order": "sweep", "steps": 1},
        {"order": "simultaneous"},
        {"order": "incremental", "steps": 1},
    ],
    ids=str,
)
def test_inferred_states_have_no_second_derivative(options, backend):
    """They depend on the weights, and the graph does not say how: refused, and plain learning is as before."""
    model, (x, y) = mlp(torch.float32), batch(torch.float32)
    free_energy = pc.FreeEnergy(model, **options)
    with dispatch.use_backend(backend):
        with pytest.raises(RuntimeError, match=r"create_graph=True.*steps=1"):
            loss_of(free_energy, x, y).backward(create_graph=True)
        assert all(p.grad is None for p in model.parameters())
        loss_of(free_energy, x, y).backward()
    assert model[4].weight.grad.abs().sum() > 0


def test_gradients_made_with_the_loss_have_no_second_derivative():
    x, y = batch(torch.float32)
    head = nn.Sequential(pc.Linear(4, 5), nn.Tanh(), pc.Head(5, 3))
    with pytest.raises(RuntimeError, match=r"create_graph=True.*nn\.Linear"):
        pc.FreeEnergy(head, steps=1)(x, y).backward(create_graph=True)
    with dispatch.use_backend("triton"), dispatch.use_chain(True):
        loss = pc.FreeEnergy(mlp(torch.float32), steps=1)(x, y)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*one launch"):
        loss.backward(create_graph=True)


class Slope(nn.Module):
    """A model that takes a derivative through its own node."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), pc.Bernoulli(), nn.Linear(5, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.body(x).sum(), x, create_graph=True)[0]


def test_a_derivative_within_the_model_through_a_node():
    torch.manual_seed(0)
    model, x = Slope(), torch.randn(6, 4)
    y = torch.zeros(6, 4)
    pc.FreeEnergy(model, steps=1)(x, y).backward()
    truth = torch.autograd.grad(0.5 * (model(x) ** 2).sum() / 6, model.body[0].weight)[0]
    torch.testing.assert_close(model.body[0].weight.grad, truth)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*without nodes"):
        pc.FreeEnergy(model, steps=2)(x, y)


# Nothing that can be trained below a node.


def on_the_data():
    torch.manual_seed(0)
    return nn.Sequential(pc.Gaussian(), nn.Linear(4, 5), nn.Tanh(), pc.Linear(5, 5), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("order", [*ORDERS, "incremental"])
@pytest.mark.parametrize("frozen", [[0], [0, 2], [4], [0, 2, 4]], ids=str)
def test_frozen_parts_leave_the_other_gradients_alone(frozen, order, steps):
    model, (x, y) = mlp(), batch()
    loss_of(pc.FreeEnergy(model, order=order, steps=steps), x, y).backward()
    truth = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for layer in frozen:
        model[layer].requires_grad_(False)
    loss = loss_of(pc.FreeEnergy(model, order=order, steps=steps), x, y)
    if frozen != [0, 2, 4]:
        loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (not p.requires_grad)
        if p.requires_grad:
            torch.testing.assert_close(p.grad, truth[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_a_node_on_the_data(order, steps):
    """At a high precision the gradients are backpropagation's; state orders have the last layer's after any step."""
    model, (x, y) = on_the_data(), batch()
    pc.FreeEnergy(model, order=order, steps=steps, precision=1e9)(x, y).backward()
    truth = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for p, g in zip(model.parameters(), truth, strict=True):
        if order == "error" or p.shape[0] == 3:
            torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_a_model_without_parameters(order, steps):
    model, (x, _) = nn.Sequential(pc.Gaussian(), nn.Tanh(), pc.Gaussian(), nn.Tanh()), batch()
    loss = pc.FreeEnergy(model, order=order, steps=steps, precision=1e3)(x, x)
    plain = 0.5 * ((model(x) - x) ** 2).sum() / 6
    torch.testing.assert_close(loss, plain, rtol=0.01, atol=0.0)


# Permuted memory.


class Permuted(nn.Module):
    """A node on a prediction that was transposed, or that lies channels-last; packed, on a copy in rows."""

    def __init__(self, node, how, packed) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.packed, self.node = how, packed, node
        self.conv, self.hidden, self.head = nn.Conv2d(3, 4, 1), pc.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.conv(x)  # [S, 4, 2, 3]
        h = h.flatten(2).transpose(1, 2) if self.how == "transposed" else h.to(memory_format=torch.channels_last)
        h = self.node(h.contiguous() if self.packed else h)
        h = h if self.how == "transposed" else h.flatten(2).transpose(1, 2)
        return self.head(self.hidden(h.tanh()).mean(1))


def sgd(states):
    return torch.optim.SGD(states, lr=0.3)


OPTIONS = [{}, {"order": "sweep"}, {"order": "simultaneous", "precision": 3.0}, {"order": "incremental"}]


@pytest.mark.parametrize("node", [pc.Gaussian, pc.Bernoulli, pc.Categorical, pc.StudentT])
@pytest.mark.parametrize("how", ["transposed", "channels last"])
@pytest.mark.parametrize(
    "options",
    [*OPTIONS, {"local": True}, {"state_optimizer": sgd}, {"order": "simultaneous", "state_optimizer": sgd}],
    ids=["error", "sweep", "simultaneous", "incremental", "error-local", "error-sgd", "simultaneous-sgd"],
)
def test_kernels_take_states_of_permuted_predictions(options, how, node):
    """Of two dimensions swapped, or of convolutions in channels-last: they compute what they do of a copy in rows."""
    torch.manual_seed(1)
    x, y = torch.randn(5, 3, 2, 3), torch.randint(3, (5,))
    found = []
    for packed in (False, True):
        model = Permuted(node(), how, packed)
        with dispatch.use_backend("triton"):
            loss_of(pc.FreeEnergy(model, **options), x, y).backward()
            settled = pc.FreeEnergy(model, **options).infer(x, y, start=lambda mu: {"node": 1.1 * mu["node"]})
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        found.append([*grads, settled.free_energy])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_an_order_of_ones_own_may_permute_states():
    def settle(batch, rules, moves, start):
        steps = orders.simultaneous(batch, rules, 1, start)
        for node in batch.nodes:
            if node.state is not None:
                node.state = node.state.t().contiguous().t()
        return orders.descend(batch, rules, steps, moves - 1)

    (x, y), found = batch(torch.float32), []
    for backend in ("torch", "triton"):
        model = mlp(torch.float32)
        with dispatch.use_backend(backend):
            pc.FreeEnergy(model, order=settle)(x, y).backward()
        found.append(model[0].weight.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"local": True}, {"order": "sweep"}, {"order": "simultaneous"}], ids=str)
def test_channels_last_convolutions_in_a_compiled_model(options):
    torch.manual_seed(1)
    x, y = torch.randn(4, 3, 6, 6), torch.randint(3, (4,))
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        body = nn.Conv2d(3, 4, 3), pc.Gaussian(), nn.ReLU(), nn.Conv2d(4, 4, 2), pc.Bernoulli(), nn.Flatten()
        model = nn.Sequential(*body, nn.Linear(36, 3))
        if compiled:
            model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
            model.compile(backend="aot_eager")
        free_energy = pc.FreeEnergy(model, **options)
        for _ in range(2):
            model.zero_grad()
            free_energy(x, y).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


# What the model does to its output.


class Ends(nn.Module):
    """A model of one hidden layer, and a last one that is given, followed by a function."""

    def __init__(self, last, function, columns=3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.last, self.function = pc.Linear(4, 5), last(5, columns), function

    def forward(self, x):
        return self.function(self.last(self.hidden(x).tanh()))


def probabilities(y):
    return F.one_hot(y, 3).double()


TWICE = {
    "sigmoid": (lambda z: z.sigmoid(), pc.Bernoulli(), probabilities),
    "sigmoid, then flattened": (lambda z: z.sigmoid().flatten(1).float(), pc.Bernoulli(), probabilities),
    "logsigmoid": (F.logsigmoid, pc.Bernoulli(), probabilities),
    "sigmoid within bounds": (lambda z: z.sigmoid().clamp(1e-6, 1 - 1e-6).nan_to_num(), pc.Bernoulli(), probabilities),
    "softmax of a Bernoulli": (lambda z: z.softmax(-1), pc.Bernoulli(), probabilities),
    "softmax above zero": (lambda z: z.softmax(-1).clamp_min(1e-9), None, lambda y: y),
    "exp of log_softmax": (lambda z: z.log_softmax(-1).exp(), None, lambda y: y),
    "exp of logsigmoid": (lambda z: F.logsigmoid(z).exp(), pc.Bernoulli(), probabilities),
    "softmax": (lambda z: z.softmax(-1), None, lambda y: y),
    "softmax, given": (nn.Softmax(-1), pc.Categorical(), probabilities),
    "a node on a sigmoid": (nn.Sequential(nn.Sigmoid(), pc.Bernoulli()), None, probabilities),
}


@pytest.mark.parametrize("order", ["error", "simultaneous"])
@pytest.mark.parametrize("last", [nn.Linear, pc.Linear])
@pytest.mark.parametrize("name", TWICE)
def test_an_activation_that_the_output_has_itself(name, last, order):
    (x, y), (function, output, target) = batch(), TWICE[name]
    model = Ends(last, function).double()
    with pytest.raises(ValueError, match=r"takes logits.*take that last step out"):
        pc.FreeEnergy(model, output, order=order)(x, target(y))


ONCE = {
    "sigmoid by squared error": (torch.sigmoid, None, probabilities),
    "softmax by squared error": (nn.Softmax(-1), pc.Gaussian(), probabilities),
    "log_softmax": (nn.LogSoftmax(-1), None, lambda y: y),
    "log of softmax": (lambda z: z.softmax(-1).clamp_min(1e-9).log(), None, lambda y: y),
    "exp": (torch.exp, None, lambda y: y),
    "sigmoid of labels": (torch.sigmoid, None, lambda y: y),
    "a node of the sigmoid": (pc.Bernoulli(), None, probabilities),
    "a node of the softmax": (pc.Categorical(), None, lambda y: y),
    "a gate": (lambda z: z * z.sigmoid(), pc.Bernoulli(), probabilities),
}


@pytest.mark.parametrize("name", ONCE)
def test_an_activation_that_the_output_does_not_have(name, recwarn):
    (x, y), (function, output, target) = batch(), ONCE[name]
    assert pc.FreeEnergy(Ends(nn.Linear, function).double(), output)(x, target(y)).isfinite()
    assert not [w for w in recwarn if "node" in str(w.message)]


SAME = {
    "slice": (lambda z: z[:, :3], 6, False),
    "select": (lambda z: z[:, 1], 6, True),
    "chunk": (lambda z: z.chunk(2, 1)[1], 6, False),
    "gather": (lambda z: z.gather(1, torch.arange(6).view(6, 1) % 3).squeeze(1), 6, True),
    "index": (lambda z: z[torch.arange(6), torch.arange(6) % 3], 6, True),
    "permuted": (lambda z: z.view(-1, 3, 2).transpose(1, 2), 6, True),
    "log_softmax": (nn.LogSoftmax(-1), 3, False),
    "split and stacked": (lambda z: torch.stack([t.squeeze(1) for t in z[:, :3].split(1, 1)], 1), 6, False),
    "a class of its own": (lambda z: torch.cat([z, torch.zeros(6, 1).double()], 1), 3, False),
    "log_softmax of a slice": (lambda z: z[:, 3:].log_softmax(-1), 6, False),
}


@pytest.mark.parametrize("options", [{}, {"order": "simultaneous", "precision": 1.0}, {"order": "sweep"}], ids=str)
@pytest.mark.parametrize("name", SAME)
def test_a_last_layer_whose_values_are_returned_is_the_output(name, options, recwarn):
    """In part, in another order, or as log_softmax of logits: F and gradients are those of a plain last layer."""
    function, columns, values = SAME[name]
    x, y = batch()
    y = torch.randn_like(Ends(nn.Linear, function, columns).double()(x)) if values else y
    found = []
    for last in (pc.Linear, nn.Linear):
        model = Ends(last, function, columns).double()
        free_energy = pc.FreeEnergy(model, **options)
        loss = free_energy(x, y)
        loss.backward()
        settled = free_energy.infer(x, y)
        assert list(settled.states) == ["hidden"]
        found.append([loss.detach(), settled.free_energy, settled.output, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not [w for w in recwarn if "node" in str(w.message)]


AFTER = {
    "softplus": (F.softplus, probabilities),
    "mean": (lambda z: z.view(-1, 3, 1).mean(2), lambda y: y),
    "tanh of a slice": (lambda z: z[:, :2].tanh(), lambda y: torch.zeros(6, 2).double()),
    "temperature": (lambda z: z / 2.0, lambda y: y),
    "a cap": (lambda z: 3 * (z / 3).tanh(), lambda y: y),
    "some hidden": (lambda z: torch.where(torch.tensor([True, True, False]), z, -9.0), lambda y: y),
    "a gate": (lambda z: z * z.sigmoid(), lambda y: y),
    "values without their mean": (lambda z: z - z.mean(1, keepdim=True), lambda y: y),
    "two parts": (lambda z: torch.cat([z[:, :1], z[:, 1:].tanh()], 1), lambda y: y),
}


@pytest.mark.parametrize("name", AFTER)
def test_a_last_layer_with_something_after_it_is_told_of_once(name):
    (x, y), (function, target) = batch(), AFTER[name]
    model = Ends(pc.Linear, function).double()
    free_energy = pc.FreeEnergy(model)
    with pytest.warns(UserWarning, match=r"'last', emits after.*nn\.Linear for pc\.Linear"):
        free_energy(x, target(y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free_energy(x, target(y))
        free_energy.infer(x, target(y))


class Heads(nn.Module):
    """Two last layers, joined."""

    def __init__(self, join) -> None:
        super().__init__()
        self.hidden, self.first, self.last, self.join = pc.Linear(4, 5), pc.Linear(5, 3), pc.Linear(5, 3), join
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        h = self.hidden(x).tanh()
        return self.join(self.first(h), self.last(h), self)


JOINED = {
    "cat": lambda a, b, model: torch.cat([a, b], 1),
    "stack": lambda a, b, model: torch.stack([a, b], 1),
    "mean": lambda a, b, model: (a + b) / 2,
    "on the data": lambda a, b, model: model.data + b,
}


@pytest.mark.parametrize("name", JOINED)
def test_two_last_layers_are_told_of(name):
    model, (x, _) = Heads(JOINED[name]).double(), batch()
    model.data = x[:, :3]
    with pytest.warns(UserWarning, match=r"last node, 'last', emits after.*nn\.Linear for pc\.Linear"):
        pc.FreeEnergy(model)(x, torch.zeros_like(model(x)))


def test_what_learns_after_the_last_node_is_nothing_to_tell(recwarn):
    """A bias, and what the node's value joins that a plain layer makes of it."""
    (x, y), plain = batch(), nn.Linear(3, 3).double()
    for join in (lambda a, b, model: a + b + model.bias, lambda a, b, model: a + plain(b)):
        pc.FreeEnergy(Heads(join).double())(x, y)
    assert not [w for w in recwarn if "node" in str(w.message)]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_after_the_last_node_is_nothing_to_tell(frozen, recwarn):
    model, (x, y) = mlp(), batch()
    model[4].requires_grad_(not frozen)
    pc.FreeEnergy(nn.Sequential(model, nn.Tanh()))(x, y)
    assert not [w for w in recwarn if "node" in str(w.message)]


def test_values_for_a_head_are_told_of():
    model, (x, y) = Ends(pc.Head, nn.Identity()).double(), batch()
    free_energy = pc.FreeEnergy(model)
    with pytest.warns(UserWarning, match=r"output=pc\.Categorical\(\)"):
        free_energy(x, probabilities(y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free_energy(x, probabilities(y))


@pytest.mark.parametrize("output", [pc.Categorical(), pc.Gaussian()])
def test_a_head_with_an_output_that_is_given_is_nothing_to_tell(output, recwarn):
    model, (x, y) = Ends(pc.Head, nn.Identity()).double(), batch()
    pc.FreeEnergy(model, output)(x, probabilities(y))
    assert not [w for w in recwarn if "pc.Head" in str(w.message)]


# What a forward changes, and where it draws.


class Statistic(nn.Module):
    """A running mean of the user's own, in place or as a new tensor, and a counter; it takes the mean off."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("still", torch.ones(4, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                moved = self.mean + 0.5 * (x.mean(0) - self.mean)
                self.mean = self.mean.copy_(moved) if self.in_place else moved
                self.count += 1
        return (x - self.mean) * self.mean.exp() * self.still


def with_statistic(in_place=True):
    return nn.Sequential(Statistic(in_place), mlp())


class Twice(nn.Module):
    """Two statistics that share their buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.body = Statistic(True), Statistic(True), mlp()
        self.second._buffers.update(self.first._buffers)

    def forward(self, x):
        return self.body(self.first(x) + self.second(x))


BUFFERS = {"in place": with_statistic, "anew": lambda: with_statistic(False), "shared": Twice}


def buffers_of(model):
    return {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize(
    "options", [{}, {"steps": 4}, {"order": "sweep"}, {"order": "incremental"}, {"steps": 1}], ids=str
)
@pytest.mark.parametrize("make", BUFFERS.values(), ids=list(BUFFERS))
def test_a_batch_moves_a_running_statistic_once(make, options):
    """As one forward does, at the first batch and at those after it."""
    (x, y), model, plain = batch(), make(), make()
    free_energy = pc.FreeEnergy(model, **options)
    for _ in range(3):
        plain(x)
        if options.get("order") == "incremental":
            for loss in free_energy.incremental(x, y):
                loss.backward()
        else:
            free_energy(x, y).backward()
        for a, b in zip(model.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


def test_every_pass_finds_the_buffers_of_the_first():
    """All passes of a batch are of one function."""
    for model in (with_statistic(), Twice()):
        (x, y), seen = batch(), []
        list(model.children())[-1].register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].detach())
        )
        pc.FreeEnergy(model, steps=4)(x, y).backward()
        assert len(seen) == 4
        for given in seen:
            assert torch.equal(given, seen[0])


@pytest.mark.parametrize("call", ["infer", "record", "report"])
@pytest.mark.parametrize("make", BUFFERS.values(), ids=list(BUFFERS))
def test_what_trains_nothing_moves_no_statistic(make, call):
    (x, y), model = batch(), make()
    free_energy = pc.FreeEnergy(model)
    for _ in range(2):
        before = buffers_of(model)
        getattr(free_energy, call)(x, y)
        for name, b in model.named_buffers():
            assert torch.equal(b, before[name])
        free_energy(x, y).backward()
        assert sum(b.sum() for b in model.buffers()) != sum(b.sum() for b in before.values())


@pytest.mark.parametrize("make", [with_statistic, lambda: nn.Sequential(nn.BatchNorm1d(4), mlp()).double()])
def test_a_refused_batch_moves_no_statistic(make):
    (x, y), model = batch(), make()
    before = buffers_of(model)
    y[0] = 9
    with pytest.raises(ValueError, match="label 9"):
        pc.FreeEnergy(model)(x, y)
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name])


def test_a_statistic_that_begins_to_move_late():
    """In evaluation nothing moves; from the first batch of training on each batch counts once."""
    (x, y), model = batch(), with_statistic()
    free_energy = pc.FreeEnergy(model)
    free_energy.eval()
    for _ in range(3):
        free_energy(x, y)
    free_energy.train()
    for _ in range(3):
        free_energy(x, y).backward()
    assert model[0].count == 3


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_batch_moves_a_statistic_once(whole):
    (x, y), model, plain = batch(), with_statistic(), with_statistic()
    free_energy = pc.FreeEnergy(model)
    if whole:
        free_energy.compile()
    else:
        model.compile(backend="aot_eager")
    for _ in range(3):
        plain(x)
        free_energy(x, y).backward()
        for a, b in zip(model.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_a_part_that_is_computed_again_moves_a_statistic_once():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = with_statistic()

        def forward(self, x):
            context = {"use_reentrant": False, "context_fn": pc.checkpoint_contexts}
            return torch.utils.checkpoint.checkpoint(self.body, x.requires_grad_(), **context)

    (x, y), model = batch(), Checkpointed()
    for _ in range(2):
        pc.FreeEnergy(model)(x, y).backward()
    assert model.body[0].count == 2


class Average(nn.Module):
    """A running mean as a parameter that does not learn, as some codebooks have it; still where it learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.body = nn.Parameter(torch.zeros(4, dtype=torch.float64), requires_grad=False), mlp()

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.5)
        return self.body(x - self.mean)


def test_a_frozen_parameter_that_the_forward_changes_is_told_of():
    (x, y), free_energy = batch(), pc.FreeEnergy(Average())
    with pytest.warns(UserWarning, match=r"changes parameter 'mean', which does not learn.*register_buffer"):
        free_energy(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free_energy(x, y)
        pc.FreeEnergy(Average().eval())(x, y)


class Draws(nn.Module):
    """Skips a layer at random, as many models do, by a generator that is not torch's."""

    def __init__(self, draw, generator=None) -> None:
        super().__init__()
        self.draw, self.generator, self.drawn = draw, generator, []
        self.body = mlp()
        self.more = pc.Linear(4, 4).double()

    def forward(self, x):
        self.drawn.append(self.draw(self.generator))
        return self.body(self.more(x) if self.drawn[-1] < 0.5 else x)


def of_ones_own(generator, draw):
    """That generator as an attribute of the module, begun by a seed, and what draws from it."""
    return lambda: Draws(draw, generator(0))


GENERATORS = {
    "python": (lambda: random.seed(0) or Draws(lambda _: random.random())),
    "numpy": (lambda: numpy.random.seed(0) or Draws(lambda _: numpy.random.rand())),
    "a Random": of_ones_own(random.Random, lambda g: g.random()),
    "a torch.Generator": of_ones_own(torch.Generator().manual_seed, lambda g: torch.rand((), generator=g).item()),
    "a RandomState": of_ones_own(numpy.random.RandomState, lambda g: g.rand()),
    "a NumPy Generator": of_ones_own(numpy.random.default_rng, lambda g: g.random()),
}


@pytest.mark.parametrize("options", [{}, {"order": "sweep"}, {"order": "incremental"}], ids=str)
@pytest.mark.parametrize("name", GENERATORS)
def test_other_generators_draw_once_in_a_batch(name, options):
    """The same in all its passes, and the next batch new ones: those that plain passes would have."""
    (x, y), plain = batch(), GENERATORS[name]()
    for _ in range(6):
        plain(x)
    model = GENERATORS[name]()
    free_energy = pc.FreeEnergy(model, **options)
    for number in range(6):
        model.drawn.clear()
        if options.get("order") == "incremental":
            for loss in free_energy.incremental(x, y):
                loss.backward()
        else:
            free_energy(x, y).backward()
        assert len(model.drawn) > 1
        assert set(model.drawn) == {plain.drawn[number]}


@pytest.mark.parametrize("name", GENERATORS)
def test_compile_refuses_other_generators(name):
    free_energy = pc.FreeEnergy(GENERATORS[name]())
    free_energy.compile()
    with pytest.raises(ValueError, match="Python or NumPy"):
        free_energy(*batch())


# Labels in the arguments, classes and time along another axis.


class Loss(nn.Module):
    """A model that makes a loss of its own where its arguments hold labels, as Hugging Face's do."""

    def __init__(self, shifts, returns=dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.returns = returns
        self.body = nn.Sequential(nn.Embedding(7, 5), pc.Linear(5, 5), nn.Tanh(), nn.Linear(5, 7))
        self.shifts = shifts

    def forward(self, input_ids, labels=None):
        logits = self.body(input_ids)
        if labels is None:
            return self.returns(logits=logits)
        a, b = (logits[:, :-1], labels[:, 1:]) if self.shifts else (logits, labels)
        return self.returns(loss=F.cross_entropy(a.flatten(0, 1), b.flatten()), logits=logits)


def tokens():
    torch.manual_seed(2)
    x = torch.randint(7, (3, 6))
    y = torch.randint(7, (3, 6))
    y[0, 3] = -100
    return {"input_ids": x, "labels": y}


@pytest.mark.parametrize("returns", [dict, SimpleNamespace])
@pytest.mark.parametrize("shifts", [False, True])
def test_labels_among_the_arguments_alone(shifts, returns):
    free_energy = pc.FreeEnergy(Loss(shifts, returns))
    with pytest.raises(ValueError, match=r"x holds labels.*give them as y"):
        free_energy(tokens())


@pytest.mark.parametrize("returns", [dict, SimpleNamespace])
def test_labels_that_the_model_shifts(returns):
    """As they are, they train each token on itself: refused; shifted, or where the model does not shift, they train."""
    given = tokens()
    with pytest.raises(ValueError, match=r"which it shifts before its loss: y = torch\.nn\.functional\.pad"):
        pc.FreeEnergy(Loss(True, returns))(given, given["labels"])
    model = Loss(True)
    y = torch.nn.functional.pad(given["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(pc.FreeEnergy(model, steps=1)(given, y), model(**given)["loss"])
    model = Loss(False)
    torch.testing.assert_close(pc.FreeEnergy(model, steps=1)(given, given["labels"]), model(**given)["loss"])


@pytest.mark.parametrize("form", ["tensor", "dict", "copy"])
def test_a_language_model_on_its_own_tokens(form):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model, _ = pc.convert(transformers.GPT2LMHeadModel(config))
    ids = torch.randint(11, (2, 6))
    x = {"input_ids": ids} if form == "dict" else ids
    with pytest.raises(ValueError, match="own tokens, and the model predicts the token after"):
        pc.FreeEnergy(model)(x, ids.clone() if form == "copy" else ids)
    assert pc.FreeEnergy(model)(ids[:, :-1], ids[:, 1:]).isfinite()


class Last(nn.Module):
    def forward(self, x):
        return x.movedim(1, -1)


class Part(nn.Module):
    def forward(self, x):
        return x[:, :5] / 2


class Sum(nn.Module):
    """Two convolutions side by side, as a network of several resolutions adds them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 5, 1), nn.Conv1d(4, 5, 3, padding=1)

    def forward(self, x):
        return self.a(x) + self.b(x)


LAST = {
    "convolution": nn.Conv1d(4, 5, 1),
    "a node on a convolution": nn.Sequential(nn.Conv1d(4, 5, 1), pc.Gaussian()),
    "upsampling": nn.Sequential(nn.Conv1d(4, 5, 1), nn.Upsample(scale_factor=1.0, mode="linear")),
    "transposed convolution": nn.ConvTranspose1d(4, 5, 1),
    "batch normalisation": nn.Sequential(nn.Conv1d(4, 5, 1), nn.BatchNorm1d(5)),
    "group normalisation": nn.Sequential(nn.Conv1d(4, 5, 1), nn.GroupNorm(1, 5), nn.ReLU()),
    "a part, with dropout": nn.Sequential(nn.Conv1d(4, 6, 1), Part(), nn.Dropout(0.1)),
    "a sum of two": Sum(),
    "a softmax over the channels": nn.Sequential(Last(), nn.Linear(4, 5), Last(), nn.LogSoftmax(1)),
    "the same, counted from the end": nn.Sequential(Last(), nn.Linear(4, 5), Last(), nn.LogSoftmax(-2)),
}


@pytest.mark.parametrize("name", LAST)
def test_classes_along_the_channels_of_a_convolution(name):
    """With as many classes as positions the shapes fit either way: a convolution's classes are its channels."""
    model = nn.Sequential(nn.Conv1d(3, 4, 1), pc.Gaussian(), nn.Tanh(), LAST[name])
    y = torch.randint(5, (2, 5))
    with pytest.raises(ValueError, match=r"movedim\(1, -1\)"):
        pc.FreeEnergy(model)(torch.randn(2, 3, 5), y)


@pytest.mark.parametrize(
    "last",
    [
        nn.Sequential(nn.Conv1d(4, 5, 1), Last()),
        nn.Sequential(Last(), nn.Linear(4, 5)),
        nn.Sequential(nn.Conv1d(4, 5, 1), Last(), nn.LogSoftmax(-1)),
    ],
    ids=["moved", "linear", "log_softmax"],
)
def test_classes_along_the_last_axis(last):
    model = nn.Sequential(nn.Conv1d(3, 4, 1), pc.Gaussian(), nn.Tanh(), last)
    assert pc.FreeEnergy(model)(torch.randn(2, 3, 5), torch.randint(5, (2, 5))).isfinite()


class Recurrent(nn.Module):
    def __init__(self, layer, turns) -> None:
        super().__init__()
        self.layer, self.turns = layer, turns
        self.node, self.head = pc.Gaussian(), nn.Linear(4, 3)

    def forward(self, x):
        x = x.transpose(0, 1) if self.turns else x
        h = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)[0]
        return self.head(self.node(h.transpose(0, 1) if self.turns else h))


LAYERS = {
    "gru": lambda **options: nn.GRU(4, 4, **options),
    "lstm": lambda **options: nn.LSTM(4, 4, **options),
    "attention": lambda **options: nn.MultiheadAttention(4, 2, **options),
}


@pytest.mark.parametrize("name", LAYERS)
def test_time_first_is_refused(name):
    x, y = torch.randn(7, 2, 4), torch.randint(3, (7, 2))
    with pytest.raises(ValueError, match=r"'layer' has batch_first=False.*steps in time"):
        pc.FreeEnergy(Recurrent(LAYERS[name](), False))(x, y)
    for model in (Recurrent(LAYERS[name](batch_first=True), False), Recurrent(LAYERS[name](), True)):
        assert pc.FreeEnergy(model)(x, y).isfinite()
        assert not model.layer._forward_pre_hooks


# What transforms, copies or exports.


def called(free_energy, x, y):
    """F as a function of parameters, as torch.func has it."""
    return lambda p: torch.func.functional_call(free_energy, p, (x, y))


TRANSFORMS = {
    "grad": lambda f, p: torch.func.grad(f)(p),
    "jvp": lambda f, p: torch.func.jvp(f, (p,), (p,)),
    "jacrev": lambda f, p: torch.func.jacrev(f)(p),
    "ensemble": lambda f, p: torch.func.vmap(f)({name: torch.stack([v, v]) for name, v in p.items()}),
}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_are_refused(name, steps):
    free_energy, (x, y) = pc.FreeEnergy(mlp(), steps=steps), batch()
    parameters = {n: p.detach() for n, p in free_energy.named_parameters()}
    with pytest.raises(RuntimeError, match=r"within torch\.func.*loss\.backward\(\)"):
        TRANSFORMS[name](called(free_energy, x, y), parameters)
    torch.testing.assert_close(called(free_energy, x, y)(parameters), free_energy(x, y))


@pytest.mark.parametrize("call", ["infer", "record", "__call__"])
def test_samples_by_vmap_are_refused(call):
    free_energy, (x, y) = pc.FreeEnergy(mlp()), batch()
    with pytest.raises(RuntimeError, match="loop in place of vmap"):
        torch.func.vmap(lambda a, b: getattr(free_energy, call)(a[None], b[None]))(x, y)


def test_forward_mode_is_refused():
    (x, y), free_energy = batch(), pc.FreeEnergy(mlp())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        free_energy(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), y)


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("how", ["whole", "inference", "model", "statistic"])
def test_copies_of_what_was_compiled(how, copies):
    """They are compiled anew where they are called, and learn what the first would have."""
    (x, y), model = batch(), with_statistic() if how == "statistic" else mlp()
    free_energy = pc.FreeEnergy(model)
    if how == "whole":
        free_energy.compile()
    elif how == "inference":
        free_energy.compile_model("eager")
    elif how == "model":
        model.compile(backend="eager")
    free_energy(x, y).backward()
    other = copies(free_energy)
    found = []
    for one in (free_energy, other):
        one.zero_grad()
        one(x, y).backward()
        found.append([*(p.grad for p in one.parameters()), *one.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert all(p is not q for p, q in zip(free_energy.parameters(), other.parameters(), strict=True))


def exported(model, arguments):
    return torch.export.export(model, arguments).module()


@pytest.mark.parametrize("export", [torch.jit.trace, exported], ids=["trace", "export"])
def test_the_model_is_exported_and_not_its_training(export):
    (x, y), model = batch(torch.float32), mlp(torch.float32)
    refusal = "Graph break" if export is exported and torch.__version__.startswith("2.6.") else "the model itself"
    with pytest.raises(RuntimeError, match=refusal):
        export(pc.FreeEnergy(model), (x, y))
    torch.testing.assert_close(export(model, (x,))(x), model(x))


@pytest.mark.parametrize("layer", [pc.Linear(4, 4), pc.Attention(4, 2)], ids=["linear", "attention"])
def test_traced_layers(layer):
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))
    with pytest.raises(TypeError, match=r"torch\.jit\.script takes no value nodes"):
        torch.jit.script(layer)


@pytest.mark.parametrize("kinds", [{nn.Linear}, {nn.Linear, pc.Linear}], ids=["linear", "both"])
def test_quantisation_that_would_pass_over_layers_is_refused(kinds):
    model = mlp(torch.float32)
    with pytest.raises(TypeError, match="plain layers, which loads its state dict"):
        torch.ao.quantization.quantize_dynamic(model, kinds)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    plain.load_state_dict(model.state_dict())
    assert "DynamicQuantizedLinear" in repr(torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}))


@pytest.mark.parametrize("kind", ["move", "model"])
def test_a_loss_that_is_not_finite_is_told_once(kind):
    """A log variance that moves too far at a small precision; a model that overflows by itself."""
    torch.manual_seed(0)
    if kind == "move":
        layers = [pc.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), pc.GaussianLogVar(prior=True), nn.Linear(2, 6)]
        free_energy = pc.FreeEnergy(nn.Sequential(*layers), steps=4, precision=1e-4, step=1.0)
        x = y = 10 * torch.randn(5, 6)
    else:
        model = nn.Sequential(pc.Linear(6, 8), nn.Linear(8, 6))
        nn.init.constant_(model[1].weight, 1e30)
        free_energy, x, y = pc.FreeEnergy(model, steps=1), torch.randn(5, 6), torch.randn(5, 6)
    why = {"move": "has not been since move 1 of .* that of node", "model": "nor at the prediction"}[kind]
    with pytest.warns(UserWarning, match=f"the free energy is not finite where the weights learn, .*{why}"):
        assert not free_energy(x, y).isfinite()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not free_energy(x, y).isfinite()


@pytest.mark.parametrize("generates", [lambda: True, lambda: False, True], ids=["yes", "no", "no method"])
def test_a_model_that_only_looks_like_hugging_faces_trains(generates):
    """``can_generate`` without a config, whatever it is, is a name of the user's own: y is not x here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 8), pc.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    model.can_generate = generates
    x = torch.randint(5, (3, 4))
    assert pc.FreeEnergy(model)(x, (x + 1) % 5).isfinite()


def test_a_loss_of_each_sample_beside_the_logits_is_no_hindrance():
    """What a model returns beside its logits is its own affair."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Embedding(5, 8), pc.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))

        def forward(self, x):
            logits = self.layers(x)
            return {"logits": logits, "loss": logits.logsumexp(-1).mean(-1)}

    torch.manual_seed(0)
    x = torch.randint(5, (3, 4))
    assert pc.FreeEnergy(Both())(x, (x + 1) % 5).isfinite()
