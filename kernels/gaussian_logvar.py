"""Gaussian value node with its own variance: rows [mean | log variance], emission m + e^(s/2) xi.

E = pi/2 sum [s^ - s + (e^s + (m - m^)^2) e^-s^ - 1]: Pinchetti et al. 2022 (arXiv 2211.03481), eq. 5 for two Gaussians.
The step is the natural gradient's (Amari 1998), with V = (e^s^, 2 ds / (e^ds - 1)): at the prediction the inverse
Fisher information of (m, s), and elsewhere what makes the energy's part of the move linear in ds, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    UNFUSED,
    cdiv,
    changes,
    check_node,
    check_step,
    coefficients,
    count_rows,
    exp_tail,
    expm1,
    moved_by,
    new_state,
    on_device,
    packed,
    row_tile,
    sum_partials,
    tile,
)


@triton.jit
def _over(dm, s_hat):
    """dm e^-s^, with e^-s^ no larger than float32's numbers: an infinite one times a dm of 0 would be NaN."""
    return dm * tl.exp(tl.minimum(-s_hat, 87.7, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _forward(
    mu_ptr,  # [R, 2 C]
    state_ptr,  # [R, 2 C] float32, in error form or bfloat16
    precision_ptr,  # [S] float32
    noise_ptr,  # [R, C]
    emission_ptr,  # [R, C], mu's dtype
    energy_ptr,  # [R, blocks] float32
    n_rows,
    n,
    rows_per_sample,
    ERROR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """m + e^(s/2) xi and pi/2 [e^ds - 1 - ds + dm^2 e^-s^]. A program takes COLS of the C pairs (m, s) of ROWS rows.

    Floor, bytes per pair: read mu (two), the state (8 or 4) and xi, write the emission.
    """
    rows, cols, partial = row_tile(n_rows, n, ROWS, COLS)
    inside = rows < n_rows
    mask = inside & (cols < n)
    mean = rows * (2 * n) + cols
    log_variance = mean + n
    m_hat = tl.load(mu_ptr + mean, mask=mask, other=0.0).to(tl.float32)
    s_hat = tl.load(mu_ptr + log_variance, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(state_ptr + mean, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(state_ptr + log_variance, mask=mask, other=0.0).to(tl.float32)
    xi = tl.load(noise_ptr + rows * n + cols, mask=mask, other=0.0).to(tl.float32)
    dm, ds = m, s
    if ERROR:
        m += m_hat
        s += s_hat
    else:
        dm -= m_hat
        ds -= s_hat
    sample = (rows.to(tl.int32) // rows_per_sample).to(tl.int64)  # a 64-bit division spills registers
    pi = tl.load(precision_ptr + sample, mask=inside, other=1.0)
    kl = exp_tail(ds) + dm * _over(dm, s_hat)
    tl.store(emission_ptr + rows * n + cols, m + tl.exp(0.5 * s) * xi, mask=mask)
    tl.store(energy_ptr + partial, 0.5 * pi * tl.sum(kl, axis=1, keep_dims=True), mask=inside)


@triton.jit
def _step(
    mu_ptr,  # [R, 2 C]
    state_ptr,  # [R, 2 C] float32, in error form or bfloat16; moved in place
    grad_ptr,  # [R, C]
    precision_ptr,  # [S] float32
    keep_ptr,  # [S] float32
    move_ptr,  # [S] float32
    noise_ptr,  # [R, C]
    grad_mu_ptr,  # [R, 2 C], mu's dtype
    n_rows,
    n,
    rows_per_sample,
    ERROR: tl.constexpr,
    HAS_STATE: tl.constexpr,
    MOVE: tl.constexpr,
    MOVED: tl.constexpr,  # only in state form, and with MOVE
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The natural step of both halves and dF/dmu, with h = g xi e^(s/2), c = move / pi and k = keep:

    dm <- k dm - c e^s^ g,  ds <- k ds - c h ds / (e^ds - 1);
    dF/dmu = -pi (dm e^-s^, (e^ds - 1 + dm^2 e^-s^) / 2), or in error form (g, (h - pi dm^2 e^-s^) / 2).

    A program takes COLS of the C pairs (m, s) of ROWS rows.
    Floor, bytes per pair: read mu (two), the state (8 or 4), g and xi, write the state (8 or 4) and dF/dmu (two).
    """
    rows, cols, _ = row_tile(n_rows, n, ROWS, COLS)
    inside = rows < n_rows
    mask = inside & (cols < n)
    mean = rows * (2 * n) + cols
    log_variance = mean + n
    sample = (rows.to(tl.int32) // rows_per_sample).to(tl.int64)  # a 64-bit division spills registers
    pi, keep, push = coefficients(precision_ptr, keep_ptr, move_ptr, sample, inside, MOVE)
    s_hat = tl.load(mu_ptr + log_variance, mask=mask, other=0.0).to(tl.float32)
    dm = tl.zeros([ROWS, COLS], tl.float32)
    ds = dm
    if not ERROR:
        m_hat = tl.load(mu_ptr + mean, mask=mask, other=0.0).to(tl.float32)
    if HAS_STATE:
        dm = tl.load(state_ptr + mean, mask=mask, other=0.0).to(tl.float32)
        ds = tl.load(state_ptr + log_variance, mask=mask, other=0.0).to(tl.float32)
        if not ERROR:
            dm -= m_hat
            ds -= s_hat
    distance = dm * _over(dm, s_hat)
    if ERROR or MOVE:
        g = tl.load(grad_ptr + rows * n + cols, mask=mask, other=0.0).to(tl.float32)
        xi = tl.load(noise_ptr + rows * n + cols, mask=mask, other=0.0).to(tl.float32)
        h = g * xi * tl.exp(0.5 * (s_hat + ds))
    if ERROR:
        tl.store(grad_mu_ptr + mean, g, mask=mask)
        tl.store(grad_mu_ptr + log_variance, 0.5 * (h - pi * distance), mask=mask)
    shown_m, shown_s = dm, ds
    if MOVE:
        new_m = moved_by(dm, tl.exp(s_hat) * g, keep, push)
        slope = tl.where(ds == 0.0, 1.0, ds / tl.where(ds == 0.0, 1.0, expm1(ds)))
        new_s = moved_by(ds, h * slope, keep, push)
        written = mask
        if HAS_STATE and not ERROR:
            written = mask & changes(keep, push)
        tl.store(state_ptr + mean, new_m if ERROR else m_hat + new_m, mask=written)
        tl.store(state_ptr + log_variance, new_s if ERROR else s_hat + new_s, mask=written)
        if MOVED:
            shown_m, shown_s = new_m, new_s
    if not ERROR:
        scaled = _over(shown_m, s_hat)
        tl.store(grad_mu_ptr + mean, -pi * scaled, mask=mask)
        tl.store(grad_mu_ptr + log_variance, -0.5 * pi * (expm1(shown_s) + shown_m * scaled), mask=mask)


def gaussian_logvar_forward(
    mu: Tensor, state: Tensor, precision: Tensor, noise: Tensor, *, form: str
) -> tuple[Tensor, Tensor]:
    """Emission m + e^(s/2) xi ``[..., C]``, in mu's dtype, and energy pi KL ``[S]`` (Pinchetti et al. 2022, eq. 5).

    mu ``[S * r, ..., 2 C]``, noise xi ``[S * r, ..., C]``, float32, float16 or bfloat16, of any strides; state mu's
    shape, contiguous: u in float32, or in error form u - mu in float32 or bfloat16; precision ``[S]`` float32.
    Raises ValueError for a form, shape or device that does not fit or more than 2^31 - 1 rows, TypeError for a dtype.
    """
    check_node(mu, state, precision, form, noise)
    samples, emission = len(precision), torch.empty(noise.shape, dtype=mu.dtype, device=mu.device)
    if mu.numel() == 0:
        return emission, torch.zeros_like(precision)
    n = noise.shape[-1]
    n_rows = count_rows(mu)
    rows, cols, warps = tile(n, 1024, 1024)
    blocks = cdiv(n, cols)
    energy = torch.empty(n_rows, blocks, dtype=torch.float32, device=mu.device)
    with on_device(mu):
        _forward[(cdiv(n_rows, rows) * blocks,)](
            mu.contiguous(),
            state,
            precision.contiguous(),
            noise.contiguous(),
            emission,
            energy,
            n_rows,
            n,
            n_rows // samples,
            ERROR=form == "error",
            ROWS=rows,
            COLS=cols,
            num_warps=warps,
            **UNFUSED,
        )
    return emission, sum_partials(energy, samples)


def gaussian_logvar_step(
    mu: Tensor,
    state: Tensor | None,
    grad: Tensor | None,
    precision: Tensor,
    keep: Tensor | None,
    move: Tensor | None,
    noise: Tensor,
    *,
    form: str,
    moved: bool = False,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The natural step of (m, s), written out in `_step`: the state and dF/dmu.

    mu ``[S * r, ..., 2 C]``, grad and noise xi ``[S * r, ..., C]``, float32, float16 or bfloat16, of any strides; state
    mu's shape, contiguous, float32 or in error form bfloat16, moved in place (None: u = mu, and the new one is
    returned, of state_dtype; by default float32); precision, keep, move ``[S]`` float32. Without keep and move it is
    the learning pass: the state stays, and in state form grad may be None.
    dF/dmu has mu's shape and dtype.
    Raises ValueError for a form, shape or device that does not fit or more than 2^31 - 1 rows, TypeError for a dtype.
    """
    check_step(mu, state, grad, precision, keep, move, form, noise)
    samples, error, moves, has_state = len(precision), form == "error", keep is not None, state is not None
    if moves and state is None:
        state = new_state(mu, form, state_dtype)
    grad_mu = torch.empty_like(mu, memory_format=torch.contiguous_format)
    if mu.numel() == 0:
        return state, grad_mu
    n = noise.shape[-1]
    n_rows = count_rows(mu)
    rows, cols, warps = tile(n, 1024, 1024)
    blocks = cdiv(n, cols)
    with on_device(mu):
        _step[(cdiv(n_rows, rows) * blocks,)](
            mu.contiguous(),
            state,
            packed(grad if error or moves else None),
            precision.contiguous(),
            packed(keep),
            packed(move),
            noise.contiguous(),
            grad_mu,
            n_rows,
            n,
            n_rows // samples,
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
