"""A value node of one batch, and what its state does with the gradient that a backward pass brings to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .arithmetic import per_sample, wide
from .distributions import Distribution

StepOf = Callable[..., tuple[Any, Any]]
"""(state, grad, keep, move, sweep) to the moved state, and what goes to the layer below."""


class AtPrediction(Protocol):
    """A node in the first pass whose prediction, and the emission, never reach memory whole."""

    @property
    def variables(self) -> float:
        """`Distribution.variables` of its prediction."""

    def fall(self, grad: Tensor, samples: int) -> Tensor:
        """The second row ``[S]`` of `Distribution.fall`. grad: F's gradient in what the kernel computes."""

    def first_step(self, grad: Tensor, precision: Tensor, move: Tensor, state_dtype: torch.dtype | None) -> Tensor:
        """The state e after the first move, from e = 0."""


class OnlyMove(NamedTuple):
    """A move of e from 0, to -(move / pi) g."""

    grad: Tensor
    """g, in the layout of a state."""
    move: Tensor
    """``[S]``."""
    state_dtype: torch.dtype | None


@dataclass(eq=False)
class Node:
    """A value node of one batch of S samples: one visit of its family's module in the model's forward."""

    family: Distribution
    name: str
    number: int
    """Its place in the order of the first pass."""
    frozen: dict[str, Any]
    """What the family holds fixed through inference: masks, noise."""
    _state: Tensor | None = None
    only_move: OnlyMove | None = None
    """Inference's only move, where no state was made of it: see `state`."""
    precision: Tensor = field(default_factory=lambda: torch.empty(0))
    """pi ``[S]``."""
    unit: Tensor | None = None
    """The node's own scale ``[S]``, in which its errors count; None for 1, or where it is in the precision already."""
    in_units: Tensor | None = None
    """The precision ``[S]`` of errors in units of the node's scale, where `precision` is that of errors as they are."""
    dtype: torch.dtype = torch.float32
    """Of the prediction and the emission."""
    mu: Tensor | None = None
    """The prediction, between the first pass and the backward pass through it; then None."""
    fused: AtPrediction | None = None
    """What stands for `mu` where a kernel takes prediction and node in one; `emission` is then what that computes."""
    u: Tensor | None = None
    """The state u, kept by a pass that shows its nodes."""
    emission: Tensor | None = None
    """What its children see; kept where `mu` is, and by a pass that shows its nodes."""
    energy: Tensor | None = None
    """``[S]``, of the last pass that shows its nodes."""
    residual: Tensor | None = None
    """The norm ``[S]`` of the natural gradient at the last probe."""
    displaced: bool = False
    """Whether it has left its prediction."""

    @property
    def state(self) -> Tensor | None:
        """u, or e = u - mu in error order. None: the node stays at its prediction.

        After a Gaussian's only move e is -(move / pi) g, which the learning pass computes where it reads g: no state is
        made but for another reader, when it asks.
        """
        if self.only_move is not None:
            grad, move, dtype = self.only_move
            self.state, _ = self.step(grad, None, grad, move, move, form="error", state_dtype=dtype)  # it reads no mu
        return self._state

    @state.setter
    def state(self, state: Tensor | None) -> None:
        self._state, self.only_move = state, None

    @property
    def is_free(self) -> bool:
        """Whether it has a state; asking makes none."""
        return self._state is not None or self.only_move is not None

    def without_state(self) -> Node:
        """The same node, for a graph that is not to keep the state."""
        return replace(self, _state=None, only_move=None)

    def measure(self, grad: Tensor, samples: int) -> Tensor:
        """`Distribution.fall` ``[2, S]`` at the prediction, for F's gradient in the emission."""
        if self.fused is not None:
            fall = self.fused.fall(grad, samples)
            return torch.stack([torch.ones_like(fall), fall])
        assert self.mu is not None
        return self.family.fall(self.mu, grad, samples, **self.frozen)

    @property
    def variables(self) -> float:
        """How many variables it is the state of, at the prediction: see `Distribution.variables`."""
        if self.fused is not None:
            return self.fused.variables
        assert self.mu is not None
        return self.family.variables(self.mu)

    def begin(self, grad: Tensor, keep: Tensor, move: Tensor, state_dtype: torch.dtype | None) -> None:
        """Make the first move, from e = 0 at the prediction; then that is let go of."""
        if self.fused is not None:
            self.state = self.fused.first_step(grad, self.precision, move, state_dtype)
        else:
            assert self.mu is not None
            self.state, _ = self.step(self.mu, None, grad, keep, move, form="error", state_dtype=state_dtype)
        self.mu = self.emission = self.fused = None

    def forward(self, mu: Tensor, state: Tensor, form: str) -> tuple[Tensor, Tensor]:
        """Emission and energy ``[S]`` at the state."""
        return self.family.node_forward(mu, state, self.precision, self.unit, form=form, **self.frozen)

    def step(self, mu: Tensor, state: Tensor | None, grad: Tensor | None, keep: Any, move: Any, **options: Any) -> Any:
        """One step of the state: the moved one, and dF/dmu."""
        return self.family.node_step(mu, state, grad, self.precision, self.unit, keep, move, **options, **self.frozen)

    def gradient(self, mu: Tensor, state: Tensor | None, grad: Tensor | None, scale: Tensor, form: str) -> Tensor:
        """dF/dmu where the state stays. scale ``[S]``: the gradient of the loss in F, linear in its energies."""
        pi = self.precision * scale
        return self.family.node_step(mu, state, grad, pi, self.unit, None, None, form=form, **self.frozen)[1]


@dataclass(slots=True)
class Move:
    """A step of every state, made in the backward pass as soon as its gradient is there: d <- keep d - (move / pi) g.

    One kernel then reads g and the state and writes the state, and g is let go before the node below has its own.
    """

    keep: Tensor
    move: Tensor
    sweep: bool = False
    """Whether the layer below sees the moved state's error, and not the old one's."""
    lowest: float = -math.inf
    """Nodes numbered below this are at their predictions, and send nothing down: sPC moves t nodes at step t."""
    scaled: bool = False
    """Whether the user calls ``backward()``, on a loss that they may have scaled."""

    def __call__(self, node: Node, grad: Tensor | None, scale: Tensor, step: StepOf) -> Any:
        """Move the node's state; what goes to the layer below. scale ``[S]``: the gradient of the loss in F."""
        if node.number < self.lowest and grad is None:
            return None
        node.displaced = True
        if self.scaled and grad is not None:  # a loss that is scaled by 0 sends nothing down
            scale_ = per_sample(scale, grad)
            grad = torch.where(scale_ == 0, 0.0, grad / scale_).to(grad.dtype)
        node.state, below = step(node.state, grad, self.keep, self.move, self.sweep)
        if node.number < self.lowest:
            return None
        return below * per_sample(scale, below).to(below.dtype) if self.scaled else below


@dataclass(frozen=True)
class Gradient:
    """Moves nothing: hands the natural gradient V dF/du over pi of every state to ``take``."""

    take: Callable[[Node, Tensor], None]

    def __call__(self, node: Node, grad: Tensor | None, scale: Tensor, step: StepOf) -> Any:
        """The natural gradient is what a step of 1 would subtract from the state."""
        assert node.state is not None
        one = torch.ones_like(node.precision)
        moved, below = step(wide(node.state.clone()), grad, 0 * one, one, False)
        self.take(node, node.state - moved)
        return below


Response = Move | Gradient
