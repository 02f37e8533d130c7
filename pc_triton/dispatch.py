"""The rules that decide who computes: GPU tensors go to the Triton kernels, CPU tensors to plain torch.

Where a linear layer and its node could be one kernel, a table of measured times decides.
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
_triton: Any = None
ENDINGS = ("_forward", "_step", "_backward", "_gradient", "_gradient_")

TUNED = Path(__file__).with_name("tuned.json")
"""By device and dtype, rows [rows, N, K, ratio]: how many times as long as the fused kernels a training step's products
of that shape and their node took apart (cuBLAS, then the node's kernel); written by bench/tune_linear.py."""


def triton_kernels() -> Any:
    """The launchers of ``kernels/`` under their common names. Raises ImportError, with the remedy, without triton."""
    global _triton
    if _triton is None:
        try:
            from .kernels import attention, bernoulli, categorical, gaussian, gaussian_logvar, linear
        except ImportError as error:
            raise ImportError(f"the Triton kernels need triton: pip install 'pc_triton[gpu]' ({error})") from error
        launchers: dict[str, Any] = {}
        for module in (gaussian, gaussian_logvar, bernoulli, categorical, attention, linear):
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
    """Whether product and node in one kernel was faster on that device at the nearest shape measured (in logarithms).

    Never where nothing was measured, nor for rows of other than a multiple of 16 bytes, whose loads are slow.
    """
    measured = json.loads(TUNED.read_text()).get(device_name, {}).get(str(dtype).removeprefix("torch."), [])
    if not measured or not rows or any(not size or size * dtype.itemsize % 16 for size in (n, k)):
        return False
    *_, ratio = min(measured, key=lambda m: sum(math.log(a / b) ** 2 for a, b in zip(m, (rows, n, k))))
    return ratio > 1


@contextlib.contextmanager
def use_fused(choice: bool) -> Iterator[None]:
    """Within this context every linear layer and its Gaussian node are one kernel, or none is: for tests."""
    global _fusing
    before, _fusing = _fusing, choice
    try:
        yield
    finally:
        _fusing = before


def _has_triton() -> bool:
    try:
        triton_kernels()
    except ImportError:
        return False
    return True
