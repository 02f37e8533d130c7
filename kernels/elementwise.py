"""One pair of kernels for every family whose units are independent; the family is two device functions.

emit(u, mu, d, parameter) gives the emission and the energy per element, KL[D(u) || D(mu)].
slopes(u, mu, d, g, pi, parameter) gives pi dKL/dmu with u held, dF/dmu with e = u - mu held, and the natural gradient
V dKL/du, where V is the inverse of the energy's curvature at u = mu. Here d = u - mu, and g is what the children send
back.
``parameter`` is one number of the family's own, such as degrees of freedom, or None. A location family may be given a
scale per sample, ``unit``: its functions then see d / unit and pi / unit, and may read neither u nor mu but to emit u.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    UNFUSED,
    cdiv,
    changes,
    check,
    check_node,
    check_step,
    coefficients,
    moved_by,
    new_state,
    on_device,
    packed,
    row_tile,
    sum_partials,
    tile,
)


class Family(NamedTuple):
    """A family's device functions, each under @triton.jit."""

    emit: Any
    slopes: Any
    location: bool = False  # The emission is u and the energy a function of d: then dF/dmu in error form is grad.
    linear: bool = False  # The natural gradient is d itself, so that the move is keep d - (move / pi) g.


@triton.jit
def _forward(
    mu_ptr,  # [S, n]
    state_ptr,  # [S, n] float32, in error form or bfloat16
    precision_ptr,  # [S] float32
    unit_ptr,  # [S] float32 > 0, or None
    move_ptr,  # [S] float32: the state is then g, of mu's dtype, and e = -(move / pi) g; or None
    emission_ptr,  # [S, n], mu's dtype
    energy_ptr,  # [S, blocks] float32
    parameter,  # a float, or None
    n_samples,
    n,
    EMIT: tl.constexpr,
    ERROR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The emission and pi KL. A program takes COLS elements of ROWS samples.

    Floor, bytes per element: read mu and the state (4 or 2), or g, and write the emission.
    """
    rows, cols, partial = row_tile(n_samples, n, ROWS, COLS)
    inside = rows < n_samples
    mask = inside & (cols < n)
    offsets = rows * n + cols
    mu = tl.load(mu_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    state = tl.load(state_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if move_ptr is not None:
        move = tl.load(move_ptr + rows, mask=inside, other=0.0)
        state = moved_by(0.0, state, 0.0, move / tl.load(precision_ptr + rows, mask=inside, other=1.0))
    u = mu + state if ERROR else state
    d = state if ERROR else state - mu
    if unit_ptr is not None:
        d = d / tl.load(unit_ptr + rows, mask=inside, other=1.0)
    emission, energy = EMIT(u, mu, d, parameter)
    pi = tl.load(precision_ptr + rows, mask=inside, other=1.0)
    tl.store(emission_ptr + offsets, emission, mask=mask)
    # Masked elements have u = mu = 0, where every energy is 0.
    tl.store(energy_ptr + partial, pi * tl.sum(energy, axis=1, keep_dims=True), mask=inside)


@triton.jit
def _step(
    mu_ptr,  # [S, n]; not read in error form of a location family
    state_ptr,  # [S, n] float32, in error form or bfloat16; moved in place
    grad_ptr,  # [S, n]
    precision_ptr,  # [S] float32
    keep_ptr,  # [S] float32
    move_ptr,  # [S] float32
    unit_ptr,  # [S] float32 > 0, or None
    grad_mu_ptr,  # [S, n], mu's dtype; not written in error form of a location family, where it is grad
    parameter,  # a float, or None
    variance,  # a float: V in units of unit^2; None for a linear family
    n_samples,
    n,
    SLOPES: tl.constexpr,
    LOCATION: tl.constexpr,
    LINEAR: tl.constexpr,
    ERROR: tl.constexpr,
    HAS_STATE: tl.constexpr,
    MOVE: tl.constexpr,
    MOVED: tl.constexpr,  # only in state form, and with MOVE
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """d <- d - (1 - keep) V dKL/du - V (move / pi) g, and dF/dmu. V is in g already where the family is linear.

    A program takes COLS elements of ROWS samples.

    Floor, bytes per element: read mu, g and the state (4 or 2), write the state (4 or 2) and dF/dmu; in error form of a
    location family neither mu nor dF/dmu.
    """
    rows, cols, _ = row_tile(n_samples, n, ROWS, COLS)
    inside = rows < n_samples
    mask = inside & (cols < n)
    offsets = rows * n + cols
    pi, keep, push = coefficients(precision_ptr, keep_ptr, move_ptr, rows, inside, MOVE)
    d = tl.zeros([ROWS, COLS], tl.float32)
    mu = d
    if not (ERROR and LOCATION):
        mu = tl.load(mu_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    u = mu
    if HAS_STATE:
        d = tl.load(state_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if ERROR:
            u = mu + d
        else:
            u = d
            d -= mu
    g = d
    if ERROR or MOVE:
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    unit = 1.0
    if unit_ptr is not None:
        unit = tl.load(unit_ptr + rows, mask=inside, other=1.0)
    local, total, natural = SLOPES(
        u, mu, d / unit if unit_ptr is not None else d, g, pi / unit if unit_ptr is not None else pi, parameter
    )
    if MOVE:
        new = moved_by(d, g, keep, push)
        if not LINEAR:
            moved = d - (1.0 - keep) * unit * natural - push * (unit * unit * variance) * g
            new = tl.where(push == 0.0, new, moved)
        written = mask
        if HAS_STATE and not ERROR:
            written = mask & changes(keep, push)
        tl.store(state_ptr + offsets, new if ERROR else mu + new, mask=written)
        if MOVED:
            local, total, natural = SLOPES(
                mu + new,
                mu,
                new / unit if unit_ptr is not None else new,
                g,
                pi / unit if unit_ptr is not None else pi,
                parameter,
            )
    if not (ERROR and LOCATION):
        tl.store(grad_mu_ptr + offsets, total if ERROR else local, mask=mask)


def _scale(unit: Tensor | None, precision: Tensor, family: Family) -> Tensor | None:
    """The unit, never 0: a node whose unit is 0 has no error to count."""
    if unit is None:
        return None
    if not family.location or family.linear:
        raise ValueError(
            "unit is for a location family whose step is not linear: put it into precision, or leave it out"
        )
    check("unit", unit, precision, precision.shape, beside="precision", coefficient=True)
    return unit.contiguous().clamp_min(torch.finfo(torch.float32).tiny)


def forward(
    family: Family,
    mu: Tensor,
    state: Tensor,
    precision: Tensor,
    *,
    form: str,
    unit: Tensor | None = None,
    parameter: float | None = None,
    move: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The family's emission, in mu's shape and dtype, and its energy pi KL ``[S]`` (Pinchetti et al. 2022, eq. 5).

    mu ``[S * r, ...]`` float32, float16 or bfloat16, of any strides; state the same shape, contiguous: u in float32, or
    in error form u - mu in float32 or bfloat16; precision ``[S]`` float32. move ``[S]`` float32: the state is the
    gradient g instead, as mu is of any dtype and strides, and e = -(move / pi) g; for a linear family in error form.
    Raises ValueError for a form, shape or device that does not fit, TypeError for a dtype that does not.
    """
    check_node(mu, state if move is None else None, precision, form)
    if move is not None:
        if form != "error" or not family.linear:
            raise ValueError("move is for the error form of a family whose step is linear: give the state itself")
        check("move", move, mu, precision.shape, coefficient=True)
        check("grad", state, mu, mu.shape)
        state = state.contiguous()
    unit = _scale(unit, precision, family)
    samples, emission = len(precision), torch.empty_like(mu, memory_format=torch.contiguous_format)
    if mu.numel() == 0:
        return emission, torch.zeros_like(precision)
    n = mu.numel() // samples
    rows, cols, warps = tile(n, 1024, 1024)
    blocks = cdiv(n, cols)
    energy = torch.empty(samples, blocks, dtype=torch.float32, device=mu.device)
    with on_device(mu):
        _forward[(cdiv(samples, rows) * blocks,)](
            mu.contiguous(),
            state,
            precision.contiguous(),
            unit,
            packed(move),
            emission,
            energy,
            parameter,
            samples,
            n,
            EMIT=family.emit,
            ERROR=form == "error",
            ROWS=rows,
            COLS=cols,
            num_warps=warps,
            **UNFUSED,
        )
    return emission, sum_partials(energy, samples)


def step(
    family: Family,
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
    unit: Tensor | None = None,
    parameter: float | None = None,
    variance: float = 1.0,
) -> tuple[Tensor | None, Tensor]:
    """The moved state, and dF/dmu in mu's shape and dtype; in error form of a location family that is ``grad`` itself.

    mu, grad ``[S * r, ...]`` float32, float16 or bfloat16, of any strides; state the same shape, contiguous, float32
    or in error form bfloat16, moved in place (None: u = mu, and the new one is returned, of state_dtype; by default
    float32); precision, keep, move ``[S]`` float32. Without keep and move it is the learning pass: the state stays, and
    in state form grad may be None. variance: V at u = mu, in units of unit^2.
    Raises ValueError for a form, shape or device that does not fit, TypeError for a dtype that does not.
    """
    check_step(mu, state, grad, precision, keep, move, form)
    unit = _scale(unit, precision, family)
    samples, error, moves, has_state = len(precision), form == "error", keep is not None, state is not None
    handed_on = error and family.location
    if moves and state is None:
        state = new_state(mu, form, state_dtype)
    if handed_on and grad is not None:
        grad_mu = grad
    else:
        grad_mu = torch.empty_like(mu, memory_format=torch.contiguous_format)
    if mu.numel() == 0 or (handed_on and not moves):
        return state, grad_mu
    n = mu.numel() // samples
    rows, cols, warps = tile(n, 1024, 1024)
    with on_device(mu):
        _step[(cdiv(samples, rows) * cdiv(n, cols),)](
            None if handed_on else mu.contiguous(),
            state,
            packed(grad if error or moves else None),
            precision.contiguous(),
            packed(keep),
            packed(move),
            unit,
            None if handed_on else grad_mu,
            parameter,
            None if family.linear else variance,
            samples,
            n,
            SLOPES=family.slopes,
            LOCATION=family.location,
            LINEAR=family.linear,
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
