"""Value nodes in a part of the model that ``torch.utils.checkpoint`` computes again for the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .context import pass_here


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The ``context_fn`` of ``torch.utils.checkpoint`` around a part of a model that holds value nodes::

        x = checkpoint(block, x, use_reentrant=False, context_fn=pc.checkpoint_contexts)

    The part is then computed again, in the backward pass of every inference step and of learning, under the states of
    the forward pass. Outside inference it changes nothing. Raises RuntimeError for a compiled model.
    """
    here = pass_here()
    return (contextlib.nullcontext(), contextlib.nullcontext()) if here is None else here.within_checkpoint()


class Again(AbstractContextManager[None]):
    """A context to enter again as often as the graph is passed backwards: ``make(*arguments)`` each time."""

    def __init__(self, make: Callable[..., AbstractContextManager[None]], *arguments: Any) -> None:
        self.make, self.arguments = make, arguments

    def __enter__(self) -> None:
        self.context = self.make(*self.arguments)
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


def in_checkpoint() -> bool:
    """Whether what autograd saves now goes to a ``torch.utils.checkpoint``; False where torch is older than 2.8."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks: Any = None if top is None else top(True)
    return bool(hooks) and hooks[0].__module__ == "torch.utils.checkpoint"
