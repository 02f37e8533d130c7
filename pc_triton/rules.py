"""The rules of inference: how much each node weighs, how far the states step, and when they stop.

Each is an object that a user may replace. `FreeEnergy` takes numbers and words for the usual ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from .arithmetic import per_sample, sum_of_nodes
from .checks import check_positive
from .dispatch import as_state, backend
from .node import Node

TRUST = 0.3
"""The largest root-mean-square move of a node's states, in units of its scale, that `Displacement` lets the first
Newton step make: a node that F hardly depends on is not thrown far for its share."""
LEAST = 1e-3
"""The least precision that `Displacement` gives to a node, as a part of the mean precision of all. One that is held by
less than F bends along it never settles, as the queries and keys of an attention that is all but uniform."""

StateOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class Precision(Protocol):
    """The precision of every hidden node: any function with these arguments.

    node: with its prediction ``mu`` and ``family``. squared: ``|G|^2 [S]``, G the gradient of F in the node's errors at
    the prediction, in units of the node's scale. free_energy: F ``[S]`` there. nodes: how many share F's fall. Returns
    pi ``[S]``, > 0. An attribute ``in_units = False`` has Gaussian errors counted as they are, and not in units of
    their node's root mean square.
    """

    def __call__(self, node: Node, squared: Tensor, free_energy: Tensor, nodes: int) -> Tensor: ...


@dataclass(frozen=True)
class Displacement:
    """The precision with which inference explains away the fraction ``delta`` of F, each node the same part of it.

    To first order in 1 / pi inference lowers F by ``|G|^2 / (2 pi)``; so ``pi = n |G|^2 / (2 delta |F|)`` for each of
    n nodes and each sample. No node moves by more than 0.3 of its scale, and none is held by less than a thousandth of
    the mean. Nothing depends on the model's scale, width or depth, nor on the rest of the batch. Raises ValueError
    unless 0 < delta < 1.
    """

    delta: float = 0.003

    def __post_init__(self) -> None:
        if not (is_number(self.delta) and 0 < self.delta < 1):
            raise ValueError(f"displacement={self.delta!r}: a fraction of the free energy, between 0 and 1")

    def __call__(self, node: Node, squared: Tensor, free_energy: Tensor, nodes: int) -> Tensor:
        return self.of_all([node], squared.unsqueeze(0), free_energy, nodes)[0]

    def of_all(self, nodes: Sequence[Node], squared: Tensor, free_energy: Tensor, number: int) -> Tensor:
        """pi ``[nodes, S]`` of several at once, of ``number`` that share F's fall; squared ``[nodes, S]``."""
        tiny = torch.finfo(free_energy.dtype).tiny
        share = squared * (number / (2 * self.delta)) / free_energy.abs().clamp_min(tiny)
        per_variable = [len(free_energy) / node.variables for node in nodes]
        if squared.is_cuda:
            means = torch.stack(torch._foreach_mul(squared.unbind(0), per_variable))  # one launch
        else:  # inductor's C++ has no _foreach_mul
            means = torch.stack([row * factor for row, factor in zip(squared, per_variable)])
        pi = torch.maximum(share, means.sqrt() / TRUST)
        return torch.maximum(pi, LEAST * sum_of_nodes(pi) / len(pi)).clamp(1e-12, 1e12)


def precisions(precision: Precision, nodes: Sequence[Node], squared: Tensor, free_energy: Tensor) -> Tensor:
    """pi ``[nodes, S]`` by the rule, for squared ``[nodes, S]``. Raises ValueError where it gives anything else."""
    if type(precision) is Displacement:
        return precision.of_all(nodes, squared, free_energy, len(nodes))
    rows = [precision(node, row, free_energy, len(nodes)) for node, row in zip(nodes, squared)]
    for pi in rows:
        if not isinstance(pi, Tensor) or pi.shape != free_energy.shape:
            raise ValueError(f"precision={precision!r} gave no tensor {tuple(free_energy.shape)}, pi by sample")
        check_positive(f"precision={precision!r}", pi)
    return torch.stack(rows).to(free_energy.dtype)


@dataclass(frozen=True)
class Fixed:
    """One precision pi > 0 for every hidden node, as in the paper (1): it multiplies the node's energy.

    Raises ValueError for a number that is not positive and finite.
    """

    pi: float = 1.0
    in_units = False

    def __post_init__(self) -> None:
        if not (is_number(self.pi) and 0 < self.pi < math.inf):
            raise ValueError(f"precision={self.pi!r}: give a positive finite number, or 'auto'")

    def __call__(self, node: Node, squared: Tensor, free_energy: Tensor, nodes: int) -> Tensor:
        return torch.full_like(free_energy, float(self.pi))


class Constant:
    """The same step for every move, in natural-gradient units: 1 is Newton's where a node stands alone.

    A step rule makes one of these for each batch, by `start`; each move then asks it for keep and move ``[S]``, in
    d <- keep d - (move / pi) g. Subclass it for a rule of your own.
    """

    def __init__(self, step: float) -> None:
        if not (is_number(step) and 0 < step <= 1):
            raise ValueError(f"step={step!r}: between 0 and 1 (1 is Newton's step of an isolated node)")
        self.first = step

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.first})"

    def start(self, free_energy: Tensor, slope: Tensor | None, remembers: bool) -> Constant:
        """The rule for a batch with F ``[S]`` at its prediction. slope: of F along the first move, where that is made
        already. remembers: whether accepted states have to be kept."""
        batch = copy.copy(self)
        batch.begin(free_energy, slope, remembers)
        return batch

    def begin(self, free_energy: Tensor, slope: Tensor | None, remembers: bool) -> None:
        """Set up what the moves of a batch need."""
        self.step = torch.full_like(free_energy, self.first)

    def next(self, nodes: Sequence[Node], free_energy: Tensor) -> tuple[Tensor, Tensor]:
        """keep and move ``[S]`` of the next move, for F ``[S]`` at the states of the nodes."""
        return 1 - self.step, self.step

    def unguarded(self, nodes: Sequence[Node], free_energy: Tensor) -> tuple[Tensor, Tensor]:
        """`next`, where F tells nothing of the move before: there was none, or the weights have moved since."""
        return self.next(nodes, free_energy)

    def take_back(self, nodes: Sequence[Node], free_energy: Tensor) -> bool:
        """Undo the last move in the samples whose F rose by it; whether there were any."""
        return False

    def finish(self, nodes: Sequence[Node], look: Callable[[], Tensor]) -> None:
        """Called after the last move. look: gives F ``[S]`` at the states, by one forward pass."""


class Guarded(Constant):
    """A step that adapts: it takes back, per sample, a move that raised F.

    After the first move of ePC the parabola through F, its slope and F after the move gives the best step along it: a
    sample whose F rose goes back to that parabola's minimum, and the others go on with that step, at most Newton's. Any
    other move: a sample whose F rose goes halfway back and halves its step.
    """

    def begin(self, free_energy: Tensor, slope: Tensor | None, remembers: bool) -> None:
        super().begin(free_energy, slope, remembers)
        self.accepted, self.slope = free_energy, slope
        self.moves = 0 if slope is None else 1
        self.from_zero = slope is not None  # before the first move e was 0
        self.remembered: dict[Node, Tensor] | None = {} if remembers else None

    def next(self, nodes: Sequence[Node], free_energy: Tensor) -> tuple[Tensor, Tensor]:
        before, now = self.accepted, free_energy.nan_to_num(nan=math.inf, posinf=math.inf)
        rose = now > before if self.moves else torch.zeros_like(now, dtype=torch.bool)
        self.accepted = torch.minimum(before, now) if self.moves else now
        back = torch.ones_like(self.step)
        if self.moves == 1 and self.slope is not None:
            first, slope = self.step, self.slope.nan_to_num(nan=0.0, posinf=0.0)
            curvature = 2 * (now - before + first * slope) / first**2
            self.step = torch.where(curvature > slope, slope / curvature, torch.ones_like(curvature))
            back = self.step / first  # to go back is to shorten e
        else:
            self.step = torch.where(rose, 0.5 * self.step, self.step)
        self.moves += 1
        self._remember(nodes, rose)
        return torch.where(rose, back, 1 - self.step), torch.where(rose, torch.zeros_like(back), self.step)

    def unguarded(self, nodes: Sequence[Node], free_energy: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - self.step, self.step

    def _remember(self, nodes: Sequence[Node], rose: Tensor) -> None:
        """Keep the states that were accepted; where F rose, go halfway back to them."""
        if self.remembered is None:
            return
        for node in nodes:
            if node.state is None:
                continue
            if node in self.remembered:
                state, accepted = as_state(node.state), self.remembered[node]
                node.state, accepted = backend(state).guard_step(state, accepted, rose)
            else:
                rows = per_sample(rose, node.state)
                accepted = node.state.masked_fill(rows, 0.0) if self.from_zero else node.state.clone()
            self.remembered[node] = as_state(accepted)

    def take_back(self, nodes: Sequence[Node], free_energy: Tensor) -> bool:
        rose = ~(free_energy <= self.accepted)  # or is no number
        if self.moves == 0 or not rose.any():
            return False
        for node in nodes:
            if node.state is not None:
                begun = None if self.remembered is None else self.remembered.get(node)
                begun = torch.zeros_like(node.state) if begun is None else begun
                node.state = torch.where(per_sample(rose, node.state), begun, node.state)
        return True


@dataclass(frozen=True)
class Tolerance:
    """Stop once the last move changed F by at most the fraction ``tolerance`` of it, in every sample.

    To look at F waits for the GPU. Raises ValueError unless 0 <= tolerance < 1.
    """

    tolerance: float

    def __post_init__(self) -> None:
        if not (is_number(self.tolerance) and 0 <= self.tolerance < 1):
            raise ValueError(f"stop={self.tolerance!r}: a fraction of the free energy, at least 0 and below 1")

    def __call__(self, free_energies: Sequence[Tensor]) -> bool:
        if len(free_energies) < 2:
            return False
        before, now = free_energies[-2:]
        return bool(((before - now).abs() <= self.tolerance * now.abs()).all())


@dataclass(frozen=True)
class Rules:
    """All that decides how the states of a batch move, but for the order."""

    precision: Precision
    step: Constant
    state_optimizer: StateOptimizer | None = None
    state_dtype: torch.dtype | None = None
    """None: that of the arithmetic."""
    inference_dtype: torch.dtype | None = None
    """Of the products in passes that do not learn; None: as in those that do."""
    stop: Callable[[Sequence[Tensor]], bool] | None = None
    """Called with F ``[S]`` at the prediction and after each move so far; True ends inference."""
    remembers: bool = False
    """Whether the guard keeps copies of the states that it accepted. If not, it goes back by shortening e."""


def is_number(x: Any) -> bool:
    """Whether x is a real number, Python's or NumPy's; a bool is not meant to be one."""
    return isinstance(x, Real) and not isinstance(x, bool)


def as_precision(given: Any, displacement: float) -> Precision:
    """A precision: the one given, a number's, or for ``"auto"`` that of the displacement. Raises ValueError."""
    auto = Displacement(displacement)
    if given == "auto":
        return auto
    return given if callable(given) else Fixed(given)


def as_step(given: Any) -> Constant:
    """A step rule: the one given, or a number's. Raises ValueError unless 0 < step <= 1."""
    return given if isinstance(given, Constant) else Constant(given)


def as_stop(given: Any) -> Callable[[Sequence[Tensor]], bool] | None:
    """A rule to stop by: the one given, or a number's `Tolerance`. Raises ValueError."""
    return given if given is None or callable(given) else Tolerance(given)
