"""Gaussian value node of fixed variance: E = pi sum (u - mu)^2 / 2, and its inference step.

Pinchetti et al. 2022 (arXiv 2211.03481), eq. 5 for two Gaussians of one variance; the error form is that of Goemaere et
al. 2025 (arXiv 2505.20137).
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
    new_state,
    on_device,
    packed,
    row_tile,
    sum_partials,
    tile,
)


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
    """u and pi d^2 / 2 with d = u - mu. A program takes COLS elements of ROWS samples.

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
    pi = tl.load(precision_ptr + rows, mask=inside, other=1.0)
    tl.store(emission_ptr + offsets, u, mask=mask)
    tl.store(energy_ptr + partial, 0.5 * pi * tl.sum(d * d, axis=1, keep_dims=True), mask=inside)


@triton.jit
def _step(
    mu_ptr,  # [S, n]; not read in error form
    state_ptr,  # [S, n] float32, in error form or bfloat16; moved in place
    grad_ptr,  # [S, n]; read by the move alone
    precision_ptr,  # [S] float32
    keep_ptr,  # [S] float32
    move_ptr,  # [S] float32
    grad_mu_ptr,  # [S, n], mu's dtype; not written in error form, where it is grad
    n_samples,
    n,
    ERROR: tl.constexpr,
    HAS_STATE: tl.constexpr,
    MOVE: tl.constexpr,
    MOVED: tl.constexpr,  # only in state form, and with MOVE
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """d <- keep d - (move / pi) g; dE/dmu = -pi d. A program takes COLS elements of ROWS samples.

    Floor, bytes per element: error form read g and e (4 or 2), write e (4 or 2); state form, in float32, also read mu
    and write dE/dmu.
    """
    rows, cols, _ = row_tile(n_samples, n, ROWS, COLS)
    inside = rows < n_samples
    mask = inside & (cols < n)
    offsets = rows * n + cols
    pi, keep, push = coefficients(precision_ptr, keep_ptr, move_ptr, rows, inside, MOVE)
    d = tl.zeros([ROWS, COLS], tl.float32)
    if not ERROR:
        mu = tl.load(mu_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_STATE:
        d = tl.load(state_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if not ERROR:
            d -= mu
    shown = d
    if MOVE:
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        new = keep * d - push * g
        tl.store(state_ptr + offsets, new if ERROR else mu + new, mask=mask)
        if MOVED:
            shown = new
    if not ERROR:
        tl.store(grad_mu_ptr + offsets, -pi * shown, mask=mask)


def gaussian_forward(mu: Tensor, state: Tensor, precision: Tensor, *, form: str) -> tuple[Tensor, Tensor]:
    """Emission u, in mu's shape and dtype, and energy pi |u - mu|^2 / 2 ``[S]`` (Pinchetti et al. 2022, eq. 5).

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
    check_step(mu, state, grad, precision, keep, move, form)
    samples, error, moves, has_state = len(precision), form == "error", keep is not None, state is not None
    if moves and state is None:
        state = new_state(mu, form, state_dtype)
    grad_mu = torch.empty_like(mu, memory_format=torch.contiguous_format) if grad is None or not error else grad
    if mu.numel() == 0 or (error and not moves):
        return state, grad_mu
    n = mu.numel() // samples
    rows, cols, warps = tile(n, 1024, 1024)
    blocks = triton.cdiv(n, cols)
    with on_device(mu):
        _step[(triton.cdiv(samples, rows) * blocks,)](
            None if error else mu.contiguous(),
            state,
            packed(grad if moves else None),
            precision.contiguous(),
            packed(keep),
            packed(move),
            None if error else grad_mu,
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
