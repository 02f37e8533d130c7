"""A training step leaves nothing behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import pc_triton as pc

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
