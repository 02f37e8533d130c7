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
exponential families the Fisher information of the state), V dF/du = pi d + grad, and

    d <- keep d - (move / pi) grad,        keep = 1 - step, move = step: a descent step; 1 is Newton's.

The same step therefore suits a unit of any scale and a saturated softmax alike; the fixed point is that of plain
gradient descent. ``keep=None`` leaves the state where it is: the learning pass, which in state form does not read
``grad`` (it may be None).

Shapes: mu, state, grad ``[S * r, ...]`` with S samples of r rows each; precision, keep, move and energies ``[S]``.
Arithmetic is in float32, or in float64 where mu is float64; the emission has mu's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Step = tuple[Tensor | None, Tensor]


def wide(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: float32, or float64 where x is float64."""
    return x if x.dtype == torch.float64 else x.float()


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient per sample ``[S]`` spread over the rows of ``like`` ``[S * r, ...]``, ready to broadcast."""
    rows = like.shape[0] // coefficient.shape[0]
    if rows != 1:
        coefficient = coefficient.repeat_interleave(rows)
    return coefficient.view(-1, *[1] * (like.dim() - 1))


def error_of(state: Tensor | None, mu: Tensor, form: str = "error") -> Tensor:
    """d = u - mu of a state, in the dtype of the arithmetic; None stands for 0."""
    if state is not None and form == "error":
        return state.to(torch.promote_types(mu.dtype, torch.float32))
    return torch.zeros_like(wide(mu)) if state is None else state - wide(mu)


def kept(new: Tensor, state: Tensor | None, state_dtype: torch.dtype | None) -> Tensor:
    """A moved error in the dtype that the state is kept in; None for that of the arithmetic."""
    dtype = state_dtype if state is None else state.dtype
    return new if dtype is None else new.to(dtype)


def sum_samples(x: Tensor, samples: int) -> Tensor:
    """The sum of x ``[S * r, ...]`` over everything but the samples: ``[S]``."""
    return x.reshape(samples, -1).sum(1)


def _sent(grad: Tensor | None, mu: Tensor) -> Tensor:
    """What the children send back; 0 where nothing reads it."""
    return wide(mu).new_zeros(()) if grad is None else wide(grad)


def _moved(d: Tensor | None, push: Tensor, keep: Tensor, move_over_precision: Tensor) -> Tensor:
    """d <- keep d - (move / pi) push."""
    new = -per_sample(move_over_precision, push) * push
    return new if d is None else torch.addcmul(new, per_sample(keep, d), d)


# Gaussian with a fixed variance: E = pi sum d^2 / 2, where pi holds 1 / sigma^2 as well.


def gaussian_forward(mu: Tensor, state: Tensor, precision: Tensor, *, form: str) -> tuple[Tensor, Tensor]:
    """Emission u and energy pi |u - mu|^2 / 2 of a Gaussian of fixed variance."""
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
        new = _moved(d, _sent(grad, mu), keep, move / precision)
    shown = new if moved else d
    assert new is not None
    if error:
        assert grad is not None
        return kept(new, state, state_dtype), grad
    assert shown is not None
    return wide(mu) + new, (-per_sample(precision, mu) * shown).to(mu.dtype)


# A linear layer with that node on it, x [S * r, K], weight [N, K] and bias [N] (nn.Linear's): product and node in one.


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, precision: Tensor, *, form: str
) -> tuple[Tensor, Tensor]:
    """Emission u = x W' + b + e in error form, the error u - x W' - b in state form; and the Gaussian's energy."""
    mu = F.linear(x, weight, bias)
    u, energy = gaussian_forward(mu, state, precision, form=form)
    return u if form == "error" else (state - wide(mu)).to(mu.dtype), energy


def linear_backward(
    grad: Tensor,
    weight: Tensor,
    state: Tensor | None,
    precision: Tensor,
    keep: Tensor | None,
    move: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """The Gaussian's step in error form, where dF/dmu is ``grad`` itself, and the gradient ``grad W`` of x."""
    state, grad = gaussian_step(grad, state, grad, precision, keep, move, form="error")  # it reads no mu
    return state, grad @ weight


def linear_weight_gradient(grad: Tensor, x: Tensor, *, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """``grad' x`` ``[N, K]``, and the bias's gradient ``[N]`` if there is one."""
    return grad.t() @ x, grad.sum(0) if bias else None


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
    ds = s - s_hat
    return 0.5 * (torch.expm1(ds) - ds + (m - m_hat) ** 2 * (-s_hat).exp())


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
    mu_, g, xi = wide(mu), _sent(grad, mu), wide(noise)
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
        k, c = per_sample(keep, mu_), per_sample(move / precision, mu_)
        slope = torch.where(ds == 0, 1.0, ds / torch.expm1(ds))
        new = torch.cat([k * dm - c * variance * g, k * ds - c * slope * g_s], -1)
    pi = per_sample(precision, mu_)
    if form == "error":
        grad_mu = torch.cat([g, 0.5 * (g_s - pi * dm * dm / variance)], -1)
        return kept(new, state, state_dtype), grad_mu.to(mu.dtype)
    dm, ds = (new if moved else d).chunk(2, -1)
    grad_mu = pi * torch.cat([-dm / variance, -0.5 * (torch.expm1(ds) + dm * dm / variance)], -1)
    return mu_ + new, grad_mu.to(mu.dtype)


# Laplace and Student-t: location families, which emit u and count d = (u - mu) / unit.


def laplace_energy(d: Tensor) -> Tensor:
    """|d| + e^-|d| - 1 per element; near 0, where that cancels, its series."""
    a = d.abs()
    series = a * a * (0.5 - a * (1 / 6 - a * (1 / 24 - a * (1 / 120 - a / 720))))
    return torch.where(a < 1e-2, series, a + torch.expm1(-a))


def _location_forward(energy, mu, state, precision, unit, form) -> tuple[Tensor, Tensor]:
    d = error_of(state, mu, form)
    u = wide(mu) + d if form == "error" else state
    return u.to(mu.dtype), precision * sum_samples(energy(d / _scale(unit, mu)), len(precision))


def _location_step(natural, v, mu, state, grad, precision, unit, keep, move, form, moved, state_dtype) -> Step:
    """natural(d): V dE/dd, with V = v at d = 0, all in units of the node's scale."""
    d, scale = error_of(state, mu, form), _scale(unit, mu)
    new = d
    if keep is not None and move is not None:
        push = per_sample(move / precision, mu) * scale**2 * v * _sent(grad, mu)
        new = d - per_sample(1 - keep, mu) * scale * natural(d / scale) - push
    if form == "error":
        assert grad is not None
        return state if keep is None else kept(new, state, state_dtype), grad
    shown = new if moved else d
    return wide(mu) + new, (-per_sample(precision, mu) / (v * scale) * natural(shown / scale)).to(mu.dtype)


def _scale(unit: Tensor | None, mu: Tensor) -> Tensor:
    one = wide(mu).new_ones(())
    return one if unit is None else per_sample(unit, mu).clamp_min(torch.finfo(one.dtype).tiny)


def laplace_forward(mu, state, precision, unit=None, *, form) -> tuple[Tensor, Tensor]:
    """Emission u and pi (|d| + e^-|d| - 1)."""
    return _location_forward(laplace_energy, mu, state, precision, unit, form)


def laplace_step(mu, state, grad, precision, unit, keep, move, *, form, moved=False, state_dtype=None) -> Step:
    """dE/du = pi sign(d) (1 - e^-|d|) / unit, V = unit^2."""

    def natural(d: Tensor) -> Tensor:
        return -d.sign() * torch.expm1(-d.abs())

    return _location_step(natural, 1.0, mu, state, grad, precision, unit, keep, move, form, moved, state_dtype)


def student_t_forward(mu, state, precision, unit=None, *, nu, form) -> tuple[Tensor, Tensor]:
    """Emission u and pi (nu + 1) / 2 log(1 + d^2 / nu)."""

    def energy(d: Tensor) -> Tensor:
        return 0.5 * (nu + 1) * torch.log1p(d * d / nu)

    return _location_forward(energy, mu, state, precision, unit, form)


def student_t_step(mu, state, grad, precision, unit, keep, move, *, nu, form, moved=False, state_dtype=None) -> Step:
    """dE/du = pi (nu + 1) d / (nu + d^2) / unit, V = unit^2 nu / (nu + 1)."""

    def natural(d: Tensor) -> Tensor:
        return d / (1 + d * d / nu)

    v = nu / (nu + 1)
    return _location_step(natural, v, mu, state, grad, precision, unit, keep, move, form, moved, state_dtype)


# Bernoulli with logits: p = sigmoid(u), q = sigmoid(mu).


def bernoulli_energy(u: Tensor, mu: Tensor) -> Tensor:
    """p (u - mu) - softplus(u) + softplus(mu) per element."""
    return torch.sigmoid(u) * (u - mu) - F.softplus(u) + F.softplus(mu)


def bernoulli_forward(mu: Tensor, state: Tensor, precision: Tensor, *, form: str) -> tuple[Tensor, Tensor]:
    """Emission sigmoid(u) and pi KL of the sigmoids."""
    u = wide(mu) + state if form == "error" else state
    return torch.sigmoid(u).to(mu.dtype), precision * sum_samples(bernoulli_energy(u, wide(mu)), len(precision))


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
    mu_, g = wide(mu), _sent(grad, mu)
    d = error_of(state, mu_, form)
    p, q, pi = torch.sigmoid(mu_ + d), torch.sigmoid(mu_), per_sample(precision, mu_)
    new = d
    if keep is not None and move is not None:
        new = _moved(d, g, keep, move / precision)
    if form == "error":
        return kept(new, state, state_dtype), (p * (1 - p) * (pi * d + g) + pi * (q - p)).to(mu.dtype)
    if moved:
        p = torch.sigmoid(mu_ + new)
    return mu_ + new, (pi * (q - p)).to(mu.dtype)


# Categorical with logits along the last axis: p = softmax(u), q = softmax(mu). A logit of -inf is masked: p = q = 0.


def mask_logits(mu: Tensor, causal: bool, padding: Tensor | None, segments: Tensor | None = None) -> Tensor:
    """Attention's logits ``[B, heads, N, K]`` with -inf where a query may not look.

    causal: query i sees keys 0 .. i + K - N. padding ``[B, K]``: True where a key is padding. segments ``[B, N]``,
    N = K: a query sees the keys of its own number.
    """
    if causal:
        n, k = mu.shape[-2:]
        hidden = torch.ones(n, k, dtype=torch.bool, device=mu.device).triu(1 + k - n)
        mu = mu.masked_fill(hidden, -torch.inf)
    if padding is not None:
        mu = mu.masked_fill(padding[:, None, None, :], -torch.inf)
    if segments is not None:
        mu = mu.masked_fill((segments[:, :, None] != segments[:, None, :])[:, None], -torch.inf)
    return mu


def log_softmax(u: Tensor) -> Tensor:
    """log softmax along the last axis that gives -inf, not NaN, in rows whose every logit is -inf."""
    lse = torch.logsumexp(u, -1, keepdim=True)
    return u - torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)


def categorical_energy(u: Tensor, mu: Tensor) -> Tensor:
    """p (log p - log q) per element, 0 where masked."""
    log_p, log_q = log_softmax(u), log_softmax(mu)
    return torch.where(mu == -torch.inf, torch.zeros_like(u), log_p.exp() * (log_p - log_q))


def categorical_forward(
    mu: Tensor,
    state: Tensor,
    precision: Tensor,
    *,
    form: str,
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Emission softmax(u) and pi KL of the softmaxes, over the last axis."""
    logits = mask_logits(wide(mu), causal, padding, segments)
    u = logits + state if form == "error" else state.masked_fill(logits == -torch.inf, -torch.inf)
    return log_softmax(u).exp().to(mu.dtype), precision * sum_samples(categorical_energy(u, logits), len(precision))


def categorical_step(
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
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> Step:
    """dE/du = pi p (log p - log q - KL), dE/dmu = pi (q - p); the children's g returns to u as p (g - <p, g>).

    The state moves by g - <p, g>: logits count only up to a shift. Masked entries of d and of dF/dmu are 0.
    """
    logits, g = mask_logits(wide(mu), causal, padding, segments), _sent(grad, mu)
    masked = logits == -torch.inf
    d = error_of(state, logits, form)
    d = d.masked_fill(masked, 0.0)
    p, q, pi = log_softmax(logits + d).exp(), log_softmax(logits).exp(), per_sample(precision, logits)
    push = (g - (p * g).sum(-1, keepdim=True)).masked_fill(masked, 0.0)
    new = d
    if keep is not None and move is not None:
        new = _moved(d, push, keep, move / precision)
    if form == "error":
        total = p * (pi * (d - (p * d).sum(-1, keepdim=True)) + push) + pi * (q - p)
        return kept(new, state, state_dtype), total.to(mu.dtype)
    if moved:
        p = log_softmax(logits + new).exp()
    u = (logits + new).masked_fill(masked, 0.0)
    return u, (pi * (q - p)).to(mu.dtype)


# Attention: a Categorical node over the keys for every query, mu = scale q k', and its output p v. In error form.


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return scale * (wide(q) @ _for_queries(k, q).mT)


def _for_queries(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values ``[B, heads, K, D]`` with each head repeated for the query heads that share it."""
    return wide(x).repeat_interleave(q.shape[1] // x.shape[1], 1)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    precision: Tensor,
    *,
    scale: float,
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output softmax(u) v, pi KL of the softmaxes, and the facts of each row: log sum e^u, <p, d>, KL."""
    mu = _logits(q, k, scale)
    d = error_of(state, mu)
    logits = mask_logits(mu, causal, padding, segments)
    p, energy = categorical_forward(logits, d, precision, form="error")
    kl = categorical_energy(logits + d, logits).sum(-1)
    lse = torch.logsumexp(logits + d, -1)
    facts = torch.stack([lse.masked_fill(lse == -torch.inf, 0.0), (p * d).sum(-1), kl])
    return (p @ _for_queries(v, q)).to(q.dtype), energy, facts


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    state: Tensor | None,
    precision: Tensor,
    keep: Tensor | None,
    move: Tensor | None,
    facts: Tensor,
    *,
    scale: float,
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """The state moved by g = grad_out v', and dF/dq, dF/dk, dF/dv. It reads neither out nor facts: the kernels do."""
    mu, sent = _logits(q, k, scale), wide(grad_out)
    logits, d = mask_logits(mu, causal, padding, segments), error_of(state, mu)
    p = log_softmax(logits + d).exp()
    g = sent @ _for_queries(v, q).mT
    new, grad_mu = categorical_step(logits, state, g, precision, keep, move, form="error")
    grad_q = scale * (grad_mu @ _for_queries(k, q))
    grad_k, grad_v = scale * (grad_mu.mT @ wide(q)), p.mT @ sent
    grad_k, grad_v = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (grad_k, grad_v))
    return state if keep is None else new, grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


# Categorical clamped to labels: the output node of a classifier or a language model.


def clamped_categorical_forward(mu: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """-log q_y per row ``[R]`` (0 where the label is ignored) and the row's log-sum-exp ``[R]``, of mu ``[R, C]``."""
    mu = wide(mu)
    lse = torch.logsumexp(mu, -1)
    kept = labels != ignore_index
    target = mu.gather(-1, labels.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(kept, lse - target, 0.0), lse


def clamped_categorical_backward(
    mu: Tensor, labels: Tensor, lse: Tensor, grad_energy: Tensor, ignore_index: int
) -> Tensor:
    """dE/dmu = (q - y) grad_energy ``[R, C]``, 0 in ignored rows; grad_energy ``[R]``."""
    kept = labels != ignore_index
    scale = torch.where(kept, grad_energy, 0.0).unsqueeze(-1)
    grad = (wide(mu) - lse.unsqueeze(-1)).exp() * scale
    index = labels.where(kept, 0).unsqueeze(-1)
    return grad.scatter_add(-1, index, -scale).to(mu.dtype)


def clamped_categorical_gradient_(mu: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """-log q_y per row ``[R]``, as `clamped_categorical_forward`; mu ``[R, C]`` is overwritten by dE/dmu = q - y."""
    kept = labels != ignore_index
    index = labels.where(kept, 0).unsqueeze(-1)
    log_q = F.log_softmax(wide(mu), -1)
    energy = torch.where(kept, -log_q.gather(-1, index).squeeze(-1), 0.0)
    grad = log_q.exp_().scatter_add_(-1, index, torch.full_like(energy, -1.0).unsqueeze(-1))
    mu.copy_(grad.mul_(kept.unsqueeze(-1)))
    return energy
