"""The equations of every value node in plain torch: the CPU path, and in float64 the oracle of every kernel.

A value node holds a state u, is predicted by mu, and has the energy E = pi KL[D(u) || D(mu)] (Pinchetti et al. 2022,
eq. 5; pi is the node's precision, 1 in the paper). Its children send back ``grad``, the gradient of their energies with
respect to the emission m(u). Each family has two functions, with the same names and arguments in ``pc_triton.kernels``:

``*_forward(mu, state, precision, *, form)`` gives the emission and the energy per sample;
``*_step(mu, state, grad, precision, keep, move, *, form, moved)`` is one inference step: both gradients and the move of
the state, fused. It returns (state, dF/dmu).

**form** says what the state tensor holds. ``"state"``: u itself; dF/dmu is then the local gradient pi dKL/dmu, at the
old state, or with ``moved=True`` at the moved one (the sweep). ``"error"``: e = u - mu, so that u follows mu; dF/dmu is
then the total derivative with e held. In error form ``state=None`` stands for e = 0. An error may be kept in bfloat16:
it is small beside u, and so is its rounding. The moved one has the dtype of the old, or after e = 0 ``state_dtype``.

**The move** is a natural-gradient step: with d = u - mu and V the inverse of the energy's curvature at u = mu (for the
exponential families the Fisher information of the state), V dF/du = pi d + grad, and::

    d <- keep d - (move / pi) grad,        keep = 1 - step, move = step: a descent step; 1 is Newton's.

Where move is 0 it is keep d, even if grad is infinite: so the guard holds a sample whose F has overflowed.

The same step therefore suits a unit of any scale and a saturated softmax alike; the fixed point is that of plain
gradient descent. ``keep=None`` leaves the state where it is: the learning pass, which in state form does not read
``grad`` (it may be None).

Shapes: mu, state, grad ``[S * r, ...]`` with S samples of r rows each; precision, keep, move and energies ``[S]``.
Arithmetic is in float32, or in float64 where mu is float64; the emission has mu's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import (
    Step,
    divergence,
    error_of,
    kept,
    mean_square,
    moved_by,
    moved_to,
    per_sample,
    sent,
    state_at,
    sum_samples,
    wide,
)
from .reference_float8 import rows_rounded as rows_rounded
from .reference_float8 import weight_rounded as weight_rounded
from .reference_softmax import attention_fall as attention_fall
from .reference_softmax import attention_first_step as attention_first_step
from .reference_softmax import attention_forward as attention_forward
from .reference_softmax import attention_step as attention_step
from .reference_softmax import categorical_energy as categorical_energy
from .reference_softmax import categorical_forward as categorical_forward
from .reference_softmax import categorical_step as categorical_step
from .reference_softmax import clamped_categorical_backward as clamped_categorical_backward
from .reference_softmax import clamped_categorical_forward as clamped_categorical_forward
from .reference_softmax import clamped_categorical_gradient_ as clamped_categorical_gradient_
from .reference_softmax import clamped_categorical_rounded as clamped_categorical_rounded
from .reference_softmax import log_softmax as log_softmax
from .reference_softmax import mask_logits as mask_logits

# What inference measures at the prediction: <J'g, V J'g> is 2 pi times the fall of F, to first order in 1 / pi.


def location_fall(mu: Tensor, grad: Tensor, samples: int) -> Tensor:
    """The mean of mu^2 and the sum of g^2 of each sample ``[2, S]``: unit^2, and the fall, of a location family."""
    return torch.stack([mean_square(mu, samples), sum_samples(wide(grad) ** 2, samples)])


def bernoulli_fall(mu: Tensor, grad: Tensor, samples: int) -> Tensor:
    """`location_fall` with the sum of p (1 - p) g^2 for the sum of g^2."""
    p = torch.sigmoid(wide(mu))
    return torch.stack([mean_square(mu, samples), sum_samples(p * (1 - p) * wide(grad) ** 2, samples)])


# The guard, which takes back moves that raised F.


def guard_step(state: Tensor, accepted: Tensor, rose: Tensor) -> tuple[Tensor, Tensor]:
    """Where F rose ``[S]``, the state goes halfway back to the accepted one; elsewhere it is the accepted one now.

    From where it is not finite it goes all the way.
    """
    rows, half = per_sample(rose, state), 0.5 * (accepted + state)
    state = torch.where(rows, torch.where(half.isfinite(), half, accepted), state)
    return state, torch.where(rows, accepted, state)


# Gaussian with a fixed variance: E = pi sum d^2 / 2, where pi holds 1 / sigma^2 as well.


def gaussian_forward(
    mu: Tensor, state: Tensor, precision: Tensor, *, form: str, move: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Emission u and energy ``pi |u - mu|^2 / 2`` of a Gaussian of fixed variance.

    move: in error form the state is g instead, and ``e = -(move / pi) g``: the first move, of which no state is kept.
    """
    if move is not None:
        state = moved_by(None, wide(state), move, move / precision)
    if form == "error":
        u, d = mu + state.to(mu.dtype), error_of(state, mu)
    else:
        u, d = state.to(mu.dtype), state - wide(mu)
    return u, 0.5 * precision * sum_samples(d * d, len(precision))


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
) -> Step:
    """dE/du = pi d, dE/dmu = -pi d; what the children send returns to u as it is."""
    error = form == "error"
    if error and keep is None:
        assert grad is not None
        return state, grad
    d = None if state is None else error_of(state, mu, form)
    new = d
    if keep is not None and move is not None:
        new = moved_by(d, sent(grad, mu), keep, move / precision)
    shown = new if moved else d
    assert new is not None
    if error:
        assert grad is not None
        return kept(new, state, state_dtype), grad
    assert shown is not None
    return state_at(mu, new, state, keep, move), (-per_sample(precision, mu) * shown).to(mu.dtype)


# A linear layer with that node on it in error form, x [S * r, K], weight [N, K] and bias [N] (nn.Linear's).


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """Emission u = x W' + b + e, and the Gaussian's energy."""
    return gaussian_forward(F.linear(x, weight, bias), state, precision, form="error")


# Gaussian with its own variance: rows [mean | log variance], emission m + e^(s/2) xi with xi frozen for the batch.


def gaussian_logvar_forward(
    mu: Tensor, state: Tensor, precision: Tensor, noise: Tensor, *, form: str
) -> tuple[Tensor, Tensor]:
    """Emission ``m + exp(s / 2) xi`` ``[..., C]`` of rows ``[..., 2 C]``, and pi KL of the two Gaussians."""
    u = wide(mu) + state if form == "error" else state
    m, s = u.chunk(2, -1)
    return (m + (0.5 * s).exp() * wide(noise)).to(mu.dtype), precision * sum_samples(
        gaussian_logvar_energy(u, wide(mu)), len(precision)
    )


def gaussian_logvar_energy(u: Tensor, mu: Tensor) -> Tensor:
    """1/2 [s^ - s + (e^s + (m - m^)^2) e^-s^ - 1] per element."""
    (m, s), (m_hat, s_hat) = u.chunk(2, -1), mu.chunk(2, -1)
    ds, dm = s - s_hat, m - m_hat
    one = torch.ones_like(ds)
    return 0.5 * (divergence(one, one + torch.expm1(ds), ds) + dm * _over(dm, s_hat))


def _over(dm: Tensor, s_hat: Tensor) -> Tensor:
    """dm e^-s^, with e^-s^ no larger than the dtype's largest number: an infinite one times a dm of 0 would be NaN."""
    return dm * (-s_hat).clamp(max=math.log(torch.finfo(s_hat.dtype).max) - 1).exp()


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
) -> Step:
    """dE/du = pi ((m - m^) e^-s^, (e^(s-s^) - 1) / 2), dE/dmu = -pi (dm e^-s^, (e^ds - 1 + dm^2 e^-s^) / 2).

    What the children send returns to u as (g, g e^(s/2) xi / 2). V = (e^s^, 2 ds / (e^ds - 1)): at the prediction the
    inverse Fisher information of (m, s), and elsewhere what makes the energy's part of the move linear in ds, too.

    grad may have ``[..., 3 C]``: for a node with a prior, whose emission is the sample followed by u.
    """
    mu_, g, xi = wide(mu), sent(grad, mu), wide(noise)
    g_u = None
    if g.shape[-1:] == (3 * xi.shape[-1],):
        g, g_u = g.split([xi.shape[-1], mu.shape[-1]], -1)
    d = error_of(state, mu_, form)
    (dm, ds), (_, s_hat) = d.chunk(2, -1), mu_.chunk(2, -1)
    variance, g_s = s_hat.exp(), g * xi * (0.5 * (s_hat + ds)).exp()  # g_s is 2 dm(u)/ds g
    if g_u is not None:
        g, g_s = g + g_u.chunk(2, -1)[0], g_s + 2 * g_u.chunk(2, -1)[1]
    new = d
    if keep is not None and move is not None:
        slope, step = torch.where(ds == 0, 1.0, ds / torch.expm1(ds)), move / precision
        new = torch.cat([moved_by(dm, variance * g, keep, step), moved_by(ds, slope * g_s, keep, step)], -1)
    pi = per_sample(precision, mu_)
    if form == "error":
        grad_mu = torch.cat([g, 0.5 * (g_s - pi * dm * _over(dm, s_hat))], -1)
        return kept(new, state, state_dtype), grad_mu.to(mu.dtype)
    dm, ds = (new if moved else d).chunk(2, -1)
    scaled = _over(dm, s_hat)
    grad_mu = pi * torch.cat([-scaled, -0.5 * (torch.expm1(ds) + dm * scaled)], -1)
    return state_at(mu, new, state, keep, move), grad_mu.to(mu.dtype)


# Laplace and Student-t: location families, which emit u and count d = (u - mu) / unit.


def laplace_energy(d: Tensor) -> Tensor:
    """``|d| + e^-|d| - 1`` per element; near 0, where that cancels, its series."""
    a = d.abs()
    series = a * a * (0.5 - a * (1 / 6 - a * (1 / 24 - a * (1 / 120 - a / 720))))
    return torch.where(a < 1e-2, series, a + torch.expm1(-a))


def _location_forward(
    energy: Callable[[Tensor], Tensor], mu: Tensor, state: Tensor, precision: Tensor, unit: Tensor | None, form: str
) -> tuple[Tensor, Tensor]:
    d = error_of(state, mu, form)
    u = wide(mu) + d if form == "error" else state
    return u.to(mu.dtype), precision * sum_samples(energy(d / _scale(unit, mu)), len(precision))


def _location_step(
    natural: Callable[[Tensor], Tensor],
    v: float,
    mu: Tensor,
    state: Tensor | None,
    grad: Tensor | None,
    precision: Tensor,
    unit: Tensor | None,
    keep: Tensor | None,
    move: Tensor | None,
    form: str,
    moved: bool,
    state_dtype: torch.dtype | None,
) -> Step:
    """natural(d): V dE/dd, with V = v at d = 0, all in units of the node's scale."""
    d, scale = error_of(state, mu, form), _scale(unit, mu)
    new = d
    if keep is not None and move is not None:
        push = per_sample(move / precision, mu) * scale**2 * v * sent(grad, mu)
        new = moved_to(d - per_sample(1 - keep, mu) * scale * natural(d / scale) - push, d, keep, move)
    if form == "error":
        assert grad is not None
        return state if keep is None else kept(new, state, state_dtype), grad
    shown = new if moved else d
    grad_mu = -per_sample(precision, mu) / (v * scale) * natural(shown / scale)
    return state_at(mu, new, state, keep, move), grad_mu.to(mu.dtype)


def _scale(unit: Tensor | None, mu: Tensor) -> Tensor:
    one = wide(mu).new_ones(())
    return one if unit is None else per_sample(unit, mu).clamp_min(torch.finfo(one.dtype).tiny)


def laplace_forward(
    mu: Tensor, state: Tensor, precision: Tensor, unit: Tensor | None = None, *, form: str
) -> tuple[Tensor, Tensor]:
    """Emission u and ``pi (|d| + e^-|d| - 1)``."""
    return _location_forward(laplace_energy, mu, state, precision, unit, form)


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
) -> Step:
    """``dE/du = pi sign(d) (1 - e^-|d|) / unit``, V = unit^2."""

    def natural(d: Tensor) -> Tensor:
        return -d.sign() * torch.expm1(-d.abs())

    return _location_step(natural, 1.0, mu, state, grad, precision, unit, keep, move, form, moved, state_dtype)


def student_t_forward(
    mu: Tensor, state: Tensor, precision: Tensor, unit: Tensor | None = None, *, nu: float, form: str
) -> tuple[Tensor, Tensor]:
    """Emission u and pi (nu + 1) / 2 log(1 + d^2 / nu)."""

    def energy(d: Tensor) -> Tensor:
        return 0.5 * (nu + 1) * torch.log1p(d * d / nu)

    return _location_forward(energy, mu, state, precision, unit, form)


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
) -> Step:
    """dE/du = pi (nu + 1) d / (nu + d^2) / unit, V = unit^2 nu / (nu + 1)."""

    def natural(d: Tensor) -> Tensor:
        return d / (1 + d * d / nu)

    v = nu / (nu + 1)
    return _location_step(natural, v, mu, state, grad, precision, unit, keep, move, form, moved, state_dtype)


# Bernoulli with logits: p = sigmoid(u), q = sigmoid(mu).


def bernoulli_energy(u: Tensor, mu: Tensor) -> Tensor:
    """KL of the sigmoids p and q per element: p (u - mu) - softplus(u) + softplus(mu)."""
    return bernoulli_kl(mu, u - mu)


def bernoulli_kl(mu: Tensor, d: Tensor) -> Tensor:
    """`bernoulli_energy` at u = mu + d: the parts of its two outcomes, in which nothing cancels where d is small."""
    u, q, near = mu + d, torch.sigmoid(mu), d.abs() < 1
    gain = torch.log1p(q * torch.expm1(torch.where(near, d, 0.0)))  # softplus(u) - softplus(mu) = log (1 - q) / (1 - p)
    gain = torch.where(near, gain, F.softplus(u) - F.softplus(mu))
    return divergence(torch.sigmoid(u), q, gain - d) + divergence(torch.sigmoid(-u), torch.sigmoid(-mu), gain)


def bernoulli_forward(mu: Tensor, state: Tensor, precision: Tensor, *, form: str) -> tuple[Tensor, Tensor]:
    """Emission sigmoid(u) and pi KL of the sigmoids."""
    d = error_of(state, mu, form)
    u = wide(mu) + d if form == "error" else state
    return torch.sigmoid(u).to(mu.dtype), precision * sum_samples(bernoulli_kl(wide(mu), d), len(precision))


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
) -> Step:
    """dE/du = pi p (1 - p) d, dE/dmu = pi (q - p); what the children send returns to u as p (1 - p) g."""
    mu_, g = wide(mu), sent(grad, mu)
    d = error_of(state, mu_, form)
    p, q, pi = torch.sigmoid(mu_ + d), torch.sigmoid(mu_), per_sample(precision, mu_)
    new = d
    if keep is not None and move is not None:
        new = moved_by(d, g, keep, move / precision)
    if form == "error":
        return kept(new, state, state_dtype), (p * (1 - p) * (pi * d + g) + pi * (q - p)).to(mu.dtype)
    if moved:
        p = torch.sigmoid(mu_ + new)
    return state_at(mu, new, state, keep, move), (pi * (q - p)).to(mu.dtype)
