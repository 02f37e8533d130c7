"""What people's own training loops put round `FreeEnergy`, or into the model: right, or refused by name."""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

import pc_triton as pc
from pc_triton.context import infers, pass_here

WAYS = [
    {"steps": 1},
    {"steps": 4},
    {"steps": 3, "precision": 2.0},
    {"order": "sweep"},
    {"order": "simultaneous", "precision": 2.0},
    {"order": "incremental"},
    {"state_optimizer": lambda states: torch.optim.SGD(states, lr=0.3)},
]
ways = pytest.mark.parametrize("options", WAYS, ids=range(len(WAYS)))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(pc.Linear(5, 8), nn.Tanh(), pc.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=g), torch.randint(3, (6,), generator=g)


# Checkpoints.


class Block(nn.Module):
    """Two value nodes of a width, one with noise, and what a pass adds, draws and keeps beside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.norm = pc.Linear(width, 2 * width), pc.Linear(width, width), nn.LayerNorm(width)
        self.sample, self.dropout = pc.GaussianLogVar(), nn.Dropout(0.3)

    def forward(self, x):
        h = self.b(self.sample(self.a(self.norm(x))).tanh())
        pc.add_energy(0.01 * h.square())
        return x + self.dropout(h)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, **options) -> None:
        super().__init__()
        self.block, self.options = block, {"use_reentrant": False, "context_fn": pc.checkpoint_contexts, **options}

    def forward(self, x):
        return checkpoint(self.block, x, **self.options)


def deep(wrap=lambda block: block) -> nn.Sequential:
    torch.manual_seed(0)
    outer = nn.Sequential(Block(5), wrap(Block(5)))  # a checkpoint in a checkpoint
    return nn.Sequential(wrap(Block(5)), nn.Tanh(), wrap(outer), wrap(pc.Head(5, 3)))


def learned(model: nn.Module, options: dict) -> list[torch.Tensor]:
    """The loss or losses of a batch, and the gradients."""
    torch.manual_seed(2)
    free_energy, (x, y) = pc.FreeEnergy(model, **options), batch()
    model.zero_grad()
    losses = list(free_energy.incremental(x, y)) if free_energy.order == "incremental" else [free_energy(x, y)]
    losses[-1].backward()
    return [loss.detach() for loss in losses] + [p.grad for p in model.parameters()]


@ways
def test_a_checkpoint_changes_nothing(options):
    plain, checkpointed = deep(), deep(Checkpointed)
    for a, b in zip(learned(checkpointed, options), learned(plain, options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    x, y = batch()
    for model in (plain, checkpointed):
        torch.manual_seed(2)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()  # as backpropagation does, outside inference
    for a, b in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("order", ["error", "sweep"])
def test_checkpoints_of_two_calls_in_one_backward(order):
    """Each is computed again under its own states; and a graph that is kept, once more."""
    x, y = batch()
    found = []
    for wrap in (lambda block: block, Checkpointed):
        model = deep(wrap).eval()
        free_energy = pc.FreeEnergy(model, order=order)
        loss = free_energy(x, y) + free_energy(x.flip(0), y)
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters()]
        loss.backward()
        for p, g in zip(model.parameters(), once):
            torch.testing.assert_close(p.grad, 2 * g)
        found.append(once)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_is_freed():
    loss, inference = pc.FreeEnergy(deep(Checkpointed)).loss_and_batch(*batch())
    loss.backward()
    alive = weakref.ref(inference)
    del loss, inference
    gc.collect()
    assert alive() is None


def test_a_checkpoint_computes_again_what_lies_between_nodes():
    """In the backward pass of each of the T passes, and not the nodes' energies alone."""
    model, calls = deep(Checkpointed), []
    model[0].block.norm.register_forward_hook(lambda *_: calls.append(0))
    pc.FreeEnergy(model, steps=3)(*batch()).backward()
    assert len(calls) == 2 * 3


@ways
@pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_other_checkpoints_are_refused(reentrant, options):
    model = deep(lambda block: Checkpointed(block, context_fn=noop_context_fn, use_reentrant=reentrant))
    message = "use_reentrant=False" if reentrant else "context_fn=pc_triton.checkpoint_contexts"
    if not reentrant and not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        message = "torch.utils.checkpoint"  # before torch 2.8 its own refusal, without the remedy
    with pytest.raises(RuntimeError, match=message):
        learned(model, options)


def test_a_checkpoint_in_a_compiled_model_is_refused():
    model = deep(Checkpointed)
    model[1].compile(backend="eager")
    with pytest.raises(RuntimeError, match="the one or the other"):
        pc.FreeEnergy(model)(*batch())


# Modes, exceptions, saved tensors.


def test_a_node_without_gradients_is_refused():
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = pc.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.below(x)
            return self.above(x)

    with pytest.raises(RuntimeError, match=r"node 'below' lies within torch.no_grad\(\)"):
        pc.FreeEnergy(Features())(*batch())


def test_inference_mode(monkeypatch):
    """As Lightning evaluates: with a batch made in it too."""
    monkeypatch.setattr(sys.modules["pc_triton.report"], "LONG_RUN", 4)
    free_energy, (x, y) = pc.FreeEnergy(mlp()), batch()
    wanted = free_energy(x, y).detach(), free_energy.infer(x, y).free_energy, free_energy.report(x, y)
    with torch.inference_mode():
        x, y = x.clone(), y.clone()
        loss, settled, report = free_energy(x, y), free_energy.infer({"input": x}, y), free_energy.report(x, y)
    assert not loss.requires_grad
    torch.testing.assert_close((loss, settled.free_energy), wanted[:2])
    assert report == wanted[2]


@ways
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_exception_in_the_models_forward(options, failing):
    """It passes through; no inference stays under way, and the next call is right."""

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.passes, self.failing = mlp(), 0, 0

        def forward(self, x):
            self.passes += 1
            x = self.layers[:3](x)
            if self.passes == self.failing:
                raise KeyError("mine")
            return self.layers[3:](x)

    model = Fails()
    wanted = learned(model, options)
    model.passes, model.failing = 0, failing
    if options != {"steps": 1} or failing == 1:
        with pytest.raises(KeyError, match="mine"):
            learned(model, options)
    assert pass_here() is None
    assert not infers()
    model.failing = 0
    for a, b in zip(learned(model, options), wanted, strict=True):
        torch.testing.assert_close(a, b)


@ways
def test_saved_tensors_on_the_cpu(options):
    """Offloading, exactly."""
    wanted = learned(mlp(), options)
    with torch.autograd.graph.save_on_cpu():
        found = learned(mlp(), options)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("order", ["error", "sweep"])
def test_float16_with_a_grad_scaler(order):
    """It changes gradients by no more than float16's rounding; a scale too large skips its step."""
    model, (x, y) = mlp(), batch()

    def half_loss():
        with torch.autocast("cpu", torch.float16):
            return pc.FreeEnergy(model, order=order)(x, y)

    half_loss().backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = copy.deepcopy(model.state_dict())
    skipped = 0
    while True:
        optimizer.zero_grad()
        scaler.scale(half_loss()).backward()
        scaler.unscale_(optimizer)
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        scaler.step(optimizer)
        scaler.update()
        if found.isfinite().all():
            break
        skipped += 1
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert skipped > 0
    assert scaler.get_scale() == 2.0 ** (30 - skipped)
    assert (found - wanted).norm() < 2**-10 * wanted.norm()
    assert not torch.equal(model[0].weight, before["0.weight"])
