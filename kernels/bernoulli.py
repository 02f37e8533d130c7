"""Bernoulli value node with logits: p = sigmoid(u), q = sigmoid(mu), E = pi sum KL[p || q], and its inference step.

Pinchetti et al. 2022 (arXiv 2211.03481), eq. 5 for two Bernoullis; the step is the natural gradient's (Amari 1998),
whose metric p (1 - p) cancels the Jacobian of the emission; the error form is that of Goemaere et al. 2025 (arXiv
2505.20137).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import exp, expm1
from .elementwise import Family, forward, step


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), each to its own relative precision."""
    z = exp(-tl.abs(x))
    large = 1.0 / (1.0 + z)
    small = z * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def log_ratio(y, x):
    """log((1 + y) / (1 + x)) for x, y in [0, 1], to relative precision: 2 artanh s, s = (y - x) / (2 + x + y)."""
    s = (y - x) / (2.0 + (x + y))
    square = s * s
    series = tl.fma(square, 0.26920923590660095, 0.2822650671005249)  # minimax over s^2 <= 1/9
    series = tl.fma(square, tl.fma(square, series, 0.4000791907310486), 0.6666663885116577)
    return tl.fma(s * square, series, 2.0 * s)


@triton.jit
def kl(u, mu, d, p, p_not):
    """p d - softplus(u) + softplus(mu) per element, d = u - mu; never negative.

    The KL stays when u, mu and d change sign, and at -|u| none of its terms is large. Near d = 0, where they cancel, it
    is a series in d whose coefficients are the derivatives of softplus at u.
    """
    z = tl.where(u < 0, -d, d)
    v = p * p_not
    t = tl.abs(p - p_not)
    fourth = tl.fma(v, -6.0 / 24, 1.0 / 24)
    fifth = t * tl.fma(v, -12.0 / 120, 1.0 / 120)
    sixth = tl.fma(v, tl.fma(v, 120.0 / 720, -30.0 / 720), 1.0 / 720)
    series = tl.fma(z, tl.fma(z, tl.fma(z, sixth, fifth), fourth), t * (1.0 / 6))
    series = v * z * z * tl.fma(z, series, 0.5)
    rise = tl.maximum(tl.where(u < 0, mu, -mu), 0.0) + log_ratio(exp(-tl.abs(mu)), exp(-tl.abs(u)))
    return tl.where(tl.abs(d) < 0.25, series, tl.maximum(rise - tl.minimum(p, p_not) * z, 0.0))


@triton.jit
def difference(p, p_not, q, q_not, d):
    """p - q = p (1 - q) (1 - e^-d), which does not cancel where d = u - mu is small."""
    return tl.where(d >= 0, p * q_not, -q * p_not) * -expm1(-tl.abs(d))


@triton.jit
def emit(u, mu, d, parameter):
    """p and KL[p || q]."""
    p, p_not = sigmoids(u)
    return p, kl(u, mu, d, p, p_not)


@triton.jit
def slopes(u, mu, d, g, pi, parameter):
    """pi (q - p), that + p (1 - p) (pi d + g), and d."""
    p, p_not = sigmoids(u)
    q, q_not = sigmoids(mu)
    local = -pi * difference(p, p_not, q, q_not, d)
    return local, local + p * p_not * (pi * d + g), d


BERNOULLI = Family(emit, slopes, linear=True)


def bernoulli_forward(mu: Tensor, state: Tensor, precision: Tensor, *, form: str) -> tuple[Tensor, Tensor]:
    """Emission sigmoid(u), in mu's shape and dtype, and energy pi KL ``[S]`` (Pinchetti et al. 2022, eq. 5).

    mu ``[S * r, ...]`` float32, float16 or bfloat16, of any strides; state the same shape, contiguous: u in float32, or
    in error form u - mu in float32 or bfloat16; precision ``[S]`` float32.
    Raises ValueError for a form, shape or device that does not fit, TypeError for a dtype that does not.
    """
    return forward(BERNOULLI, mu, state, precision, form=form)


def bernoulli_step(
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
    """d <- keep d - (move / pi) grad with d = u - mu: the state and dF/dmu.

    dF/dmu = pi (q - p), in error form + p (1 - p) (pi d + grad), in mu's shape and dtype.
    mu, grad ``[S * r, ...]`` float32, float16 or bfloat16, of any strides; state the same shape, contiguous, float32
    or in error form bfloat16, moved in place (None: u = mu, and the new one is returned, of state_dtype; by default
    float32); precision, keep, move ``[S]`` float32. Without keep and move it is the learning pass: the state stays, and
    in state form grad may be None.
    Raises ValueError for a form, shape or device that does not fit, TypeError for a dtype that does not.
    """
    return step(BERNOULLI, mu, state, grad, precision, keep, move, form=form, moved=moved, state_dtype=state_dtype)
