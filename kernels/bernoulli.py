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

from .common import (
    UNFUSED,
    check_node,
    check_step,
    coefficients,
    expm1,
    log1p,
    new_state,
    on_device,
    packed,
    row_tile,
    sum_partials,
    tile,
)


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), each to its own relative precision."""
    z = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + z)
    small = z / (1.0 + z)
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def softplus(x):
    """log(1 + e^x)."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def kl(u, mu, d, p, p_not):
    """p d - softplus(u) + softplus(mu) per element, d = u - mu; never negative.

    The KL stays when u, mu and d change sign, and at -|u| none of its terms is large. Near d = 0, where they cancel, it
    is a series in d whose coefficients are the derivatives of softplus at u.
    """
    z = tl.where(u < 0, -d, d)
    v = p * p_not
    t = tl.abs(p - p_not)
    fourth = (1.0 - 6.0 * v) * (1.0 / 24)
    fifth = t * (1.0 - 12.0 * v) * (1.0 / 120)
    sixth = (1.0 - 30.0 * v * (1.0 - 4.0 * v)) * (1.0 / 720)
    series = v * z * z * (0.5 + z * (t * (1.0 / 6) + z * (fourth + z * (fifth + z * sixth))))
    direct = softplus(tl.where(u < 0, mu, -mu)) - softplus(-tl.abs(u)) - tl.minimum(p, p_not) * z
    return tl.where(tl.abs(d) < 0.25, series, tl.maximum(direct, 0.0))


@triton.jit
def difference(p, p_not, q, q_not, d):
    """p - q = p (1 - q) (1 - e^-d), which does not cancel where d = u - mu is small."""
    return tl.where(d >= 0, p * q_not, -q * p_not) * -expm1(-tl.abs(d))


@triton.jit
def _forward(
    mu_ptr,  # [S, n]
    state_ptr,  # [S, n] float32, in error form or bfloat16
    precision_ptr,  # [S] float32
    emission_ptr,  # [S, n], mu's dtype
    energy_ptr,  # [S, blocks] float32
    n_samples,
    n,
    ERROR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """p and pi KL[p || q]. A program takes COLS elements of ROWS samples.

    Floor, bytes per element: read mu and the state (4 or 2), write the emission.
    """
    rows, cols, partial = row_tile(n_samples, n, ROWS, COLS)
    inside = rows < n_samples
    mask = inside & (cols < n)
    offsets = rows * n + cols
    mu = tl.load(mu_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    state = tl.load(state_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    u = mu + state if ERROR else state
    d = state if ERROR else state - mu
    p, p_not = sigmoids(u)
    pi = tl.load(precision_ptr + rows, mask=inside, other=1.0)
    tl.store(emission_ptr + offsets, p, mask=mask)
    tl.store(energy_ptr + partial, pi * tl.sum(kl(u, mu, d, p, p_not), axis=1, keep_dims=True), mask=inside)


@triton.jit
def _step(
    mu_ptr,  # [S, n]
    state_ptr,  # [S, n] float32, in error form or bfloat16; moved in place
    grad_ptr,  # [S, n]
    precision_ptr,  # [S] float32
    keep_ptr,  # [S] float32
    move_ptr,  # [S] float32
    grad_mu_ptr,  # [S, n], mu's dtype
    n_samples,
    n,
    ERROR: tl.constexpr,
    HAS_STATE: tl.constexpr,
    MOVE: tl.constexpr,
    MOVED: tl.constexpr,  # only in state form, and with MOVE
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """d <- keep d - (move / pi) g; dF/dmu = pi (q - p), in error form + p (1 - p) (pi d + g).

    A program takes COLS elements of ROWS samples.
    Floor, bytes per element: read mu, g and the state (4 or 2), write the state (4 or 2) and dF/dmu.
    """
    rows, cols, _ = row_tile(n_samples, n, ROWS, COLS)
    inside = rows < n_samples
    mask = inside & (cols < n)
    offsets = rows * n + cols
    pi, keep, push = coefficients(precision_ptr, keep_ptr, move_ptr, rows, inside, MOVE)
    mu = tl.load(mu_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    q, q_not = sigmoids(mu)
    u, p, p_not = mu, q, q_not
    d = tl.zeros([ROWS, COLS], tl.float32)
    if HAS_STATE:
        d = tl.load(state_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if ERROR:
            u = mu + d
        else:
            u = d
            d -= mu
        p, p_not = sigmoids(u)
    if ERROR or MOVE:
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad_mu = -pi * difference(p, p_not, q, q_not, d)
    if ERROR:
        grad_mu += p * p_not * (pi * d + g)
    if MOVE:
        new = keep * d - push * g
        tl.store(state_ptr + offsets, new if ERROR else mu + new, mask=mask)
        if MOVED:
            p, p_not = sigmoids(mu + new)
            grad_mu = -pi * difference(p, p_not, q, q_not, new)
    tl.store(grad_mu_ptr + offsets, grad_mu, mask=mask)


def bernoulli_forward(mu: Tensor, state: Tensor, precision: Tensor, *, form: str) -> tuple[Tensor, Tensor]:
    """Emission sigmoid(u), in mu's shape and dtype, and energy pi KL ``[S]`` (Pinchetti et al. 2022, eq. 5).

    mu ``[S * r, ...]`` float32, float16 or bfloat16, of any strides; state the same shape, contiguous: u in float32, or
    in error form u - mu in float32 or bfloat16; precision ``[S]`` float32.
    Raises ValueError for a form, shape or device that does not fit, TypeError for a dtype that does not.
    """
    check_node(mu, state, precision, form)
    samples, emission = len(precision), torch.empty_like(mu, memory_format=torch.contiguous_format)
    if mu.numel() == 0:
        return emission, torch.zeros_like(precision)
    n = mu.numel() // samples
    rows, cols, warps = tile(n, 1024, 1024)
    blocks = triton.cdiv(n, cols)
    energy = torch.empty(samples, blocks, device=mu.device)
    with on_device(mu):
        _forward[(triton.cdiv(samples, rows) * blocks,)](
            mu.contiguous(),
            state,
            precision.contiguous(),
            emission,
            energy,
            samples,
            n,
            ERROR=form == "error",
            ROWS=rows,
            COLS=cols,
            num_warps=warps,
            **UNFUSED,
        )
    return emission, sum_partials(energy, samples)


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
    check_step(mu, state, grad, precision, keep, move, form)
    samples, error, moves, has_state = len(precision), form == "error", keep is not None, state is not None
    if moves and state is None:
        state = new_state(mu, form, state_dtype)
    grad_mu = torch.empty_like(mu, memory_format=torch.contiguous_format)
    if mu.numel() == 0:
        return state, grad_mu
    n = mu.numel() // samples
    rows, cols, warps = tile(n, 1024, 1024)
    blocks = triton.cdiv(n, cols)
    with on_device(mu):
        _step[(triton.cdiv(samples, rows) * blocks,)](
            mu.contiguous(),
            state,
            packed(grad if error or moves else None),
            precision.contiguous(),
            packed(keep),
            packed(move),
            grad_mu,
            samples,
            n,
            ERROR=error,
            HAS_STATE=has_state,
            MOVE=moves,
            MOVED=moved and moves and not error,
            ROWS=rows,
            COLS=cols,
            num_warps=warps,
            **UNFUSED,
        )
    return state, grad_mu
