"""Student-t value node: E = pi sum (nu + 1) / 2 log(1 + d^2 / nu), d = (u - mu) / unit, and its inference step.

The parameter of the device functions is nu, an argument at run time: one compiled kernel serves every nu.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it beside each device function)
from torch import Tensor

from .common import log1p
from .elementwise import Family, forward, step


@triton.jit
def emit(u, mu, d, parameter):
    """u and (nu + 1) / 2 log(1 + d^2 / nu)."""
    return u, 0.5 * (parameter + 1.0) * log1p(d * d / parameter)


@triton.jit
def slopes(u, mu, d, g, pi, parameter):
    """With s = d / (1 + d^2 / nu): -pi s (nu + 1) / nu, g and s. The curvature at u = mu is (nu + 1) / nu."""
    slope = d / (1.0 + d * d / parameter)
    return -pi * ((parameter + 1.0) / parameter) * slope, g, slope


STUDENT_T = Family(emit, slopes, location=True)


def student_t_forward(
    mu: Tensor, state: Tensor, precision: Tensor, unit: Tensor | None = None, *, nu: float, form: str
) -> tuple[Tensor, Tensor]:
    """Emission u, in mu's shape and dtype, and energy ``[S]``; arguments and errors as in `elementwise.forward`.

    unit ``[S]`` float32: the scale in which each sample's error counts; None for 1.
    """
    return forward(STUDENT_T, mu, state, precision, form=form, unit=unit, parameter=nu)


def student_t_step(
    mu: Tensor,
    state: Tensor | None,
    grad: Tensor | None,
    precision: Tensor,
    unit: Tensor | None,
    keep: Tensor | None,
    move: Tensor | None,
    *,
    nu: float,
    form: str,
    moved: bool = False,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The moved state and dF/dmu, in error form ``grad`` itself; arguments and errors as in `elementwise.step`."""
    options: dict[str, Any] = {"form": form, "moved": moved, "state_dtype": state_dtype}
    return step(
        STUDENT_T, mu, state, grad, precision, keep, move, unit=unit, parameter=nu, variance=nu / (nu + 1), **options
    )
