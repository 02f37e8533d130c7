"""`reference`'s equations of the Categorical node: free, in attention, and clamped to labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import Step, divergence, error_of, kept, moved_by, per_sample, sent, state_at, sum_samples, wide

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
    empty = _sees_nothing(u)
    return F.log_softmax(u.masked_fill(empty, 0.0), -1).masked_fill(empty, -torch.inf)


def softmax(u: Tensor) -> Tensor:
    """softmax along the last axis that gives 0, not NaN, in rows whose every logit is -inf."""
    empty = _sees_nothing(u)
    return F.softmax(u.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


def _sees_nothing(u: Tensor) -> Tensor:
    """Which rows are -inf throughout; torch's maximum is far quicker than its ``all`` of a comparison."""
    return u.detach().amax(-1, keepdim=True) == -torch.inf


def categorical_energy(u: Tensor, mu: Tensor) -> Tensor:
    """The parts, none of them negative, of KL[p || q] per element: p (log (p / q) - 1) + q; 0 where masked."""
    return categorical_kl(mu, torch.where(mu == -torch.inf, torch.zeros_like(u), u - mu))


def categorical_kl(mu: Tensor, d: Tensor) -> Tensor:
    """`categorical_energy` at u = mu + d. Nothing cancels in it where d is small: it is of second order in d.

    With y = log (q / p) = log sum q e^d - d a part is p (e^y - 1 - y). What rounds that logarithm is common to a row,
    and counts by its square.
    """
    log_q, masked = log_softmax(mu), mu == -torch.inf
    q = log_q.exp()
    d = (d - (q * d).sum(-1, keepdim=True)).masked_fill_(masked, 0.0)
    y = (torch.logsumexp(log_q + d, -1, keepdim=True) - d).masked_fill_(masked, 0.0)
    del d
    p = (log_q - y).clamp_(max=0.0).exp_()  # a state as large as 1 / eps leaves nothing of y but rounding
    del log_q
    return divergence(p, q, y)  # 0 where masked: q is 0 there, and y


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
    masked = logits == -torch.inf
    d = error_of(state, wide(mu), form).masked_fill(masked, 0.0)
    emission = softmax(logits + d if form == "error" else state.masked_fill(masked, -torch.inf))
    return emission.to(mu.dtype), precision * sum_samples(categorical_kl(logits, d), len(precision))


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
    logits, g = mask_logits(wide(mu), causal, padding, segments), sent(grad, mu)
    masked = logits == -torch.inf
    d = error_of(state, logits, form)
    d = d.masked_fill(masked, 0.0)
    p, q, pi = softmax(logits + d), softmax(logits), per_sample(precision, logits)
    push = (g - (p * g).sum(-1, keepdim=True)).masked_fill(masked, 0.0)
    new = d
    if keep is not None and move is not None:
        new = moved_by(d, push, keep, move / precision)
    if form == "error":
        total = p * (pi * (d - (p * d).sum(-1, keepdim=True)) + push) + pi * (q - p)
        return kept(new, state, state_dtype), total.to(mu.dtype)
    if moved:
        p = softmax(logits + new)
    u = state_at(logits.masked_fill(masked, 0.0), new, state, keep, move)
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
    kl = categorical_kl(logits, d).sum(-1)
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
    p = softmax(logits + d)
    g = sent @ _for_queries(v, q).mT
    new, grad_mu = categorical_step(logits, state, g, precision, keep, move, form="error")
    grad_q = scale * (grad_mu @ _for_queries(k, q))
    grad_k, grad_v = scale * (grad_mu.mT @ wide(q)), p.mT @ sent
    grad_k, grad_v = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (grad_k, grad_v))
    return state if keep is None else new, grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def attention_fall(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    samples: int,
    *,
    scale: float,
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """At e = 0 the sum of p (g - <p, g>)^2 of each sample ``[S]``, g = grad_out v'. It does not read out."""
    p = softmax(mask_logits(_logits(q, k, scale), causal, padding, segments))
    g = wide(grad_out) @ _for_queries(v, q).mT
    return sum_samples(p * (g - (p * g).sum(-1, keepdim=True)) ** 2, samples)


def attention_first_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    precision: Tensor,
    move: Tensor,
    *,
    state_dtype: torch.dtype | None = None,
    causal: bool = False,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """The state after the first move, -(move / pi) (g - <p, g>), 0 where masked; <p, g> = <grad_out, out>."""
    g = wide(grad_out) @ _for_queries(v, q).mT
    push = g - (wide(grad_out) * wide(out)).sum(-1, keepdim=True)
    masked = mask_logits(torch.zeros_like(push), causal, padding, segments) == -torch.inf
    return kept(moved_by(None, push.masked_fill(masked, 0.0), move, move / precision), None, state_dtype)


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
    energy, grad = _clamped(mu, labels, ignore_index)
    mu.copy_(grad)
    return energy


def clamped_categorical_rounded(mu: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """-log q_y per row ``[R]``, and dE/dmu = q - y in 8 bits: values ``[R, C]`` float8_e5m2, scale ``[R, 1]``.

    No part of q - y is larger than that of the label. Its size is the row's scale times 2^15, so that it is exact.
    """
    energy, grad = _clamped(mu, labels, ignore_index)
    largest = grad.amin(-1, keepdim=True).neg().clamp_min(2.0**-20)
    return energy, (grad / largest * 2.0**15).to(torch.float8_e5m2), (largest * 2.0**-15).float()


def _clamped(mu: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    kept = labels != ignore_index
    index = labels.where(kept, 0).unsqueeze(-1)
    log_q = F.log_softmax(wide(mu), -1)
    energy = torch.where(kept, -log_q.gather(-1, index).squeeze(-1), 0.0)
    grad = log_q.exp_().scatter_add_(-1, index, torch.full_like(energy, -1.0).unsqueeze(-1))
    return energy, grad.mul_(kept.unsqueeze(-1))
