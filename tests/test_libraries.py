"""The numbers of other libraries of predictive coding, on the same weights and data, in float64.

tests/data/libraries.json has them, with the library's version, the settings, and in words how each was recorded.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_inference import gradients
from test_methods import said
from torch import nn

import pc_triton as pc

D = torch.float64
FILE = json.loads((Path(__file__).parent / "data" / "libraries.json").read_text(encoding="utf-8"))


def records(library: str, **chosen: object) -> list[object]:
    """The library's records whose settings are those chosen, as parameters of a test."""
    found = [r for r in FILE["libraries"][library]["records"] if all(r.get(k) == v for k, v in chosen.items())]
    assert found
    return [pytest.param(record, id=record["case"]) for record in found]


def data(record: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """x and what the output is clamped to: values, or labels."""
    network = FILE["networks"][record["network"]]
    y = torch.tensor(network["y"], dtype=D) if record["loss"] == "mse" else torch.tensor(network["labels"])
    return torch.tensor(network["x"], dtype=D), y


def load(model: nn.Module, record: dict) -> nn.Module:
    """Put the record's weights, and its biases if it has any, into the linear layers of ``model``."""
    network = FILE["networks"][record["network"]]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, weight in zip(layers, network["weights"], strict=True):
            layer.weight.copy_(torch.tensor(weight, dtype=D))
        for layer, bias in zip(layers, network.get("biases", []), strict=False):
            layer.bias.copy_(torch.tensor(bias, dtype=D))
    return model


def mlp(record: dict, node: type[nn.Module] = pc.Gaussian) -> nn.Sequential:
    """3-5-4-2, tanh, with a node on each hidden layer before its activation."""
    hidden = [nn.Linear(3, 5), node(), nn.Tanh(), nn.Linear(5, 4), node(), nn.Tanh()]
    return load(nn.Sequential(*hidden, nn.Linear(4, 2)).double(), record)


def mlp_after(record: dict) -> nn.Sequential:
    """The same layers, with each node after its activation."""
    hidden = [nn.Linear(3, 5), nn.Tanh(), pc.Gaussian(), nn.Linear(5, 4), nn.Tanh(), pc.Gaussian()]
    return load(nn.Sequential(*hidden, nn.Linear(4, 2)).double(), record)


def theirs(record: dict, weights: str = "weight_gradients", biases: str = "bias_gradients") -> list[list]:
    """Their gradients in the order of ours: weight and bias of each layer."""
    if record.get(biases) is None:
        return record[weights]
    return [g for pair in zip(record[weights], record[biases], strict=True) for g in pair]


def assert_same(ours, theirs, tolerance: float = 1e-10) -> None:
    """Every number within ``tolerance`` of theirs, relative to the largest of its tensor."""
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        b = torch.as_tensor(b, dtype=D)
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3)


# jpc: F per sample, so that its rate in the states is ours times the batch.


def residual(record: dict) -> nn.Module:
    """muPC's network of docs/methods.md; in the NTP the output's factor is 1 / sqrt(width), not 1 / width."""
    page = said("mupc")
    if record["skip"]:
        model = page.mupc(3, 5, 2, depth=4)
    else:  # jpc has the depth in its factors without skip connections too
        scales = 3**-0.5, 20**-0.5, 20**-0.5, 1 / 5
        first, *others = (page.Scaled(m, n, s) for m, n, s in zip((3, 5, 5, 5), (5, 5, 5, 2), scales))
        model = nn.Sequential(first)
        for layer in others:
            model.extend([pc.Gaussian(), nn.Tanh(), layer])
    if record["param_type"] == "ntp":
        model[-1].scale = 5**-0.5
    return load(model.double(), record)


@pytest.mark.parametrize("record", [p for p in records("jpc") if p.values[0]["case"] != "bidirectional"])
def test_jpc(record):
    """Activities, F of the whole and of each layer, and gradients: standard, muPC and NTP parametrisations."""
    model = (mlp if record["param_type"] == "sp" else residual)(record)
    x, y = data(record)
    step = record["lr"] / len(x)
    options = {"order": "simultaneous", "precision": 1.0, "step": step}
    free_energy = pc.FreeEnergy(model, steps=record["steps"], **options)
    settled = free_energy.infer(x, y)
    assert_same(settled.u.values(), record["activities"])
    for steps in (1, record["steps"]):
        found = pc.FreeEnergy(model, steps=steps, **options).infer(x, y).free_energy.mean()
        assert_same([found], [record["energies"][steps]])
    last, *middle, first = record["layer_energies"]
    nodes = free_energy.record(x, y)[-1].values()
    assert_same(torch.stack([node.energy.mean() for node in nodes]), [first, *middle, last][: len(nodes)])
    loss = free_energy(x, y)
    assert_same([loss.detach()], [record["energies"][-1]])
    assert_same(gradients(model, loss), theirs(record))


def test_jpc_bidirectional():
    """F, activities and gradients, where each layer is predicted from both sides."""
    record = records("jpc", case="bidirectional")[0].values[0]
    model = load(said("Bidirectional").Bidirectional(3, 5, 2).double(), record)
    x, y = data(record)
    step = record["lr"] / len(x)
    free_energy = pc.FreeEnergy(model, order="simultaneous", precision=1.0, step=step, steps=record["steps"])
    settled = free_energy.infer((x, y), y)
    assert_same(settled.u.values(), record["activities"])
    loss = free_energy((x, y), y)
    assert_same([loss.detach()], [record["energies"][-1]])
    assert_same(gradients(model, loss), theirs(record))


# Torch2PC: everything is summed over the batch, and the errors that it learns from are those before its last move.


def chain_predictions(model: nn.Sequential, x: torch.Tensor, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """The predictions of the two hidden nodes and the output, each from the state below; ``model`` is an `mlp`."""
    lower, upper = states
    return [model[0](x), model[3](lower.tanh()), model[6](upper.tanh())]


@pytest.mark.parametrize("record", records("torch2pc", kind="Modified"))
def test_torch2pc_with_fixed_predictions(record):
    """Beliefs, errors and gradients of FixedPred, settled and not."""
    model = mlp(record, said("FixedPrediction").FixedPrediction)
    x, y = data(record)
    options = {"order": "simultaneous", "precision": 1.0, "step": float(record["eta"])}
    beliefs = pc.FreeEnergy(model, steps=record["steps"], **options).infer(x, y).u
    assert_same(beliefs.values(), record["beliefs"])
    free_energy = pc.FreeEnergy(model, steps=record["steps"] - 1, **options)
    with torch.no_grad():
        lower = model[0](x)
        forward = lower, model[3](lower.tanh())
    errors = [mu - u for mu, u in zip(forward, free_energy.infer(x, y).u.values())]
    assert_same(errors, record["errors"][:2])
    assert_same([len(x) * g for g in gradients(model, free_energy(x, y))], theirs(record))


@pytest.mark.parametrize("record", records("torch2pc", kind="Exact"))
def test_torch2pc_exact(record):
    """T = 1 in error order is backpropagation."""
    model = mlp(record)
    x, y = data(record)
    loss = pc.FreeEnergy(model, steps=1)(x, y)
    assert_same([len(x) * loss.detach()], [record["loss_value"]])
    assert_same([len(x) * g for g in gradients(model, loss)], theirs(record))


@pytest.mark.parametrize("record", records("torch2pc", kind="Strict"))
def test_torch2pc_strict(record):
    """This version's beliefs move up the loss: the output's weight is -1. It learns at the forward pass's inputs."""
    model = mlp(record)
    x, y = data(record)
    options = {"order": "simultaneous", "precision": 1.0, "step": record["eta"], "output_weight": -1.0}

    def states(steps: int) -> list[torch.Tensor]:
        return list(pc.FreeEnergy(model, steps=steps, **options).infer(x, y).u.values())

    assert_same(states(record["steps"]), record["beliefs"])
    before = states(record["steps"] - 1)
    with torch.no_grad():
        *predicted, _ = chain_predictions(model, x, before)
        lower = model[0](x)
        at_forward = [lower, model[3](lower.tanh())]
    output = chain_predictions(model, x, before)[-1]
    loss = 0.5 * (output - y).square().sum() if record["loss"] == "mse" else F.cross_entropy(output, y, reduction="sum")
    errors = [u - mu for u, mu in zip(before, predicted)] + [torch.autograd.grad(loss, output)[0]]
    assert_same(errors, record["errors"])
    learned = torch.autograd.grad(chain_predictions(model, x, at_forward), list(model.parameters()), errors)
    assert_same(learned, theirs(record))


# PCX: F is summed over the batch. Its nudging clamps the output to a target on the way from the prediction to y.


@pytest.mark.parametrize("record", [p for p in records("pcx") if "beta" in p.values[0]])
def test_pcx(record):
    """Target, activities, F and gradients: sPC, and with positive and negative nudging."""
    model = mlp(record)
    x, y = data(record)
    if record["loss"] == "mse":
        y = said("nudged_target").nudged_target(model, x, y, record["beta"])
        assert_same([y], [record["target"]])
    options = {"order": "simultaneous", "precision": 1.0, "step": record["lr"]}
    settled = pc.FreeEnergy(model, steps=record["steps"], **options).infer(x, y)
    assert_same(settled.u.values(), record["activities"])
    for steps in (1, record["steps"]):
        found = pc.FreeEnergy(model, steps=steps, **options).infer(x, y).free_energy.sum()
        assert_same([found], [record["energies"][steps]])
    loss = pc.FreeEnergy(model, steps=record["steps"], **options)(x, y)
    assert_same([len(x) * g for g in gradients(model, loss)], theirs(record))


def test_pcx_centred_nudging():
    """The mean of both signs' gradients over beta, theirs and ours."""
    positive, negative = (records("pcx", beta=beta)[0].values[0] for beta in (0.3, -0.3))
    model = mlp(positive)
    x, y = data(positive)
    options = {"order": "simultaneous", "precision": 1.0, "step": 0.1, "steps": 8}
    both = []
    for beta in (0.3, -0.3):
        target = said("nudged_target").nudged_target(model, x, y, beta)
        both.append([g / beta for g in gradients(model, pc.FreeEnergy(model, **options)(x, target))])
    pairs = zip(theirs(positive), theirs(negative))
    recorded = [torch.tensor(p, dtype=D).sub(torch.tensor(n, dtype=D)) / (0.6 * len(x)) for p, n in pairs]
    assert_same([(p + n) / 2 for p, n in zip(*both)], recorded)


@pytest.mark.parametrize("record", [p for p in records("pcx") if p.values[0]["case"].startswith("iPC")])
def test_pcx_incremental(record):
    """iPC: F at each step, and the weights after the last."""
    model = mlp(record)
    x, y = data(record)
    options = {"precision": 1.0, "step": record["lr"], "steps": record["steps"]}
    free_energy = pc.FreeEnergy(model, order="incremental", **options)
    optimizer = torch.optim.SGD(model.parameters(), record["weight_lr"])
    energies = []
    for loss in free_energy.incremental(x, y):
        energies.append(len(x) * loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same([torch.stack(energies)], [record["energies"]])
    assert_same(model.parameters(), theirs(record, "weights", "biases"))


def test_pcx_trains_with_centred_nudging():
    """Six updates whose nudging changes its sign: F in each, and the weights after the last."""
    record = records("pcx", case="training with centred nudging")[0].values[0]
    model = mlp(record)
    x, y = data(record)
    free_energy = pc.FreeEnergy(model, order="simultaneous", precision=1.0, step=record["lr"], steps=record["steps"])
    optimizer = torch.optim.SGD(model.parameters(), record["weight_lr"])
    energies = []
    for beta in record["betas"]:
        loss = free_energy(x, said("nudged_target").nudged_target(model, x, y, beta))
        energies.append(len(x) * loss.detach())
        optimizer.zero_grad()
        (loss / beta).backward()
        optimizer.step()
    assert_same([torch.stack(energies)], [record["energies"]])
    assert_same(model.parameters(), theirs(record, "weights", "biases"))


def test_pcx_recalls_the_same_pixels():
    """Settled: of a decoder whose latent state has no energy, that state, F, and the pixels that were not seen."""
    record = records("pcx", case="recall of masked pixels")[0].values[0]

    class Free(pc.Distribution):
        def energy(self, u, mu):
            return 0.0 * (u - mu)

    hidden = [nn.Linear(2, 5), nn.Tanh(), pc.Gaussian(), nn.Linear(5, 4), nn.Tanh(), pc.Gaussian()]
    model = load(nn.Sequential(Free(), *hidden, nn.Linear(4, 6)).double(), record)
    x, y = data(record)
    seen = (torch.arange(6) < record["seen"]).expand_as(y)
    momentum = {"state_optimizer": lambda states: torch.optim.SGD(states, lr=0.2, momentum=0.9)}
    free_energy = pc.FreeEnergy(model, precision=1.0, order="simultaneous", steps=600, **momentum)

    def zeros(predictions):
        return {name: torch.zeros_like(mu) for name, mu in predictions.items()}

    settled = free_energy.infer(x, y, mask=seen, start=zeros)
    assert_same([settled.u["0"]], [record["latent"]], 1e-6)
    assert_same([torch.where(seen, y, settled.output)], [record["recalled"]], 1e-6)
    assert_same([settled.free_energy.sum()], [record["energies"][-1]], 1e-6)


# FabricPC: F and gradients per sample, nodes after their activations; in state order F is that before its last move.


@pytest.mark.parametrize("record", records("fabricpc"))
def test_fabricpc(record):
    """Activities, errors, F and local gradients, of its state and error orders."""
    model = mlp_after(record)
    x, y = data(record)
    order = {"sPC": "simultaneous", "ePC": "error"}[record["kind"]]
    options = {"order": order, "precision": 1.0, "step": record["lr"]}
    moves = record["steps"]
    settled = pc.FreeEnergy(model, steps=moves, **options).infer(x, y)
    assert_same(settled.u.values(), record["activities"])
    before = moves - (order == "simultaneous")
    energy = pc.FreeEnergy(model, steps=before, **options).infer(x, y).free_energy.mean()
    assert_same([energy], [record["energy"]])
    steps = moves + (order == "error")
    loss = pc.FreeEnergy(model, steps=steps, local=True, **options)(x, y)
    assert_same(gradients(model, loss), theirs(record))


# ePC of Goemaere et al.: the loss is the mean over the batch, divided by min(1, rate * steps).


@pytest.mark.parametrize("record", records("pce"))
def test_error_order_of_its_authors(record):
    """Errors, F, their loss, and the gradients of E_local: ``local=True``, over their scale."""
    model = mlp(record)
    x, y = data(record)
    options = {"order": "error", "precision": 1.0, "step": record["lr"]}
    free_energy = pc.FreeEnergy(model, steps=record["steps"] + 1, local=True, **options)
    settled = pc.FreeEnergy(model, steps=record["steps"], **options).infer(x, y)
    states = list(settled.u.values())
    with torch.no_grad():
        predicted = [model[0](x), model[3](states[0].tanh())]
    assert_same([u - mu for u, mu in zip(states, predicted)], record["errors"])
    assert_same([settled.free_energy.sum()] * 2, [record["E"], record["E_local"]])
    loss = free_energy(x, y) / record["energy_scale"]
    assert_same([loss.detach()], [record["training_loss"]])
    assert_same(gradients(model, loss), theirs(record))


# Deepity, in float32: nodes after their activations; learns from errors before the last move, at the states after it.


@pytest.mark.parametrize("record", records("deepity"))
def test_deepity_direct_kolen_pollack(record):
    """Activities, weights and feedback after a batch. In inference its first layer is as before the direct update."""
    hidden = [nn.Sequential(nn.Linear(m, n), nn.Tanh(), pc.Gaussian()) for m, n in ((3, 5), (5, 4))]
    model = load(nn.Sequential(*hidden, nn.Linear(4, 2)).double(), record)
    x, y = data(record)
    feedback, rate = [torch.tensor(matrix, dtype=D) for matrix in record["feedback"]], record["feedback_lr"]
    first = model[0][0].weight
    old = first.detach().clone()
    start = said("direct_update").direct_update(model, feedback, x, y, rate)
    direct = first.detach() - old
    with torch.no_grad():
        first.copy_(old)

    def states(steps: int) -> list[torch.Tensor]:
        options = {"order": "simultaneous", "precision": 1.0, "step": record["lr"]}
        free_energy = pc.FreeEnergy(model, steps=steps, **options)
        return list(free_energy.infer(x, y, start=lambda predictions: dict(zip(predictions, start))).u.values())

    settled = states(record["steps"])
    before = states(record["steps"] - 1) if record["steps"] > 1 else start
    assert_same(settled, record["activities"], 1e-6)
    with torch.no_grad():
        predicted = [part(below) for part, below in zip(model, [x, *before])]
        first += direct
    errors = [u - mu for u, mu in zip([*before, y], predicted)]
    deltas = [e * (1 - mu**2) for e, mu in zip(errors[:2], predicted)] + errors[2:]
    learned = [g for delta, below in zip(deltas, [x, *settled]) for g in (delta.T @ below, delta.sum(0))]
    after = [p.detach() + record["weight_lr"] / len(x) * g for p, g in zip(model.parameters(), learned)]
    assert_same(after, theirs(record, "weights", "biases"), 1e-6)
    feedback = [matrix + rate / len(x) * u.T @ errors[-1] for matrix, u in zip(feedback, settled)]
    assert_same(feedback, record["feedback_after"], 1e-6)
