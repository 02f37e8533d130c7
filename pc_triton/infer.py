"""Inference alone: where the states of a batch end, and what the model then shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import parallel
from .batch import Batch
from .rules import Constant, Guarded


class Settled(NamedTuple):
    """What `FreeEnergy.infer` returns."""

    input: Any
    """The model's input: as given, or where it was free its inferred values, a tensor of x's shape."""
    output: Tensor
    """What the model returns under the inferred states: the logits or parameters, where the output is clamped."""
    free_energy: Tensor
    """F per sample ``[S]`` in nats."""
    states: dict[str, Tensor]
    """What each free node emits, by its name in the model (a module visited again has ``#2`` added)."""
    u: dict[str, Tensor]
    """The state u of each free node, as ``start=`` takes it: the logits of a Categorical or Bernoulli."""


def infer(batch: Batch, settle: Callable[[], Constant]) -> Settled:
    """Move the states of a batch by ``settle``, which returns its step rule, and look at where they are."""
    steps = settle()
    energy = batch.probe()
    if isinstance(steps, Guarded):  # no later move could take back the last one
        rose = steps.take_back(batch.nodes, energy)
        if rose or parallel.together():  # all processes make the same passes
            energy = batch.probe()
    nodes = batch.named_nodes()
    states = {name: node.emission.detach() for name, node in nodes.items() if node.emission is not None}
    u = {name: node.u for name, node in nodes.items() if node.state is not None and node.u is not None}
    clamped = batch.clamp_input
    if isinstance(clamped, Tensor):
        states["input"] = torch.where(clamped, batch.args[0], states["input"])
    x = batch.inputs if clamped is True else states["input"]
    return Settled(x, batch.out.detach(), energy, states, u)
