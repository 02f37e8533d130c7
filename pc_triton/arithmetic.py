"""What the equations of every family share: dtypes, sums over a sample, and the move of a state."""

from __future__ import annotations

import torch
from torch import Tensor

NEAR = 0.1
"""Below this `divergence` is a series; beyond it the difference keeps most digits of its dtype."""
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


def sum_of_nodes(x: Tensor) -> Tensor:
    """The sum of x ``[nodes, S]`` over nodes: ``[S]``. No sample's sum depends on how many samples there are."""
    return x.T.contiguous().sum(-1)


def mean_square(mu: Tensor, samples: int) -> Tensor:
    """The mean of mu^2 of each sample ``[S]``: the square of a location family's unit."""
    return sum_samples(wide(mu) ** 2, samples) * (samples / mu.numel())


def sent(grad: Tensor | None, mu: Tensor) -> Tensor:
    """What the children send back; 0 where nothing reads it."""
    return wide(mu).new_zeros(()) if grad is None else wide(grad)


# The guard holds a sample by a move of 0. Where its F overflowed its gradients are infinite, and 0 times those is NaN.


def moved_by(d: Tensor | None, push: Tensor, keep: Tensor, move_over_precision: Tensor) -> Tensor:
    """d <- keep d - (move / pi) push; keep d where move is 0, whatever is pushed."""
    step = per_sample(move_over_precision, push)
    new = torch.where(step == 0, 0.0, -step * push)  # not in place: that ends compiled.py's simplifying
    return new if d is None else torch.addcmul(new, per_sample(keep, d), d)


def moved_to(new: Tensor, d: Tensor, keep: Tensor, move: Tensor) -> Tensor:
    """A move of any other form, from d to ``new``; keep d where move is 0."""
    return torch.where(per_sample(move == 0, d), per_sample(keep, d) * d, new)


def state_at(mu: Tensor, d: Tensor, state: Tensor | None, keep: Tensor | None, move: Tensor | None) -> Tensor:
    """The state u = mu + d after a move. A sample that is held has its old one, even if mu has overflowed."""
    u = wide(mu) + d
    if state is None or keep is None or move is None:
        return u
    return torch.where(per_sample((move == 0) & (keep == 1), u), state, u)


def divergence(p: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """p (e^y - 1 - y) with q = p e^y: a part of KL[p || q], never negative, of second order in y where y is small.

    There q - p - p y cancels, and the series y^2 / 2 (1 + y / 3 (1 + y / 4 (1 + ...))) stands for it, as far as the
    dtype sees.
    """
    near = y.abs() < NEAR
    small, one = torch.where(near, y, 0.0), y.new_ones(())
    series = one
    for k in range(11 if y.dtype == torch.float64 else 6, 2, -1):
        series = torch.addcmul(one, small, series, value=1.0 / k)
    series = 0.5 * series * small
    series = series * small
    del small  # of the size of attention's weights, as each here
    series = series * p
    difference = torch.addcmul(q - p, p, y, value=-1.0).clamp_min(0.0)  # not the series: at 0 torch 2.14 cuts its slope
    return torch.where(near, series, difference)
