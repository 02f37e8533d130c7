"""The one rule that decides who computes: GPU tensors go to the Triton kernels, CPU tensors to plain torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from . import reference

tracing: ContextVar[bool] = ContextVar("pc_triton_tracing", default=False)
"""Whether a training step is being traced by ``compiled.py``: values cannot be looked at then."""
_forced: ContextVar[str | None] = ContextVar("pc_triton_backend", default=None)
_triton: Any = None


def triton_kernels() -> Any:
    """The launchers of ``kernels/`` under their common names. Raises ImportError, with the remedy, without triton."""
    global _triton
    if _triton is None:
        try:
            from .kernels import attention, bernoulli, categorical, gaussian, gaussian_logvar
        except ImportError as error:
            raise ImportError(f"the Triton kernels need triton: pip install 'pc_triton[gpu]' ({error})") from error
        launchers: dict[str, Any] = {}
        for module in (gaussian, gaussian_logvar, bernoulli, categorical, attention):
            launchers.update({k: v for k, v in vars(module).items() if k.endswith(("_forward", "_step", "_backward"))})
        _triton = SimpleNamespace(**launchers, WIDEST=attention.WIDEST)
    return _triton


def backend(tensor: Tensor) -> Any:
    """Where the equations of ``tensor`` are computed: ``pc_triton.reference`` or the Triton launchers, same names.

    A float64 tensor and a GPU without triton are served by torch.
    """
    choice = _forced.get()
    if choice is None:
        choice = "triton" if tensor.is_cuda and tensor.element_size() < 8 and _has_triton() else "torch"
    return triton_kernels() if choice == "triton" else reference


@contextlib.contextmanager
def use_backend(choice: str) -> Iterator[None]:
    """Within this context every node runs on ``"triton"`` or on ``"torch"``, wherever its tensors are: for tests.

    Raises ValueError for any other name.
    """
    if choice not in ("triton", "torch"):
        raise ValueError(f"backend {choice!r}: choose 'triton' or 'torch'")
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


def _has_triton() -> bool:
    try:
        triton_kernels()
    except ImportError:
        return False
    return True
