"""Where a layer meets the pass of inference that it is called in.

Inference calls the user's own model. While it does, `pass_here` gives the layers that pass, and they tell it two
things: ``emit``, that a value node stands here, and ``add_energy``, that F has one more term. Outside inference there
is no pass, and a layer is its plain torch counterpart.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

T = TypeVar("T")
Fused = Callable[[Any, Any, Tensor], tuple[Tensor, Tensor]]
"""A kernel that computes a prediction and the node on it: (node, pass, state) to emission and energy ``[S]``."""

First = Callable[[], tuple[Tensor, dict[str, Any], Any]]
"""What that kernel would give at the prediction, what the family is held fixed by, and the `AtPrediction`."""


class Pass(Protocol):
    """One pass of the model in inference, as the layers see it."""

    few_digits: Any
    """A `FewDigits` where its products are made in 8 bits."""

    def emit(self, family: Any, mu: Tensor, frozen: dict[str, Any]) -> Tensor:
        """What the value node of ``family`` emits for its prediction mu.

        frozen: what the family needs beside its state, such as masks.
        """

    def emit_fused(self, family: Any, fused: Fused, first: First | None = None) -> Tensor | None:
        """`emit` by a kernel that takes in the product that makes mu; None where this pass has to be given mu.

        first: what the first pass computes in the kernel's place.
        """

    def add_energy(self, energy: Tensor) -> None:
        """Count in F an energy ``[S * r, ...]`` of S samples."""

    def labels_for(self, logits: Tensor) -> tuple[Tensor, int, bool] | None:
        """The labels that these logits are clamped to, the label to ignore, and whether weights learn of this pass.

        None where the output is not clamped to labels, or where the logits themselves are wanted.
        """

    def clamp(self, logits: Tensor, energy: Tensor) -> None:
        """Count in F the output's energy ``[R]``, a row each; ``logits`` is what the model will return for it."""

    def within_checkpoint(self) -> tuple[Any, Any]:
        """The contexts in which a part of this pass is computed, and is computed again for its backward."""


_current: ContextVar[Pass | None] = ContextVar("pc_triton_pass", default=None)
_running: list[Pass] = []  # in any thread: torch.compile can guard on this, and not on a ContextVar


def pass_here() -> Pass | None:
    """The pass under way in this thread; None outside inference."""
    return _current.get() if len(_running) > 0 else None


def infers() -> bool:
    """Whether any thread is within a pass: only then may a layer have to leave torch.compile's graph for it."""
    return len(_running) > 0  # torch 2.11 traces no bool(list)


@contextlib.contextmanager
def running(this: Pass) -> Iterator[None]:
    """Within it, `pass_here` is this pass."""
    token = _current.set(this)
    _running.append(this)
    try:
        yield
    finally:
        _running.remove(this)
        _current.reset(token)


def awaits_pass(family: nn.Module | None) -> bool:
    """Whether the layer of this family has to meet a pass here, outside of torch.compile's graph."""
    return len(_running) > 0 and family is not None and family.error is None


def _call(function: Callable[..., T], *arguments: Any) -> T:
    return function(*arguments)


_call_outside: Callable[..., Any] = _call


def outside_graphs(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments); torch.compile leaves its graph for it, and does not look inside."""
    return _call_outside(function, *arguments)


def prepare_compiler() -> None:
    """Make `outside_graphs` known to torch.compile where that is in use; to import it for this would be slow."""
    global _call_outside
    if _call_outside is _call and "torch._dynamo" in sys.modules:
        import torch

        _call_outside = torch.compiler.disable(_call)


def add_energy(energy: Tensor) -> None:
    """Add a term of your own to the free energy, from within a model's forward: a prior, a penalty, a constraint::

        h = self.hidden(x)               # a pc layer
        pc.add_energy(0.01 * h.abs())    # inference and learning lower this too

    energy: ``[S, ...]`` in nats, S samples along the first axis (or a whole number of rows each), a differentiable
    function of what value nodes emit. Counted in each sample's F as it is, whatever the nodes' precision. Outside
    `FreeEnergy` it does nothing.
    """
    if infers():
        outside_graphs(_add_energy, energy)


def _add_energy(energy: Tensor) -> None:
    here = pass_here()
    if here is not None:
        here.add_energy(energy)
