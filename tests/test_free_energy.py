"""`FreeEnergy` as its user meets it: local learning, bad input that changes nothing, a true report."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pc_triton as pc
from pc_triton.models import Transformer

ORDERS = ["error", "sweep", "simultaneous"]


def mlp(dtype=torch.float32, dropout: float = 0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        pc.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), pc.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ).to(dtype)


def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=g, dtype=dtype), torch.randint(3, (6,), generator=g)


def lm(std: float = 0.02):
    torch.manual_seed(0)
    model = Transformer(64, width=32, heads=2, blocks=2, context=8)
    nn.init.normal_(model.tokens.weight, std=std)
    return model, torch.randint(64, (4, 8)), torch.randint(64, (4, 8))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def close(a, b, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 1e-2)


# Learning.


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("order", ["sweep", "simultaneous"])
def test_learning_is_local(order, steps):
    """``.grad`` is dE_l/dmu_l . dmu_l/dtheta_l of each layer's own node, at the states that inference left."""
    pi, model, (x, y) = 2.0, mlp(torch.float64), batch(torch.float64)
    free_energy = pc.FreeEnergy(model, order=order, precision=pi, step=0.25, steps=steps)
    settled = free_energy.infer(x, y)
    u1, u2 = settled.states.values()
    loss = free_energy(x, y)
    grads = gradients(model, loss)
    assert free_energy.infer(x, y).free_energy.mean().item() == pytest.approx(loss.item(), rel=1e-12)

    energy_1 = pi / 2 * ((u1 - F.linear(x, model[0].weight, model[0].bias)) ** 2).sum()
    energy_2 = pi / 2 * ((u2 - F.linear(u1.tanh(), model[3].weight, model[3].bias)) ** 2).sum()
    energy_3 = F.cross_entropy(model[5](u2.tanh()), y, reduction="sum")
    assert loss.item() == pytest.approx((energy_1 + energy_2 + energy_3).item() / 6, rel=1e-9)
    for layer, energy in ((0, energy_1), (3, energy_2), (5, energy_3)):
        local = torch.autograd.grad(energy / 6, [model[layer].weight, model[layer].bias])
        close([p.grad for p in model[layer].parameters()], list(local))
    assert [p.grad.shape for p in model.parameters()] == [g.shape for g in grads]


@pytest.mark.parametrize("steps", [2, 4])
def test_learning_with_the_errors_held(steps):
    """In error order ``.grad`` is that of F with e = u - mu fixed after T - 1 moves."""
    pi, model, (x, y) = 2.0, mlp(torch.float64), batch(torch.float64)
    u1, u2 = pc.FreeEnergy(model, precision=pi, step=0.25, steps=steps - 1).infer(x, y).states.values()
    e1 = (u1 - F.linear(x, model[0].weight, model[0].bias)).detach()
    e2 = (u2 - F.linear(u1.tanh(), model[3].weight, model[3].bias)).detach()
    v1 = F.linear(x, model[0].weight, model[0].bias) + e1
    v2 = F.linear(v1.tanh(), model[3].weight, model[3].bias) + e2
    hidden = pi / 2 * ((e1**2).sum() + (e2**2).sum())
    truth = (hidden + F.cross_entropy(model[5](v2.tanh()), y, reduction="sum")) / 6
    loss = pc.FreeEnergy(model, precision=pi, step=0.25, steps=steps)(x, y)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-9)
    close(gradients(model, loss), gradients(model, truth))


@pytest.mark.parametrize("order", ORDERS)
def test_backward_leaves_gradients_in_the_models_parameters_alone(order):
    """Nothing but ``.grad`` of the parameters: weights, buffers and data stay; and a call alone leaves no gradient."""
    model, (x, y) = mlp(), batch()
    before, x_before = [p.clone() for p in model.parameters()], x.clone()
    free_energy = pc.FreeEnergy(model, order=order)
    assert [id(p) for p in free_energy.parameters()] == [id(p) for p in model.parameters()]
    loss = free_energy(x, y)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
    assert torch.equal(x, x_before)
    assert x.grad is None
    free_energy.infer(x, y)
    free_energy.report(x, y)
    for p, g in zip(model.parameters(), gradients(model, free_energy(x, y))):
        close(p.grad, g)


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_accumulate(order):
    """Two calls, backward one by one or of their sum."""
    model, (x, y) = mlp(torch.float64), batch(torch.float64)
    free_energy = pc.FreeEnergy(model, order=order, steps=3)
    together = gradients(model, free_energy(x[:2], y[:2]) + free_energy(x[2:], y[2:]))
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 6)):
        free_energy(x[part], y[part]).backward()
    close([p.grad for p in model.parameters()], together)


@pytest.mark.parametrize("order", ORDERS)
def test_training_lowers_the_loss(order, device):
    model, (x, y) = mlp().to(device), (t.to(device) for t in batch())
    free_energy, optimizer = pc.FreeEnergy(model, order=order), torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = free_energy(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert F.cross_entropy(model(x), y) < 0.3


def test_training_and_evaluation_modes():
    """Dropout follows ``train()`` and ``eval()``; outside FreeEnergy the model is a plain one."""
    model, (x, y) = mlp(dropout=0.5), batch()
    free_energy = pc.FreeEnergy(model)
    assert free_energy(x, y) != free_energy(x, y)
    free_energy.eval()
    assert not model[2].training
    assert free_energy(x, y) == free_energy(x, y)
    assert torch.equal(model(x), model(x))
    assert free_energy.train().model[2].training


def test_batch_norm_counts_a_batch_once():
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    pc.FreeEnergy(model, steps=3)(*batch()).backward()
    assert model[1].num_batches_tracked == 1


def test_an_output_node_that_is_not_visited_last():
    """What the model returns decides which node is clamped, not the order of the visits."""

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.aside, self.softmax = (
                pc.Linear(5, 8),
                nn.Linear(8, 3),
                pc.Linear(8, 2),
                pc.Categorical(),
            )

        def forward(self, x):
            h = self.a(x).tanh()
            out = self.softmax(self.b(h))
            self.aside(h)
            return out

    model, (x, y) = Aside(), batch()
    assert pc.FreeEnergy(model, steps=1)(x, y).item() == pytest.approx(F.nll_loss(model(x).log(), y).item(), rel=1e-5)
    report = pc.FreeEnergy(model).report(x, y)
    assert [node.name for node in report.nodes] == ["a"]


@pytest.mark.parametrize("order", ["error", "sweep", "simultaneous"])
def test_a_model_of_one_layer_is_its_output(order):
    """Nothing is free: F is the loss, its gradient backpropagation's, and a report says that nothing moved."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(pc.Linear(5, 3)), batch()
    free_energy = pc.FreeEnergy(model, order=order)
    loss = free_energy(x, y)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y))
    assert model[0].weight.grad.any()
    assert free_energy.report(x, y).nodes == ()
    for p in model.parameters():
        p.requires_grad_(False)
    assert free_energy.report(x, y).cosine == 0


def test_adam_on_the_states_with_a_precision_of_its_own():
    """The line of docs/in_your_program.md: F falls at every step."""
    model, (x, y) = mlp(), batch()
    free_energies = (
        pc.FreeEnergy(
            model, steps=8, precision=1.0, state_optimizer=lambda states: torch.optim.Adam(states, lr=0.01)
        ).report(x, y).free_energies
    )  # fmt: skip
    assert all(b < a for a, b in pairwise(free_energies))


# Inputs.


class Two(nn.Module):
    """Two arguments and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = pc.Linear(5, 8), pc.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, other=None, mask=None, scale: float = 1.0):
        h = self.a(x).tanh()
        if other is not None:
            h = h + scale * self.b(other).tanh()
        return self.head(h if mask is None else h + mask)


def test_a_tuple_or_dict_is_the_models_arguments():
    torch.manual_seed(0)
    model, (x, y), other = Two(), batch(), torch.randn(6, 5)
    free_energy = pc.FreeEnergy(model, steps=3)
    expected = free_energy((x, other), y)
    assert expected != free_energy(x, y)
    assert free_energy({"x": x, "other": other}, y) == expected
    assert free_energy((x, other, None, 1.0), y) == expected
    assert free_energy({"x": x, "other": other, "scale": 2.0}, y) != expected
    assert free_energy.infer((x, other), y).input[1] is other


def test_a_float_mask_may_hold_infinity():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    pc.convert(encoder)
    x, mask = torch.randn(2, 3, 8), nn.Transformer.generate_square_subsequent_mask(3)
    assert pc.FreeEnergy(encoder)({"src": x, "mask": mask}, torch.randn(2, 3, 8)).isfinite()


def test_labels_make_the_output_categorical_and_values_gaussian():
    model, (x, y) = mlp(torch.float64), batch(torch.float64)
    values = torch.randn(6, 3, dtype=torch.float64)
    out = model(x).detach()
    assert pc.FreeEnergy(model, steps=1)(x, y).item() == pytest.approx(F.cross_entropy(out, y).item())
    assert pc.FreeEnergy(model, steps=1)(x, values).item() == pytest.approx(((out - values) ** 2).sum().item() / 12)
    given = pc.FreeEnergy(model, pc.Bernoulli(), steps=1)(x, values.sigmoid())
    truth = F.binary_cross_entropy_with_logits(out, values.sigmoid(), reduction="sum") / 6
    assert given.item() == pytest.approx(truth.item())


# Bad arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"steps": True}, "steps=True"),
        ({"order": "jacobi"}, "order='jacobi': choose one of error, sweep, simultaneous, incremental"),
        ({"precision": 0.0}, "precision=0.0"),
        ({"precision": -1.0}, "precision=-1.0"),
        ({"precision": math.inf}, "precision=inf"),
        ({"precision": math.nan}, "precision=nan"),
        ({"precision": "high"}, "precision='high'"),
        ({"displacement": 0.0}, "displacement=0.0"),
        ({"displacement": 1.0}, "displacement=1.0"),
        ({"displacement": math.nan}, "displacement=nan"),
        ({"step": 0.0}, "step=0.0"),
        ({"step": 1.5}, "step=1.5"),
        ({"step": math.nan}, "step=nan"),
        ({"order": "sweep", "state_optimizer": torch.optim.Adam}, "state_optimizer=None"),
        ({"order": "incremental", "state_optimizer": torch.optim.Adam}, "state_optimizer=None"),
        ({"output": "categorical"}, "output='categorical'"),
        ({"output": pc.Categorical}, "give a pc_triton Distribution"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        pc.FreeEnergy(mlp(), **options)


def test_a_model_without_value_nodes():
    with pytest.raises(ValueError, match=r"no value node: use pc.Linear .* or pc.convert"):
        pc.FreeEnergy(nn.Linear(5, 3))


def test_a_model_that_visits_no_value_node():
    """It has one, and does not use it."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), pc.Linear(5, 3)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(RuntimeError, match="needs at least one"):
        pc.FreeEnergy(Unused())(*batch())


def test_calls_of_the_wrong_order():
    x, y = batch()
    with pytest.raises(ValueError, match=r"for loss in free_energy\.incremental"):
        pc.FreeEnergy(mlp(), order="incremental")(x, y)
    with pytest.raises(ValueError, match="order='incremental'"):
        next(pc.FreeEnergy(mlp()).incremental(x, y))


class Returns(nn.Module):
    """A model whose output is what the test makes of it."""

    def __init__(self, make) -> None:
        super().__init__()
        self.layers, self.make = mlp(), make

    def forward(self, x):
        return self.make(self.layers(x))


def bad_inputs():
    x, y = batch()
    nan, infinite = x.clone(), x.clone()
    nan[2, 3], infinite[0, 0] = math.nan, math.inf
    values = torch.randn(6, 3)
    nan_values = values.clone()
    nan_values[5, 2] = math.nan
    return {
        "empty batch": (x[:0], y[:0], "at least one sample"),
        "empty features": (x[:, :0], y, "at least one sample"),
        "scalar": (torch.tensor(1.0), y, "at least one sample"),
        "NaN in x": (nan, y, "x holds NaN or infinity"),
        "infinity in x": (infinite, y, "x holds NaN or infinity"),
        "NaN in y": (x, nan_values, "y holds NaN or infinity"),
        "too few labels": (x, y[:5], r"labels have shape \(5,\)"),
        "labels as a column": (x, y[:, None], r"labels have shape \(6, 1\)"),
        "values of another shape": (x, values[:, :2], r"\(6, 2\).*\(6, 3\)"),
        "label too large": (x, y + 1, "label 3 is outside 0 .. 2"),
        "label negative": (x, y - 1, "label -1 is outside 0 .. 2"),
        "labels int32": (x, y.int(), "give int64"),
        "another device": (x, y.to("meta"), "y is on meta, the model's output on cpu"),
    }


@pytest.mark.parametrize("order", [*ORDERS, "incremental"])
@pytest.mark.parametrize("name", bad_inputs())
def test_bad_input_is_refused_and_changes_nothing(name, order):
    """One ValueError; parameters, gradients, modes and the random numbers to come stay as they were."""
    x, y, message = bad_inputs()[name]
    model = mlp()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
    free_energy = pc.FreeEnergy(model, order=order)
    with pytest.raises(ValueError, match=message) as caught:
        next(free_energy.incremental(x, y)) if order == "incremental" else free_energy(x, y)
    assert "\n" not in str(caught.value)
    for call in (free_energy.infer, free_energy.report):
        with pytest.raises(ValueError, match=message):
            call(x, y)
    assert all(torch.equal(p, b) and (p.grad == 1).all() for p, b in zip(model.parameters(), before))
    assert torch.equal(torch.get_rng_state(), random)
    assert model[0].training
    assert torch.equal(model(batch()[0]), model(batch()[0])), "no inference is left under way"


def test_bad_labels_draw_no_random_numbers():
    model, (x, y) = mlp(dropout=0.5), batch()
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match="label 3"):
        pc.FreeEnergy(model)(x, y + 1)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("x", [[1.0, 2.0], "text", None, (), {}, ("text",)], ids=repr)
def test_an_input_without_a_tensor(x):
    with pytest.raises(TypeError, match="a tuple or dict of the model's arguments"):
        pc.FreeEnergy(mlp())(x, batch()[1])


def test_a_free_input_must_be_a_tensor_of_real_numbers():
    x, y = batch()
    for bad in ((x,), {"x": x}, torch.zeros(6, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match="clamp_input=False"):
            pc.FreeEnergy(mlp()).infer(bad, y, clamp_input=False)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda out: (out, out), TypeError, "returned tuple: it must return one tensor"),
        (lambda out: {"hidden": out}, TypeError, "returned dict: .* or a mapping with its 'logits'"),
        (lambda out: out.sum(), ValueError, r"output has shape \(\) for a batch of 6"),
        (lambda out: out.mean(0), ValueError, r"output has shape \(3,\) for a batch of 6"),
    ],
    ids=["tuple", "dict", "scalar", "mean"],
)
def test_a_model_that_returns_something_else(make, error, message):
    with pytest.raises(error, match=message):
        pc.FreeEnergy(Returns(make))(*batch())


def test_a_node_without_the_samples_first():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = pc.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(self.a(x.mean(0)) + x[:, :4])

    with pytest.raises(ValueError, match=r"node 'a' sees shape \(4,\) in a batch of 6"):
        pc.FreeEnergy(Mean())(*batch())


def test_a_model_that_is_no_module():
    with pytest.raises(TypeError, match="module"):
        pc.FreeEnergy(lambda x: x)


# The report.


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_report_of_a_transformer(std, device):
    """Settled at the default, near backpropagation, every free node in the table; and it trains nothing."""
    model, x, y = lm(std)
    model, x, y = model.to(device), x.to(device), y.to(device)
    weights, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
    free_energy = pc.FreeEnergy(model)
    report = free_energy.report(x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(model.parameters(), weights))
    assert 0.9 <= report.settled <= 1.0
    assert report.cosine > 0.9
    assert report.worst_cosine <= report.cosine <= 1 + 1e-9
    assert report.residual < 0.5
    before, after = report.free_energies
    assert report.long_run <= after < before
    assert before == pytest.approx(F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item(), rel=1e-5)
    assert after == pytest.approx(free_energy(x, y).item(), rel=1e-5)
    names = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn", "attn.out_proj", "up", "down")]
    assert [node.name for node in report.nodes] == names
    assert all(node.precision > 0 and node.energy >= 0 and node.residual < 1 for node in report.nodes)
    assert {node.family for node in report.nodes} == {"Gaussian", "Categorical"}


def test_report_prints_words_and_a_table():
    model, x, y = lm()
    report = pc.FreeEnergy(model).report(x, y)
    words, table = str(report).split("\n\n")
    assert words.replace("\n", " ") == report.summary
    lines = table.splitlines()
    assert lines[0].split() == ["node", "family", "precision", "energy", "residual"]
    for line, node in zip(lines[1:], report.nodes):
        name, family, *numbers = line.split()
        assert (name, family) == (node.name, node.family)
        assert [float(n) for n in numbers] == pytest.approx([node.precision, node.energy, node.residual], rel=0.06)
    assert len(lines) == len(report.nodes) + 3
    assert lines[-1] == report.regime
    assert f"settled {report.settled:.1%}" in report.regime


def test_report_of_one_error_step_is_backpropagation():
    model, x, y = lm()
    report = pc.FreeEnergy(model, steps=1).report(x, y)
    assert report.settled == 0
    assert report.regime == "backpropagation: the states are at their predictions"
    assert report.cosine == pytest.approx(1, abs=1e-6)
    assert report.worst_cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("options", [{"order": "sweep"}, {"order": "simultaneous"}, {"order": "incremental"}, {}])
@pytest.mark.parametrize("precision", ["auto", 3.0])
def test_report_of_every_order(options, precision):
    """F after each move before learning, the reachable fall, and the cosine to backpropagation, each by another way."""
    model, (x, y) = mlp(torch.float64), batch(torch.float64)
    free_energy = pc.FreeEnergy(model, precision=precision, steps=4, **options)
    report = free_energy.report(x, y)
    runs = [
        pc.FreeEnergy(model, precision=precision, steps=t, **options).infer(x, y) for t in range(1, 5 - (not options))
    ]
    truth = [F.cross_entropy(model(x), y).item(), *(run.free_energy.mean().item() for run in runs)]
    assert list(report.free_energies) == pytest.approx(truth, rel=1e-7)
    equilibrium = pc.FreeEnergy(model, precision=precision, steps=200).infer(x, y).free_energy.mean()
    assert report.long_run == pytest.approx(equilibrium.item(), rel=1e-7)
    assert 0 < report.settled <= 1
    if options.get("order") != "incremental":
        backpropagation = gradients(model, F.cross_entropy(model(x), y))
        learned = gradients(model, free_energy(x, y))
        a, b = (torch.cat([g.flatten() for g in gs]) for gs in (learned, backpropagation))
        assert report.cosine == pytest.approx(F.cosine_similarity(a, b, dim=0).item(), rel=1e-6)
    assert [node.name for node in report.nodes] == ["0", "3"]
    assert 0 < report.residual < 1
    assert len(report.energies) == len(report.free_energies)
    assert report.energies[-1] == tuple(node.energy for node in report.nodes)
    for energies, run in zip(report.energies, free_energy.record(x, y)):
        taken = [step.energy.mean().item() for step in run.values()]
        assert list(energies) == pytest.approx(taken, rel=1e-6, abs=1e-12)


def test_report_with_a_state_optimizer():
    model, (x, y) = mlp(torch.float64), batch(torch.float64)
    few, many = (
        pc.FreeEnergy(model, steps=t, state_optimizer=lambda s: torch.optim.SGD(s, lr=0.2)).report(x, y)
        for t in (2, 30)
    )
    assert few.long_run == pytest.approx(many.long_run, rel=1e-9)
    assert 0 < few.settled < 0.8 < 0.99 < many.settled <= 1
    assert few.residual > 10 * many.residual > 0


def test_report_leaves_out_a_node_that_does_not_reach_the_output():
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.dead, self.b, self.head = pc.Linear(5, 5), pc.Linear(5, 5), pc.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = self.a(x)
            self.dead(x)
            return self.head(self.b(x.tanh()).tanh())

    for options in ({}, {"order": "sweep"}, {"order": "sweep", "precision": 2.0}):
        report = pc.FreeEnergy(Dead(), steps=4, **options).report(*batch())
        assert [node.name for node in report.nodes] == ["a", "b"]
        assert all(0 <= node.residual < 1 for node in report.nodes)


def test_settled_is_the_fraction_of_the_reachable_fall():
    nodes = (pc.NodeReport("a", "Gaussian", 1.0, 0.5, 0.1),)
    report = pc.Report(nodes, (10.0, 9.0, 8.5), 8.0, 0.1, 0.9, 0.8)
    assert report.settled == pytest.approx(0.75)
    assert "explains 15.00% of F" in report.regime
    assert pc.Report(nodes, (10.0, 10.0), 10.0, 0.0, 1.0, 1.0).settled == 1.0
    nothing = pc.Report((), (10.0, 10.0), 10.0, 0.0, 1.0, 1.0)
    assert nothing.settled == 0
    assert nothing.regime.startswith("backpropagation: the model's forward visits no free value node")
