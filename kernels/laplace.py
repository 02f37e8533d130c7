"""Laplace value node of scale 1: E = pi sum (|d| + e^-|d| - 1), d = (u - mu) / unit, and its inference step."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import exp_tail, expm1
from .elementwise import Family, forward, step


@triton.jit
def emit(u, mu, d, parameter):
    """u and |d| + e^-|d| - 1, the tail of the exponential at -|d|, which does not cancel near 0."""
    return u, exp_tail(-tl.abs(d))


@triton.jit
def slopes(u, mu, d, g, pi, parameter):
    """With s = sign(d) (1 - e^-|d|): -pi s, g and s. The curvature at u = mu is 1."""
    rise = -expm1(-tl.abs(d))
    slope = tl.where(d < 0, -rise, rise)
    return -pi * slope, g, slope


LAPLACE = Family(emit, slopes, location=True)


def laplace_forward(
    mu: Tensor, state: Tensor, precision: Tensor, unit: Tensor | None = None, *, form: str
) -> tuple[Tensor, Tensor]:
    """Emission u, in mu's shape and dtype, and energy ``[S]``; arguments and errors as in `elementwise.forward`.

    unit ``[S]`` float32: the scale in which each sample's error counts; None for 1.
    """
    return forward(LAPLACE, mu, state, precision, form=form, unit=unit)


def laplace_step(
    mu: Tensor,
    state: Tensor | None,
    grad: Tensor | None,
    precision: Tensor,
    unit: Tensor | None,
    keep: Tensor | None,
    move: Tensor | None,
    *,
    form: str,
    moved: bool = False,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The moved state and dF/dmu, in error form ``grad`` itself; arguments and errors as in `elementwise.step`."""
    options: dict[str, Any] = {"form": form, "moved": moved, "state_dtype": state_dtype}
    return step(LAPLACE, mu, state, grad, precision, keep, move, unit=unit, **options)
