"""The move of T = 2 by the kernels: no state is made of it, and the weights learn what they learn from one that is."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from test_kernels import ON_CPU, ON_GPU, double, poison, spots  # noqa: F401
from torch import nn

import pc_triton as pc
from pc_triton import orders, reference
from pc_triton.dispatch import use_backend
from pc_triton.kernels import gaussian, laplace
from pc_triton.node import Node
from pc_triton.passes import ModelPass


@pytest.fixture(params=[pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", marks=ON_GPU)])
def device(request) -> str:
    return request.param


@pytest.fixture(params=spots(torch.float32, torch.float16, torch.bfloat16))
def spot(request) -> tuple[str, torch.dtype]:
    return request.param


def network(device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    attends = pc.Attention(8, 2)
    model = nn.Sequential(pc.Linear(8, 8), nn.Tanh(), attends, pc.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    return model.to(device), torch.randn(4, 5, 8, device=device), torch.randint(3, (4, 5), device=device)


def learn(free_energy: pc.FreeEnergy, x, y) -> list[torch.Tensor]:
    with use_backend("triton"):
        loss = free_energy(x, y)
        return [loss.detach(), *torch.autograd.grad(loss, list(free_energy.model.parameters()))]


@pytest.fixture
def states(monkeypatch) -> list[Node]:
    """The nodes whose states are made, each time."""
    made: list[Node] = []
    step = Node.step
    monkeypatch.setattr(Node, "step", lambda self, *args, **given: made.append(self) or step(self, *args, **given))
    return made


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 7, 33), (6, 2, 1025), (2, 0)], ids=str)
def test_kernel(shape, spot):
    """The kernel's forward at the state that its step would make, whose emission has the same bits; and the oracle."""
    device, dtype = spot
    torch.manual_seed(0)
    mu, grad = torch.randn(2, *shape, device=device).to(dtype)
    pi, move = torch.rand(2, shape[0], device=device) + 0.25
    state, _ = gaussian.gaussian_step(mu, None, grad, pi, move, move, form="error")
    wanted = gaussian.gaussian_forward(mu, state, pi, form="error")
    found = gaussian.gaussian_forward(mu, grad, pi, form="error", move=move)
    truth = reference.gaussian_forward(*map(double, (mu, grad, pi)), form="error", move=double(move))
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=0)  # short rows may be summed in another order
    for a, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), exact, rtol=2 * torch.finfo(a.dtype).eps, atol=1e-5)


def test_gradients_of_any_layout(device):
    mu, pi, move = torch.randn(4, 6, 8, device=device), torch.ones(4, device=device), torch.rand(4, device=device)
    wide = torch.randn(4, 6, 16, device=device)
    for grad in (wide[..., ::2], wide[..., 8:], wide[:, :1, 8:].expand(4, 6, 8), wide[..., :8].mT.contiguous().mT):
        found = gaussian.gaussian_forward(mu, grad, pi, form="error", move=move)
        wanted = gaussian.gaussian_forward(mu, grad.contiguous(), pi, form="error", move=move)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"form": "state"}, ValueError, "move is for the error form"),
        ({"move": torch.ones(3)}, ValueError, "move has shape"),
        ({"move": torch.ones(2).half()}, TypeError, "move is float16: cast it to float32"),
        ({"state": torch.zeros(2, 4)}, ValueError, "grad has shape"),
        ({"state": torch.zeros(2, 3).double()}, TypeError, "grad is float64"),
    ],
)
def test_wrong_arguments(changes, error, text):
    given = {"mu": torch.zeros(2, 3), "state": torch.zeros(2, 3), "precision": torch.ones(2), "move": torch.ones(2)}
    with pytest.raises(error, match=text):
        gaussian.gaussian_forward(**(given | {"form": "error"} | changes))


def test_not_for_a_family_that_bends():
    x, pi = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="whose step is linear"):
        laplace.forward(laplace.LAPLACE, x, x, pi, form="error", move=pi)


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"precision": 0.5}], ids=str)
def test_no_state_is_made_and_the_same_is_learnt(options, device, states, monkeypatch):
    """As from a state; but for the rounding of one in bfloat16."""
    model, x, y = network(device)
    free_energy = pc.FreeEnergy(model, **options)
    learn(free_energy, x, y)  # a first batch corrects its step
    tracked = copy.deepcopy(free_energy.tracker.state_dict())
    states.clear()
    found = learn(free_energy, x, y)
    assert not [node for node in states if type(node.family) is pc.Gaussian]
    free_energy.tracker.load_state_dict(tracked)
    monkeypatch.setattr(orders, "Gaussian", type(None))  # no family is one
    wanted = learn(free_energy, x, y)
    assert [node for node in states if type(node.family) is pc.Gaussian]
    bits = torch.finfo(torch.bfloat16 if "state_dtype" in options else torch.float32).eps
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=bits, atol=bits * float(b.abs().max()))


def test_who_asks_for_the_state_gets_it(device, states):
    """The state that `begin` makes, of the dtype asked for; once, and the learning pass then reads it."""
    model, x, y = network(device)
    made = []
    for dtype in (None, torch.bfloat16):
        free_energy = pc.FreeEnergy(model, step=0.5, state_dtype=dtype)
        with use_backend("triton"):
            settled = free_energy.batch(x, y)
            free_energy.settle(settled, 1)
            node = next(node for node in settled.nodes if type(node.family) is pc.Gaussian and node.is_free)
            assert node.only_move is not None
            energy = settled.learn().detach()
            states.clear()
            first = node.state
            assert node.state is first
            assert states == [node]
            assert node.only_move is None
            again = settled.learn().detach()
        assert first is not None
        assert first.dtype == (dtype or torch.float32)
        torch.testing.assert_close(again, energy, rtol=1e-6 if dtype is None else 1e-3, atol=0)
        made.append(first)
    torch.testing.assert_close(made[1].float(), made[0], rtol=2**-7, atol=0)  # the interpreter cuts where a GPU rounds


@pytest.mark.parametrize("steps", [1, 3])
def test_with_more_moves_or_none_nothing_changes(steps, device, states):
    model, x, y = network(device)
    free_energy = pc.FreeEnergy(model, steps=steps)
    for _ in range(2):
        learn(free_energy, x, y)
    assert bool([node for node in states if type(node.family) is pc.Gaussian]) is (steps > 1)


@pytest.mark.parametrize("options", [{}, {"local": True}, {"steps": 3}, {"order": "sweep"}], ids=str)
def test_a_loss_keeps_no_node(options, device, monkeypatch):
    """Its graph has what its backward reads, and nothing of that afterwards: a loop holds it through the next batch."""
    model, x, y = network(device)
    made: list[weakref.ref] = []
    new = ModelPass._new_node
    monkeypatch.setattr(ModelPass, "_new_node", lambda *given: made.append(weakref.ref(n := new(*given))) or n)
    saved: list[weakref.ref] = []

    def keep(tensor):
        tensor = tensor.detach()
        saved.append(weakref.ref(tensor))
        return tensor

    free_energy = pc.FreeEnergy(model, **options)
    learn(free_energy, x, y)
    made.clear()
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = free_energy(x, y)
        gc.collect()
        assert made
        assert not [node for node in made if node() is not None]
        assert [tensor for tensor in saved if tensor() is not None]
        loss.backward()
        assert not [tensor for tensor in saved if tensor() is not None]


def with_other_precisions(batch, rules, moves, start):
    steps, _ = orders.begin_errors(batch, rules, 1, start)
    for node in batch.nodes:
        node.precision = 3 * node.precision
    return steps


def with_precisions_changed_in_place(batch, rules, moves, start):
    steps, _ = orders.begin_errors(batch, rules, 1, start)
    for node in batch.nodes:
        node.precision.mul_(3)
    return steps


class Reusing(pc.Constant):
    """Writes over its own step once the moves are made."""

    def finish(self, nodes, look):
        self.step.zero_()


@pytest.mark.parametrize(
    "options",
    [
        {"order": pc.Order(with_other_precisions, "error"), "step": 0.5},
        {"order": pc.Order(with_precisions_changed_in_place, "error"), "step": 0.5},
        {"step": Reusing(0.5)},
    ],
    ids=["precision", "precision in place", "step in place"],
)
def test_what_an_order_or_a_rule_changes_after_the_move_does_not_change_the_move(options, device):
    model, x, y = network(device)
    found = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            loss = pc.FreeEnergy(model, **options)(x, y)
            found.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_is_reported_is_what_plain_torch_reports(device):
    model, x, y = network(device)
    found = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            found.append(pc.FreeEnergy(model).report(x, y).free_energies)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
