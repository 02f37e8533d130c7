"""The orders of inference: how the T moves of a batch's states follow one another, each order one function.

Every one starts at the forward pass, where u = mu, and then goes in turns: F at the states, by one pass of the model;
then the backward pass, in which each state makes its move. Learning is one more pass, whose backward is the user's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import parallel, reference
from .arithmetic import wide
from .batch import Batch
from .checks import check_finite
from .dispatch import as_state, backend
from .families import Gaussian
from .node import Gradient, Move, Node, OnlyMove
from .rules import Constant, Displacement, Fixed, Guarded, Rules
from .tracking import Tracked

Start = Mapping[str, Tensor] | Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""States u by the name of their node, or a function of the predictions by name that gives them."""


def error(batch: Batch, rules: Rules, moves: int, start: Start | None = None) -> Constant:
    """ePC (Goemaere et al. 2025, arXiv 2505.20137): the errors e = u - mu move at once, and u follows mu.

    A step reaches every depth. The backward pass that sets the precisions already makes the first move, from e = 0.
    """
    steps, left = begin_errors(batch, rules, moves, start, learns_next=True)
    return descend(batch, rules, steps, left)


def begin_errors(
    batch: Batch, rules: Rules, moves: int, start: Start | None, learns_next: bool = False
) -> tuple[Constant, int]:
    """Precisions from one backward pass at the prediction; it also makes the first move, where all start at e = 0.

    Returns the step rule, and how many moves are left. learns_next: learning comes next where none is left. Then no
    state has to be made; but an order or a rule of the user's may change what the move was made of.
    """
    _check_form(batch, "error")
    moves_at_once = moves > 0 and start is None and rules.state_optimizer is None
    fuses = moves_at_once and batch.watch is None and type(rules.precision) in (Displacement, Fixed)
    free_energy = batch.at_prediction(fuses=fuses)
    pushes, slope = batch.calibrate(free_energy, rules.precision)
    f0 = free_energy.detach()
    del free_energy  # with the graph below the first node
    if not moves_at_once:
        _errors_at_zero(pushes, rules)
        _start_at(batch, start)
        steps = rules.step.start(f0, None, True)
        batch.energies.clear()  # F at the states that the first move starts from is still to be taken
    else:
        if batch.watch is not None:
            _errors_at_zero(pushes, rules)
            batch.watch(batch)
        steps = rules.step.start(f0, slope, rules.remembers)
        keep, move = steps.unguarded(batch.nodes, f0)
        moves -= 1
        alone = learns_next and moves == 0 and batch.watch is None and type(steps) in (Constant, Guarded, Tracked)
        while pushes:  # each is let go as soon as it is used
            node, push = pushes.pop(0)
            if alone and node.fused is None and type(node.family) is Gaussian and backend(push) is not reference:
                node.only_move = OnlyMove(as_state(push), move, rules.state_dtype)
            else:
                node.begin(push, keep, move, rules.state_dtype)
    batch.let_go()
    _shift(batch, rules)
    return steps, moves


def sweep(batch: Batch, rules: Rules, moves: int, start: Start | None = None) -> Constant:
    """sPC, top-down: each node moves with the already moved error of those above it, in one backward pass."""
    first, steps = _begin(batch, rules, start)
    return descend(batch, rules, steps, moves, first, sweep=True)


def simultaneous(batch: Batch, rules: Rules, moves: int, start: Start | None = None) -> Constant:
    """sPC, as in the paper: every state moves from the same old states.

    At step t the output's error has reached the top t nodes; below them nothing is computed backwards.
    """
    first, steps = _begin(batch, rules, start)
    return descend(batch, rules, steps, moves, first, skips=start is None and rules.state_optimizer is None)


def incremental(batch: Batch, rules: Rules, moves: int, start: Start | None = None) -> Iterator[Tensor]:
    """iPC (Salvatori et al. 2024, arXiv 2212.00720, algorithm 1): yields F ``[S]``, with its graph, at each of T steps.

    Its ``backward()``, which the user calls, leaves the weight gradients and moves the states, both from the same old
    states; the weights may then move before the next step.
    """
    first, steps = _begin(batch, rules, start, learns=True)
    for _ in range(moves):
        torch.clear_autocast_cache()  # its casts are of the weights before they moved
        free_energy = batch.free_energy(learns=True, moves=True) if first is None else first
        last = rules.stop is not None and parallel.agreed(rules.stop(batch.energies))
        batch.respond(Move(*steps.unguarded(batch.nodes, free_energy.detach()), scaled=True))
        yield free_energy
        if last:
            return
        first = None


def descend(
    batch: Batch,
    rules: Rules,
    steps: Constant,
    moves: int,
    first: Tensor | None = None,
    sweep: bool = False,
    skips: bool = False,
) -> Constant:
    """Move every state ``moves`` times; ``first`` is F ``[S]`` at the states, where its graph is there already."""
    optimizer = None
    if rules.state_optimizer is not None:
        optimizer = rules.state_optimizer([node.state for node in batch.nodes if node.state is not None])
    for _ in range(moves):
        if batch.watch is not None:
            batch.watch(batch)
            if first is not None:  # the watch has made passes since, and a backward pass answers the last one
                batch.energies.pop()
                first = None
        free_energy = batch.free_energy() if first is None else first
        first = None
        if rules.stop is not None and parallel.agreed(rules.stop(batch.energies)):
            batch.energies.pop()  # it will be taken again at these states
            break
        if optimizer is not None:
            batch.move(free_energy, Gradient(_give_gradient))
            optimizer.step()
        else:
            displaced = [node.number for node in batch.nodes if node.displaced]
            lowest = min(displaced, default=math.inf) if skips else -math.inf
            batch.move(free_energy, Move(*steps.next(batch.nodes, free_energy.detach()), sweep, lowest))
        del free_energy  # with its graph, before the next is made
    else:
        if batch.watch is not None:
            batch.watch(batch)
    steps.finish(batch.nodes, batch.look)
    return steps


def _give_gradient(node: Node, natural: Tensor) -> None:
    assert node.state is not None
    node.state.grad = natural


def _check_form(batch: Batch, form: str) -> None:
    if batch.form != form:
        raise ValueError(
            f"this order settles states of form {form!r}, and the batch has {batch.form!r}: give FreeEnergy "
            f"order=pc.Order(function, form={form!r})"
        )


def _errors_at_zero(pushes: list[tuple[Node, Tensor]], rules: Rules) -> None:
    for node, _ in pushes:
        assert node.mu is not None
        node.state = as_state(torch.zeros_like(wide(node.mu), dtype=rules.state_dtype))


def _begin(batch: Batch, rules: Rules, start: Start | None, learns: bool = False) -> tuple[Tensor | None, Constant]:
    """Put the states u at their predictions; return F there and the step rule.

    F is None where its graph was used up to set the precisions.
    """
    _check_form(batch, "state")
    if type(rules.precision) is Fixed and start is None:  # a subclass may weigh its nodes by F's gradient
        pi = float(rules.precision.pi)

        def begins(node: Node) -> None:
            assert node.mu is not None
            node.state = as_state(wide(node.mu.detach()).clone())
            node.precision = torch.full((batch.samples,), pi, dtype=node.state.dtype, device=node.state.device)

        batch.begins = begins
        free_energy = batch.free_energy(learns=learns)
        batch.begins = None
        batch.let_go()
        return free_energy, rules.step.start(free_energy.detach(), None, rules.remembers)
    free_energy = batch.at_prediction()
    for node, _ in batch.calibrate(free_energy, rules.precision)[0]:
        assert node.mu is not None
        node.state = as_state(wide(node.mu).clone())
    _start_at(batch, start)
    batch.let_go()
    batch.energies.clear()  # F at the states that the first move starts from is still to be taken
    return None, rules.step.start(free_energy.detach(), None, rules.remembers)


def _start_at(batch: Batch, start: Start | None) -> None:
    """Put the states where ``start`` says; the others, at the predictions that follow from those."""
    if start is None:
        return
    free = {name: node for name, node in batch.named_nodes().items() if node.state is not None}
    predictions = {name: node.mu.detach() for name, node in free.items() if node.mu is not None}
    given_states = start(predictions) if callable(start) else start
    if not isinstance(given_states, Mapping):
        raise TypeError(f"start is {type(given_states).__name__}: give a dict of states by name, or a function to one")
    states: dict[Node, Tensor] = {}
    for name, u in given_states.items():
        if name not in free:
            raise ValueError(f"start: no free node {name!r}; the nodes that the output depends on: {', '.join(free)}")
        mu = predictions[name]
        if not isinstance(u, Tensor) or u.shape != mu.shape:
            given = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(f"start: the state of {name!r} is {given}: give a tensor {tuple(mu.shape)}")
        check_finite(f"start[{name!r}]", u.masked_fill(mu == -torch.inf, 0.0))
        states[free[name]] = u.detach().to(mu.device, wide(mu).dtype)
    batch.place(states)


def _shift(batch: Batch, rules: Rules) -> None:
    """In a compiled model, leave the Gaussian nodes that are visited once to its graph, as mu + e."""
    if batch.calls.compiled and rules.state_optimizer is None and not batch.shows:
        families = [node.family for node in batch.nodes]
        batch.in_graph = [
            node
            for node in batch.nodes
            if node.is_free and type(node.family) is Gaussian and families.count(node.family) == 1
        ]
        batch.called = [node for node in batch.nodes if node not in batch.in_graph]


@dataclass(frozen=True)
class Order:
    """An order of inference: the function that moves the states, and what it needs to be set up.

    settle(batch, rules, moves, start) moves the states of a `Batch`, and returns its step rule. Raises ValueError for
    any other form.
    """

    settle: Callable[..., Constant]
    form: str = "state"
    """What a state holds: ``"state"`` u, ``"error"`` e = u - mu."""
    step: float = 0.2
    """The first step where none is given."""
    steps: int = 3
    """T where none is given."""

    def __post_init__(self) -> None:
        if self.form not in ("state", "error"):
            raise ValueError(f"form={self.form!r}: 'state', if a state holds u, or 'error', if it holds u - mu")

    def moves(self, steps: int) -> int:
        """How often the states move before learning: in error form the learning pass is the last of the T steps."""
        return steps - 1 if self.form == "error" else steps


ORDERS = {
    "error": Order(error, "error", 0.25, steps=2),
    "sweep": Order(sweep, step=0.5),
    "simultaneous": Order(simultaneous),
    "incremental": Order(simultaneous),  # inference alone; `incremental` is its training
}


def as_order(given: Any) -> Order:
    """An order: one given, one of that name, or of a function that settles states u. Raises ValueError."""
    if isinstance(given, Order):
        return given
    if callable(given):
        return Order(given)
    if given not in ORDERS:
        raise ValueError(f"order={given!r}: choose one of {', '.join(ORDERS)}")
    return ORDERS[given]
