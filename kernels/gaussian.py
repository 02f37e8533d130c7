"""Gaussian value node of fixed variance: E = pi sum (u - mu)^2 / 2, and its inference step.

Pinchetti et al. 2022 (arXiv 2211.03481), eq. 5 for two Gaussians of one variance; the error form is that of Goemaere et
al. 2025 (arXiv 2505.20137).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it beside each device function)
from torch import Tensor

from .elementwise import Family, forward, step


@triton.jit
def emit(u, mu, d, parameter):
    """u and d^2 / 2."""
    return u, 0.5 * d * d


@triton.jit
def slopes(u, mu, d, g, pi, parameter):
    """-pi d, g and d."""
    return -pi * d, g, d


GAUSSIAN = Family(emit, slopes, location=True, linear=True)


def gaussian_forward(
    mu: Tensor, state: Tensor, precision: Tensor, *, form: str, move: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Emission u, in mu's shape and dtype, and energy pi |u - mu|^2 / 2 ``[S]`` (Pinchetti et al. 2022, eq. 5).

    mu ``[S * r, ...]`` float32, float16 or bfloat16, of any strides; state the same shape, contiguous: u in float32, or
    in error form u - mu in float32 or bfloat16; precision ``[S]`` float32. move ``[S]`` float32: in error form the
    state is the gradient g instead, of any of those dtypes and any strides, and e = -(move / pi) g, moved from 0.
    Raises ValueError for a form, shape or device that does not fit, TypeError for a dtype that does not.
    """
    return forward(GAUSSIAN, mu, state, precision, form=form, move=move)


def gaussian_step(
    mu: Tensor,
    state: Tensor | None,
    grad: Tensor | None,
    precision: Tensor,
    keep: Tensor | None,
    move: Tensor | None,
    *,
    form: str,
    moved: bool = False,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor]:
    """d <- keep d - (move / pi) grad with d = u - mu: the state and dF/dmu = -pi d.

    mu, grad ``[S * r, ...]`` float32, float16 or bfloat16, of any strides; state the same shape, contiguous, float32
    or in error form bfloat16, moved in place (None: u = mu, and the new one is returned, of state_dtype; by default
    float32); precision, keep, move ``[S]`` float32. Without keep and move it is the learning pass: the state stays, and
    in state form grad may be None. dF/dmu has mu's shape and dtype;
    in error form it is ``grad`` itself.
    Raises ValueError for a form, shape or device that does not fit, TypeError for a dtype that does not.
    """
    return step(GAUSSIAN, mu, state, grad, precision, keep, move, form=form, moved=moved, state_dtype=state_dtype)
