"""States in bfloat16: what they are kept in, that all arithmetic stays as it is, and how little it changes."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from test_grid import GRID, make
from test_inference import interpreted
from test_inference import make as make_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import pc_triton as pc
from pc_triton import reference
from pc_triton.batch import Batch
from pc_triton.dispatch import use_chain, use_fused

BF16 = torch.bfloat16
RELATIVE = 2.0**-8  # what rounding to bfloat16 may be off by
MODELS = ["mlp", "mixed", "transformer"]


def learn(model: nn.Module, x, y, **options) -> tuple[float, torch.Tensor]:
    """The loss, and all weight gradients in one vector."""
    loss = pc.FreeEnergy(model, **options)(x, y)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.item(), torch.cat([g.flatten().double() for g in grads if g is not None])


def settle(model: nn.Module, x, y, **options) -> Batch:
    """A batch with its states where learning happens."""
    free_energy = pc.FreeEnergy(model, **options)
    batch = free_energy.batch(x, y)
    free_energy.settle(batch, free_energy.moves)
    return batch


def states(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: node.state for name, node in batch.named_nodes().items() if node.state is not None}


# How little it changes.


@pytest.mark.parametrize(("grid", "steps"), [(GRID[0], 3), (GRID[2], 8), (GRID[4], 8), (GRID[6], 3)], ids=str)
def test_harmless(grid, steps):
    """F moves by less than the part of its fall that an error's rounding is of the error; the gradient likewise."""
    model, x, y = make(*grid, "cpu")
    start = pc.FreeEnergy(model, precision=1e9).infer(x, y).free_energy
    wide, narrow = (pc.FreeEnergy(model, steps=steps, state_dtype=d).infer(x, y).free_energy for d in (None, BF16))
    rounding = 32 * torch.finfo(torch.float32).eps * (start + x.shape[1])  # of F itself, as in test_grid.py
    assert ((narrow - wide).abs() <= RELATIVE * (start - wide) + rounding).all()
    assert (narrow < start).all()
    (_, plain), (_, found) = (learn(model, x, y, steps=steps, state_dtype=d) for d in (None, BF16))
    assert not torch.equal(found, plain)
    assert 1 - F.cosine_similarity(found, plain, 0) < RELATIVE**2 / 2
    assert (found - plain).norm() < RELATIVE * plain.norm()


@pytest.mark.parametrize("order", ["error", "sweep"])
def test_an_error_may_be_rounded_and_a_state_may_not(order):
    """Why bfloat16 is for errors alone: rounding u undoes much of what inference won, and spoils the gradients."""
    model, x, y = make(*GRID[6], "cpu")
    batch = settle(model, x, y, order=order, steps=4 if order == "error" else 8)
    start, parameters = batch.energies[0], list(model.parameters())
    found = []
    for _ in range(2):
        energy = batch.learn()
        grads = torch.autograd.grad(energy.sum(), parameters, materialize_grads=True)
        found.append((energy.detach(), torch.cat([g.flatten() for g in grads])))
        for node in batch.nodes:
            node.state = None if node.state is None else node.state.bfloat16().float()
    (before, grad), (after, rounded) = found
    lost, changed = (after - before).abs() / (start - before), (rounded - grad).norm() / grad.norm()
    assert (before < start).all()
    if order == "error":
        assert (lost < RELATIVE).all()
        assert changed < RELATIVE
    else:
        assert (lost > 0.2).all()
        assert changed > 0.2


def test_report():
    """The long run is in float32; the residual that is left is that of the rounded states, not its rounding."""
    model, x, y = make(*GRID[0], "cpu")
    wide, narrow = (pc.FreeEnergy(model, steps=8, state_dtype=d).report(x, y) for d in (None, BF16))
    assert narrow.long_run == pytest.approx(wide.long_run, rel=1e-6)
    assert narrow.settled > 0.99
    assert wide.residual < narrow.residual < wide.residual + RELATIVE


# What is kept, and that the same is read by all.


@pytest.mark.parametrize("steps", [2, 3, 6])
@pytest.mark.parametrize("name", MODELS)
def test_states_and_what_the_guard_keeps(name, steps):
    model, x, y = make_model(name)
    free_energy = pc.FreeEnergy(model, steps=steps, state_dtype=BF16)
    batch = free_energy.batch(x, y)
    guard = free_energy.settle(batch, free_energy.moves)
    kept = states(batch)
    assert kept
    assert all(state.dtype == BF16 for state in kept.values())
    remembered = guard.remembered or {}
    assert all(state.dtype == BF16 for state in remembered.values())
    assert (steps > 3) == bool(remembered)


def test_what_raised_f_is_taken_back():
    """A step too large, on a node of high curvature: the states go back, in their dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(4, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].weight.mul_(30)
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    free_energy = pc.FreeEnergy(model, precision=1.0, steps=8, state_dtype=BF16)
    start = pc.FreeEnergy(model, precision=1e9).infer(x, y).free_energy
    batch = free_energy.batch(x, y)
    free_energy.settle(batch, free_energy.moves)
    assert any((b > a).any() for a, b in zip(batch.energies, batch.energies[1:])), "nothing was to take back"
    assert all(state.dtype == BF16 for state in states(batch).values())
    assert (free_energy.infer(x, y).free_energy < start).all()


def test_emission_and_energy_are_of_the_error_that_is_kept():
    """In float64 arithmetic, exactly: a Gaussian emits mu + e and has the energy pi e^2 / 2 of the rounded e."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(pc.Linear(5, 8), nn.Linear(8, 3)).double(), torch.randn(6, 5).double(), None
    y = torch.randn(6, 3).double()
    batch = settle(model, x, y, precision=2.0, state_dtype=BF16)
    batch.free_energy(shows=True)  # keeps emissions
    (node,) = (n for n in batch.nodes if n.state is not None)
    assert node.state.dtype == BF16
    assert node.state.any()
    e = node.state.double()
    torch.testing.assert_close(node.emission, model[0](x).detach() + e, rtol=0, atol=1e-15)
    torch.testing.assert_close(node.energy, (e * e).sum(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("family", [pc.Gaussian(), pc.GaussianLogVar(), pc.Bernoulli(), pc.Categorical(), pc.Laplace()])
def test_a_step_computes_in_the_wide_dtype_and_rounds_once(family):
    """At states that bfloat16 holds: float64's step of these, and the new one rounded to nearest."""
    torch.manual_seed(0)
    mu, e, grad = torch.randn(3, 4, 6, dtype=torch.float64)
    e = e.bfloat16()
    frozen = family.frozen(mu)
    grad = grad[:, : family.emission(mu, **frozen).shape[1]]
    pi, keep, move = torch.rand(3, 4, dtype=torch.float64) + 0.25
    for old, options in ((e, {}), (None, {"state_dtype": BF16})):
        wide = None if old is None else old.double()
        new, to_mu = family.node_step(mu, old, grad, pi, None, keep, move, form="error", **options, **frozen)
        expected, to_mu_expected = family.node_step(mu, wide, grad, pi, None, keep, move, form="error", **frozen)
        assert expected.dtype == torch.float64
        assert torch.equal(new, expected.bfloat16())
        assert torch.equal(to_mu, to_mu_expected)
    for a, b in zip(*(family.node_forward(mu, s, pi, None, form="error", **frozen) for s in (e, e.double()))):
        assert torch.equal(a, b)


def test_attention_computes_in_the_wide_dtype():
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 2, 5, 8).bfloat16()
    e, pi = torch.randn(2, 2, 5, 5).bfloat16(), torch.ones(2)
    for state in (e, e.float()):
        out, energy, facts = reference.attention_forward(q, k, v, state, pi, scale=0.3, causal=True)
        step = reference.attention_step(q, k, v, out, grad, state, pi, pi / 3, pi, facts, scale=0.3, causal=True)
        if state is e:
            narrow = (out, energy, facts, *step)
    assert narrow[3].dtype == BF16
    wide = (out, energy, facts, step[0].bfloat16(), *step[1:])
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide))


def test_a_float64_model():
    """Its arithmetic is float64, its states what was asked for; None and float32 leave them float64."""
    model, x, y = make_model("mixed", dtype=torch.float64)
    for asked, kept in ((None, torch.float64), (torch.float32, torch.float64), (BF16, BF16)):
        batch = settle(model, x, y, state_dtype=asked)
        assert {state.dtype for state in states(batch).values()} == {kept}
        assert batch.energies[-1].dtype == torch.float64


def test_float32_is_the_default():
    model, x, y = make_model("transformer")
    (_, plain), (_, found) = (learn(model, x, y, **options) for options in ({}, {"state_dtype": torch.float32}))
    assert torch.equal(plain, found)


# The other ways of computing it.


@pytest.mark.parametrize(("name", "fused"), [("mixed", False), ("transformer", True)])
def test_the_kernels(name, fused, device):
    """Whole inference on Triton against plain torch; the interpreter truncates where a GPU rounds."""
    pytest.importorskip("triton")
    if device == "cpu" and not interpreted():
        pytest.skip("a CPU needs the interpreter")
    model, x, y = make_model(name, device, samples=2)
    with pc.use_backend("torch"):
        loss, plain = learn(model, x, y, state_dtype=BF16)
    with pc.use_backend("triton"), use_fused(fused):
        loss_, found = learn(model, x, y, state_dtype=BF16)
        kept = states(settle(model, x, y, state_dtype=BF16))
    assert all(state.dtype == BF16 for state in kept.values())
    assert loss_ == pytest.approx(loss, rel=1e-4)
    assert (found - plain).norm() < 2 * RELATIVE * plain.norm()


def test_a_chain_in_one_launch_has_its_states_on_the_chip(device):
    """In float32, whatever the states' dtype."""
    pytest.importorskip("triton")
    if device == "cpu" and not interpreted():
        pytest.skip("a CPU needs the interpreter")
    model, x, y = make_model("mlp", device, samples=2)
    with pc.use_backend("triton"), use_chain(True):
        (_, wide), (_, narrow) = (learn(model, x, y, steps=3, state_dtype=d) for d in (None, BF16))
    assert torch.equal(wide, narrow)


def test_a_compiled_model_adds_the_same_errors():
    """Where torch.compile has the model, a Gaussian node's error is a leaf: kept, emitted and paid for as in eager."""
    model, x, y = make_model("transformer")
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    (loss, plain), (loss_, found) = (learn(m, x, y, state_dtype=BF16) for m in (model, compiled))
    assert loss_ == pytest.approx(loss, rel=1e-6)
    assert (found - plain).norm() < 1e-4 * plain.norm()
    batch = settle(compiled, x, y, state_dtype=BF16)
    assert batch.in_graph
    assert all(node.state.dtype == BF16 for node in batch.in_graph)
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_compiled_step_rounds_too():
    """Inductor would leave the rounding of a state out; then the gradient were nearer to float32's states'."""
    torch.manual_seed(0)
    model = nn.Sequential(pc.Linear(6, 40), nn.Tanh(), pc.Linear(40, 30), nn.Tanh(), nn.Linear(30, 4))
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    options = {"steps": 2, "displacement": 0.1}
    (_, wide), (_, plain) = (learn(model, x, y, state_dtype=d, **options) for d in (None, BF16))
    free_energy = pc.FreeEnergy(model, state_dtype=BF16, **options)
    free_energy.compile()
    found = torch.autograd.grad(free_energy(x, y), list(model.parameters()))
    found = torch.cat([g.flatten().double() for g in found])
    assert (found - plain).norm() < 0.1 * (wide - plain).norm()


def test_activation_checkpointing():
    """A part computed again for its backward reads the same states."""

    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=False, context_fn=pc.checkpoint_contexts)

    model, x, y = make_model("mlp")
    (loss, plain), (loss_, found) = (learn(m, x, y, state_dtype=BF16) for m in (model, Checkpointed(model)))
    assert loss == loss_
    assert torch.equal(plain, found)


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": torch.float16}, "state_dtype=torch.float16: give torch.float32, torch.bfloat16 or None"),
        ({"state_dtype": "bfloat16"}, "state_dtype='bfloat16': give torch"),
        ({"state_dtype": BF16, "order": "sweep"}, "order='sweep', whose states are u: .* use order='error'"),
        ({"state_dtype": BF16, "order": "simultaneous"}, "use order='error', or float32 states"),
        ({"state_dtype": BF16, "order": "incremental"}, "use order='error', or float32 states"),
        ({"state_dtype": BF16, "state_optimizer": torch.optim.SGD}, "leave state_optimizer=None, or use float32"),
    ],
    ids=lambda of: of if isinstance(of, str) else None,
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pc.FreeEnergy(nn.Sequential(pc.Linear(4, 5), nn.Linear(5, 3)), **options)


def test_extra_repr():
    model = nn.Sequential(pc.Linear(4, 5), nn.Linear(5, 3))
    assert "state_dtype=torch.bfloat16" in repr(pc.FreeEnergy(model, state_dtype=BF16))
    assert "state_dtype" not in repr(pc.FreeEnergy(model))
