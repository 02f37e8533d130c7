"""Value nodes in a part of the model that ``torch.utils.checkpoint`` computes again for the backward pass."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from .dispatch import tracing
from .distributions import inference_here

if TYPE_CHECKING:
    from .inference import Inference


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The ``context_fn`` of ``torch.utils.checkpoint`` around a part of a model that holds value nodes.

        x = checkpoint(block, x, use_reentrant=False, context_fn=pc.checkpoint_contexts)

    The part is then computed again, in the backward pass of every inference step and of learning, under the states of
    the forward pass. Outside inference it changes nothing. Raises RuntimeError for a compiled model.
    """
    inference = inference_here()
    if inference is None:
        return contextlib.nullcontext(), contextlib.nullcontext()
    if inference.owner.traced or tracing.get():
        raise RuntimeError("torch.utils.checkpoint in a compiled model: inference takes the one or the other")
    return inference.within_checkpoint(), _Again(inference)


class _Again(AbstractContextManager[None]):
    """`Inference.computes_again` from where this is made, as often as the graph is passed backwards."""

    def __init__(self, inference: Inference) -> None:
        self.inference, self.mode, self.visits = inference, inference.mode, inference.visits

    def __enter__(self) -> None:
        self.context = self.inference.computes_again(self.mode, self.visits)
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


def in_checkpoint() -> bool:
    """Whether what autograd saves now goes to a ``torch.utils.checkpoint``; False where torch is older than 2.8."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks: Any = None if top is None else top(True)
    return bool(hooks) and hooks[0].__module__ == "torch.utils.checkpoint"
