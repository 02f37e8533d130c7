"""The rules that decide who computes: GPU tensors go to the Triton kernels, CPU tensors to plain torch.

Where a linear layer and its node could be one kernel, or a whole training step, a table of measured times decides.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import reference

tracing: ContextVar[bool] = ContextVar("pc_triton_tracing", default=False)
"""Whether a training step is being traced by ``compiled.py``: values cannot be looked at then."""
_forced: str | None = None  # not a ContextVar: autograd runs a GPU's backward passes in a thread of its own
_fusing: bool | None = None
_chaining: bool | None = None
_triton: Any = None
ENDINGS = ("_forward", "_step", "_backward", "_gradient", "_gradient_", "_fall")

TUNED = Path(__file__).with_name("tuned.json")
"""Measured times by device, by dtype: in "linear" rows [rows, N, K, ratio], how many times as long as the fused kernels
a training step's products of that shape and their node took apart (cuBLAS, then the node's kernel); in "chain" rows
[samples, width, layers, ratio], how many times as long as one launch the same training step took by its layers."""


def triton_kernels() -> Any:
    """The launchers of ``kernels/`` under their common names. Raises ImportError, with the remedy, without triton."""
    global _triton
    if _triton is None:
        try:
            from .kernels import (
                attention,
                attention_first,
                bernoulli,
                categorical,
                fall,
                gaussian,
                gaussian_logvar,
                laplace,
                linear,
                student_t,
            )
        except ImportError as error:
            raise ImportError(f"the Triton kernels need triton: pip install 'pc_triton[gpu]' ({error})") from error
        launchers: dict[str, Any] = {}
        attending = (attention, attention_first)
        for module in (gaussian, gaussian_logvar, bernoulli, laplace, student_t, categorical, *attending, linear, fall):
            launchers.update({k: v for k, v in vars(module).items() if k.endswith(ENDINGS)})
        _triton = SimpleNamespace(**launchers, WIDEST=attention.WIDEST)
    return _triton


def backend(tensor: Tensor) -> Any:
    """Where the equations of ``tensor`` are computed: ``pc_triton.reference`` or the Triton launchers, same names.

    A float64 tensor and a GPU without triton are served by torch.
    """
    choice = _forced
    if choice is None:
        choice = "triton" if tensor.is_cuda and tensor.element_size() < 8 and _has_triton() else "torch"
    return triton_kernels() if choice == "triton" else reference


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
    choice = _fusing
    if choice is not None:
        return choice
    if not x.is_cuda or backend(x) is reference:
        return False
    return fused(torch.cuda.get_device_name(x.device), x.numel() // max(1, x.shape[-1]), *weight.shape, x.dtype)


@lru_cache(maxsize=4096)
def fused(device_name: str, rows: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether product and node in one kernel was faster on that device at the nearest shape measured.

    Never where nothing was measured, nor for rows of other than a multiple of 16 bytes, whose loads are slow.
    """
    if not rows or any(not size or size * dtype.itemsize % 16 for size in (n, k)):
        return False
    return _nearest(measured("linear", device_name, dtype), rows, n, k) > 1


def chains(x: Tensor, width: int, layers: int) -> bool:
    """Where `may_chain`: whether a step of so many linear layers, of that mean width, on x ``[S, K]`` is one launch."""
    if _chaining is not None:
        return _chaining
    return chained(torch.cuda.get_device_name(x.device), len(x), width, layers, x.dtype)


def may_chain(x: Tensor) -> bool:
    """Whether a training step on x can be one launch: x lies on a GPU on which one was measured."""
    if _chaining is not None:
        return _chaining
    if not x.is_cuda or backend(x) is reference:
        return False
    return bool(measured("chain", torch.cuda.get_device_name(x.device), x.dtype))


@lru_cache(maxsize=4096)
def chained(device_name: str, samples: int, width: int, layers: int, dtype: torch.dtype) -> bool:
    """Whether a training step in one launch was faster on that device at the nearest size measured.

    Never where nothing was measured, nor for more samples, width or layers than in any measurement.
    """
    rows = measured("chain", device_name, dtype)
    sizes = (samples, width, layers)
    if not rows or not samples or any(size > max(column) for size, column in zip(sizes, zip(*rows))):
        return False
    return _nearest(rows, *sizes) > 1


@lru_cache(maxsize=64)
def measured(what: str, device_name: str, dtype: torch.dtype) -> list[list[float]]:
    """The table's rows of that device and dtype, in "linear" or in "chain"."""
    return json.loads(TUNED.read_text()).get(what, {}).get(device_name, {}).get(str(dtype).removeprefix("torch."), [])


def _nearest(rows: list[list[float]], *sizes: int) -> float:
    """The ratio at the nearest sizes measured (in logarithms); 0 where there are none."""
    if not rows:
        return 0.0
    return min(rows, key=lambda row: sum(math.log(a / b) ** 2 for a, b in zip(row, sizes)))[-1]


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
