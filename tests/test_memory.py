"""A training step leaves nothing behind, and holds no more than docs/large_runs.md says."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pc_triton as pc
from pc_triton.inference import Inference
from pc_triton.models import Transformer

WAYS = [
    {"order": "error", "steps": 1},
    {"order": "error", "steps": 2},
    {"order": "error", "steps": 2, "precision": 3.0},
    {"order": "sweep"},
    {"order": "simultaneous", "precision": 1.0},
    {"order": "simultaneous", "state_optimizer": lambda states: torch.optim.SGD(states, lr=0.1)},
]


@pytest.mark.parametrize("learns", [True, False], ids=["backward", "loss only"])
@pytest.mark.parametrize("options", WAYS, ids=map(str, range(len(WAYS))))
def test_inference_is_freed(options, learns):
    """A graph that holds its inference, and is held by it, is a cycle through C++ that Python cannot collect."""
    model = nn.Sequential(pc.Linear(4, 5), nn.Tanh(), pc.Linear(5, 5), pc.Categorical(), pc.Linear(5, 3))
    loss, inference = pc.FreeEnergy(model, **options).loss_and_inference(torch.randn(2, 4), torch.tensor([0, 2]))
    if learns:
        loss.backward()
    alive = weakref.ref(inference)
    del loss, inference
    gc.collect()
    assert alive() is None


def test_incremental_inference_is_freed():
    model = nn.Sequential(pc.Linear(4, 5), nn.Tanh(), pc.Linear(5, 3))
    free_energy = pc.FreeEnergy(model, order="incremental")
    before = sum(type(o) is pc.free_energy.Inference for o in gc.get_objects())
    for loss in free_energy.incremental(torch.randn(2, 4), torch.tensor([0, 2])):
        loss.backward()
    del loss
    gc.collect()
    assert sum(type(o) is pc.free_energy.Inference for o in gc.get_objects()) == before


def held(blocks, width, tokens, heads, *, order=None, state=True, **options):
    """Values per token that a transformer's training step holds as its backward pass begins, but for parameters."""
    model = Transformer(50, width, heads, blocks, tokens, attention=state)
    x, y = torch.randint(50, (2, 2, tokens))
    storages = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        if order is None:
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        else:
            free_energy = pc.FreeEnergy(model, order=order, **options)
            inference = Inference(free_energy, x, y)
            free_energy.settle(inference, free_energy.moves)
            storages.clear()  # the passes before have freed theirs
            loss = inference.learn()
            for node in inference.nodes:
                for t in (node.state, node.accepted, node.mu, node.emission):
                    if t is not None:
                        keep(t)
    assert loss.requires_grad
    for p in model.parameters():
        storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(s.nbytes() for s in storages.values()) / (4 * x.numel())


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, lambda d, n, h: 16 * d + h + 4),
        ({"order": "error"}, lambda d, n, h: 28 * d + 3 * h * n + 4),
        ({"order": "error", "steps": 4}, lambda d, n, h: 34 * d + 4 * h * n + 4),
        ({"order": "error", "state_dtype": torch.bfloat16}, lambda d, n, h: 25 * d + 2.5 * h * n + 4),
        ({"order": "error", "state_dtype": torch.bfloat16, "steps": 4}, lambda d, n, h: 28 * d + 3 * h * n + 4),
        ({"order": "sweep"}, lambda d, n, h: 29 * d + 4 * h * n + 4),
        ({"order": "simultaneous"}, lambda d, n, h: 29 * d + 4 * h * n + 4),
        ({"order": "error", "state": False}, lambda d, n, h: 28 * d + h + 4),
        ({"order": "error", "steps": 4, "state": False}, lambda d, n, h: 34 * d + h + 4),
        ({"order": "sweep", "state": False}, lambda d, n, h: 30 * d + h + 4),
    ],
)
def test_what_a_block_holds(options, formula):
    """The formulas of docs/large_runs.md, exactly."""
    for size in ((32, 16, 2), (64, 16, 2), (32, 32, 2), (32, 16, 4)):
        assert held(2, *size, **options) - held(1, *size, **options) == formula(*size)
