"""The rules that decide who computes: GPU tensors go to the Triton kernels, CPU tensors to plain torch.

Where a linear layer and its node could be one kernel, or a whole training step, ``choice.py`` decides for the card.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import reference
from .cards import Card, known
from .choice import Choice
from .choice import chained as _chained
from .choice import fused as _fused

tracing: ContextVar[bool] = ContextVar("pc_triton_tracing", default=False)
"""Whether a training step is being traced by ``compiled.py``: values cannot be looked at then."""
_forced: str | None = None  # not a ContextVar: autograd runs a GPU's backward passes in a thread of its own
_fusing: bool | None = None
_chaining: bool | None = None
_triton: Any = None
OLDEST_TRITON = (3, 6)
ENDINGS = ("_forward", "_step", "_backward", "_gradient_", "_fall", "_rounded")

TUNED = Path(__file__).with_name("tuned.json")
"""Measured times by device, by dtype ("tf32": float32 whose products may be): in "linear" rows [rows, N, K, ratio], how
many times as long as the fused kernel a product of that shape and its node took apart (cuBLAS, then the node's kernel);
in "chain" rows [samples, width, layers, ratio], how many times as long as one launch the same training step took by its
layers. What is measured here comes before what ``choice.py`` would say."""


def triton_kernels() -> Any:
    """The launchers of ``kernels/`` under their common names.

    Raises ImportError, with the remedy, without triton and with one that is too old for them.
    """
    global _triton
    if _triton is None:
        try:
            import triton.language  # not triton alone, which a folder of that name gives too

            if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
                raise ImportError(f"this is {triton.__version__}, and they need 3.6: torch 2.10 is the first with it")
            from .kernels import (
                attention,
                attention_first,
                bernoulli,
                categorical,
                clamped,
                common,
                fall,
                float8,
                gaussian,
                gaussian_logvar,
                guard,
                laplace,
                linear,
                student_t,
            )
        except ImportError as error:
            raise ImportError(f"the Triton kernels need triton: pip install 'pc_triton[gpu]' ({error})") from error
        launchers: dict[str, Any] = {}
        nodes = (gaussian, gaussian_logvar, bernoulli, laplace, student_t, categorical, attention, attention_first)
        for module in (*nodes, clamped, linear, fall, guard, float8):
            launchers.update({k: v for k, v in vars(module).items() if k.endswith(ENDINGS)})
        more = {"WIDEST": attention.WIDEST, "product_precision": common.product_precision}
        _triton = SimpleNamespace(**launchers, **more)
    return _triton


def backend(tensor: Tensor) -> Any:
    """Where the equations of ``tensor`` are computed: ``pc_triton.reference`` or the Triton launchers, same names.

    A float64 tensor and a GPU without triton are served by torch.
    """
    where = _forced
    if where is None:
        where = "triton" if tensor.is_cuda and tensor.element_size() < 8 and _has_triton() else "torch"
    return triton_kernels() if where == "triton" else reference


def as_state(u: Tensor) -> Tensor:
    """u in the layout of a state: that of its prediction, which may be permuted; the kernels move it in rows."""
    return u if u.is_contiguous() or backend(u) is reference else u.contiguous()


@contextlib.contextmanager
def use_backend(choice: str) -> Iterator[None]:
    """Within this context the whole process runs its nodes on ``"triton"`` or on ``"torch"``, wherever tensors are.

    It is for tests.

    Raises ValueError for any other name.
    """
    if choice not in ("triton", "torch"):
        raise ValueError(f"backend {choice!r}: choose 'triton' or 'torch'")
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether the layer of this weight ``[N, K]`` and the node on it are one kernel for x ``[..., K]``."""
    if x.dtype != weight.dtype or x.dim() < 2 or torch.is_autocast_enabled(x.device.type):
        return False
    if _fusing is not None:
        return _fusing
    if not x.is_cuda or backend(x) is reference:
        return False
    return fused(card_of(x.device), x.numel() // max(1, x.shape[-1]), *weight.shape, kind_of(x.dtype)).taken


@lru_cache(maxsize=4096)
def fused(card: Card, rows: int, n: int, k: int, kind: str) -> Choice:
    """`choice.fused`, with what is measured."""
    return _fused(card, rows, n, k, kind, measured("linear", card.name, kind))


def may_chain(x: Tensor) -> bool:
    """Whether a training step on x can be one launch at all: x lies on a GPU with kernels."""
    if _chaining is not None:
        return _chaining
    return x.is_cuda and backend(x) is not reference


def chains(x: Tensor, width: int, layers: int) -> bool:
    """Where `may_chain`: whether a step of so many linear layers, of that mean width, on x ``[S, K]`` is one launch."""
    if _chaining is not None:
        return _chaining
    return chained(card_of(x.device), len(x), width, layers, kind_of(x.dtype)).taken


@lru_cache(maxsize=4096)
def chained(card: Card, samples: int, width: int, layers: int, kind: str) -> Choice:
    """`choice.chained`, with what is measured."""
    return _chained(card, samples, width, layers, kind, measured("chain", card.name, kind))


@lru_cache(maxsize=64)
def card_of(device: torch.device) -> Card:
    """The card of a tensor's device."""
    properties = torch.cuda.get_device_properties(device)
    return known(properties.name, properties.multi_processor_count)


def kind_of(dtype: torch.dtype) -> str:
    """The dtype's name, or "tf32" for float32 whose products may be."""
    tf32 = triton_kernels().product_precision(dtype) == "tf32"
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


@lru_cache(maxsize=64)
def measured(what: str, device_name: str, kind: str) -> list[list[float]]:
    """The table's rows of that device and kind, in "linear" or in "chain"."""
    return json.loads(TUNED.read_text()).get(what, {}).get(device_name, {}).get(kind, [])


@contextlib.contextmanager
def use_fused(choice: bool) -> Iterator[None]:
    """Within this context every linear layer and its Gaussian node are one kernel, or none is: for tests."""
    global _fusing
    before, _fusing = _fusing, choice
    try:
        yield
    finally:
        _fusing = before


@contextlib.contextmanager
def use_chain(choice: bool) -> Iterator[None]:
    """Within this context every training step that can be one launch is, or none is: for tests."""
    global _chaining
    before, _chaining = _chaining, choice
    try:
        yield
    finally:
        _chaining = before


def _has_triton() -> bool:
    try:
        triton_kernels()
    except ImportError:
        return False
    return True
