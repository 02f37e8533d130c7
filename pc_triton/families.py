"""The families of value nodes that come with the package: what a state means, what it emits, what its energy is.

Those of Pinchetti et al. 2022 compute energy, gradients and move in one fused pass (``reference.py`` on a CPU,
``kernels/`` on a GPU); so do `Laplace` and `StudentT`. `Distribution` needs no more than an energy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .arithmetic import sum_samples, wide
from .context import add_energy
from .dispatch import backend, tracing
from .distributions import Distribution
from .errors import see
from .reference import bernoulli_energy, gaussian_logvar_energy, laplace_energy
from .reference_softmax import categorical_energy, log_softmax, mask_logits, softmax


class Gaussian(Distribution):
    """Gaussian of fixed variance; the state is its mean (Pinchetti et al. 2022, section 3; Rao & Ballard 1999).

    variance: sigma^2 > 0. None (default): a hidden node counts its error in units of its own root mean square, as
    ``precision="auto"`` measures it; an output node, or a number given for the precision, has variance 1.
    Raises ValueError if it is not a positive finite number.
    """

    quadratic = True

    def __init__(self, variance: float | None = None) -> None:
        if variance is not None and not (variance > 0 and math.isfinite(variance)):
            raise ValueError(f"variance={variance}: give a positive finite number, or None")
        super().__init__()
        self.given = variance
        self.measured = variance is None

    @property
    def _sigma2(self) -> float:
        return 1.0 if self.given is None else self.given

    def energy(self, u: Tensor, mu: Tensor) -> Tensor:
        """(u - mu)^2 / 2 sigma^2 per element."""
        return (u - mu) ** 2 / (2 * self._sigma2)

    def variance(self, mu: Tensor) -> float:
        """sigma^2."""
        return self._sigma2

    def _precision(self, pi: Tensor, unit: Tensor | None) -> Tensor:
        """pi / sigma^2; where the node's scale is 0 its state stays at mu, as with an infinite precision."""
        if unit is None:
            return pi if self.given is None else pi / self.given
        return pi / (unit * unit).clamp_min(1e-30)

    def node_forward(self, mu, state, pi, unit, *, form):
        return backend(mu).gaussian_forward(mu, state, self._precision(pi, unit), form=form)

    def moved_forward(self, mu, grad, pi, unit, move):
        """`node_forward` in error form after the move from e = 0 by that gradient, of which no state is made."""
        return backend(mu).gaussian_forward(mu, grad, self._precision(pi, unit), form="error", move=move)

    def node_step(self, mu, state, grad, pi, unit, keep, move, **options):
        return backend(mu).gaussian_step(mu, state, grad, self._precision(pi, unit), keep, move, **options)

    def error_energy(self, state: Tensor, pi: Tensor, unit: Tensor | None) -> Tensor:
        """The energy ``[S]`` in error form, where it is one of e alone."""
        dtype = torch.promote_types(state.dtype, pi.dtype)
        norm = torch.linalg.vector_norm(state.reshape(len(pi), -1), dim=1, dtype=dtype)
        return 0.5 * self._precision(pi, unit) * (norm * norm)

    @contextlib.contextmanager
    def shifted(self, error: Tensor) -> Iterator[None]:
        """Within it the node emits mu + error in plain torch, which torch.compile takes into the model's graph.

        The attribute is set and deleted, not set to None: torch.compile guards on whether there is one.
        """
        self.error = error
        try:
            yield
        finally:
            del self.error

    def linear_forward(self, x, weight, bias, state, pi, unit):
        """`node_forward` in error form for the prediction x W' + b, x ``[R, K]``: see ``reference.py``."""
        return backend(x).linear_forward(x, weight, bias, state, self._precision(pi, unit))

    def fall(self, mu, grad, samples):
        both = backend(mu).location_fall(mu, grad, samples)
        return both if self.given is None else torch.stack([both[0], both[1] * self.given])

    def extra_repr(self) -> str:
        return "" if self.given is None else f"variance={self.given}"


class GaussianLogVar(Distribution):
    """Gaussian with its own variance; rows ``[mean | log variance]``, so a node of C units takes ``2 C`` columns.

    It emits a sample m + exp(s / 2) xi ``[..., C]`` with xi frozen for the batch (in evaluation the mean), as in a
    variational autoencoder (Pinchetti et al. 2022, section 4.2). As an output node its energy is the negative log
    likelihood without the constant log(2 pi) / 2. Raises ValueError for an odd number of columns.

    prior: True puts a standard normal prior on the node: F has KL[D(u) || N(0, 1)] too, that of a variational
    autoencoder, at the state u. What inference knows as the node's emission is then ``[sample | mean | log variance]``.
    """

    def __init__(self, prior: bool = False) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, mu: Tensor, **frozen: Any) -> Tensor:
        """The sample ``[B, ..., C]``; its prior's energy goes to `add_energy`."""
        emitted = super().forward(mu, **frozen)
        if not self.prior:
            return emitted
        columns = mu.shape[-1] // 2
        sample, u = emitted.split([columns, 2 * columns], -1)
        add_energy(self.energy(wide(u), torch.zeros_like(wide(u))))
        return sample

    def frozen(self, mu: Tensor) -> dict[str, Any]:
        """xi ``[..., C]``, standard normal."""
        if mu.shape[-1] % 2:
            raise ValueError(f"GaussianLogVar takes [mean | log variance]: {mu.shape[-1]} columns are an odd number")
        return {"noise": torch.randn_like(mu[..., : mu.shape[-1] // 2])}

    def energy(self, u: Tensor, mu: Tensor) -> Tensor:
        """KL of the two Gaussians per unit ``[..., C]``."""
        return gaussian_logvar_energy(u, mu)

    def emission(self, u: Tensor, noise: Tensor | None = None) -> Tensor:
        """m + exp(s / 2) noise ``[..., C]``, without noise the mean; followed by u where the node has a prior."""
        m, s = u.chunk(2, -1)
        sample = m if noise is None else m + (0.5 * s).exp() * noise
        return torch.cat([sample, u], -1) if self.prior else sample

    def variance(self, mu: Tensor) -> Tensor:
        """(e^s, 2), the inverse Fisher information of mean and log variance."""
        _, s = mu.chunk(2, -1)
        return torch.cat([s.exp(), torch.full_like(s, 2.0)], -1)

    def check_target(self, target: Tensor, mu: Tensor) -> Tensor:
        """As `Distribution.check_target`, for target ``[S, ..., C]`` and mu ``[S, ..., 2 C]``."""
        return super().check_target(target, mu.chunk(2, -1)[0])

    def _clamped_energy(self, target: Tensor, mu: Tensor) -> Tensor:
        """1/2 [s^ + (y - m^)^2 e^-s^]."""
        m, s = mu.chunk(2, -1)
        return 0.5 * (s + (target - m) ** 2 * (-s).exp())

    # The kernels emit the sample alone: a node with a prior, which is small, is computed by plain torch on a GPU too.

    def node_forward(self, mu, state, pi, unit, *, form, noise):
        if self.prior:
            return super().node_forward(mu, state, pi, unit, form=form, noise=noise)
        return backend(mu).gaussian_logvar_forward(mu, state, pi, noise, form=form)

    def node_step(self, mu, state, grad, pi, unit, keep, move, *, noise, **options):
        passes = reference if self.prior else backend(mu)
        return passes.gaussian_logvar_step(mu, state, grad, pi, keep, move, noise, **options)

    def fall(self, mu, grad, samples, *, noise):
        if self.prior:
            return super().fall(mu, grad, samples, noise=noise)
        _, s = wide(mu).chunk(2, -1)
        g = wide(grad)
        return _fall(sum_samples(s.exp() * g * g * (1 + 0.5 * wide(noise) ** 2), samples))


class Bernoulli(Distribution):
    """Independent binary units; the state is their logits, the emission their probabilities.

    As an output node it is clamped to targets in [0, 1]: binary cross-entropy.
    """

    def energy(self, u: Tensor, mu: Tensor) -> Tensor:
        """KL of the sigmoids per unit."""
        return bernoulli_energy(u, mu)

    def emission(self, u: Tensor) -> Tensor:
        """sigmoid(u)."""
        return torch.sigmoid(u)

    def check_values(self, target: Tensor, classes: int) -> None:
        """Raise ValueError for a target outside [0, 1] (on a GPU assert on the device)."""
        _check_probabilities(target)

    def _clamped_energy(self, target: Tensor, mu: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(mu, target, reduction="none")

    def node_forward(self, mu, state, pi, unit, *, form):
        return backend(mu).bernoulli_forward(mu, state, pi, form=form)

    def node_step(self, mu, state, grad, pi, unit, keep, move, **options):
        return backend(mu).bernoulli_step(mu, state, grad, pi, keep, move, **options)

    def fall(self, mu, grad, samples):
        return backend(mu).bernoulli_fall(mu, grad, samples)


class _ClampedCategorical(torch.autograd.Function):
    """-log q_y per row; the gradient q - y is made in the backward pass from the saved log-sum-exp.

    Where that is to be differentiated again (``create_graph=True``) torch's own cross-entropy makes it.
    """

    @staticmethod
    def forward(ctx, mu, labels, ignore_index):
        energy, lse = backend(mu).clamped_categorical_forward(mu, labels, ignore_index)
        ctx.save_for_backward(mu, labels, lse)
        ctx.ignore_index = ignore_index
        return energy

    @staticmethod
    def backward(ctx, grad_energy):
        mu, labels, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            energy = F.cross_entropy(wide(mu), labels, ignore_index=ctx.ignore_index, reduction="none")
            return *torch.autograd.grad(energy, mu, grad_energy, create_graph=True), None, None
        grad = backend(mu).clamped_categorical_backward(mu, labels, lse, grad_energy, ctx.ignore_index)
        return grad, None, None


class Categorical(Distribution):
    """The softmax layer, hidden or output: the state is the logits along the last axis (Pinchetti et al. 2022, 3.1).

    As an output node it is clamped to integer labels (cross-entropy; rows whose label is ``ignore_index`` count
    nothing) or to probabilities of the logits' shape.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def energy(self, u: Tensor, mu: Tensor) -> Tensor:
        """p (log p - log q) per class."""
        return categorical_energy(u, mu)

    def emission(
        self, u: Tensor, causal: bool = False, padding: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """softmax(u) along the last axis; masks as in `pc_triton.reference.mask_logits`."""
        return softmax(mask_logits(wide(u), causal, padding, segments)).to(u.dtype)

    def check_target(self, target: Tensor, mu: Tensor) -> Tensor:
        """Check labels, int64 ``[S, ...]`` for mu ``[S, ..., C]``; the number of those that are not ignored (0-dim).

        Or probabilities ``[S, ..., C]``, whose items are samples. Raises ValueError for another dtype or shape, and for
        `check_values`.
        """
        if target.is_floating_point():
            return super().check_target(target, mu)
        if target.dtype != torch.int64:
            raise ValueError(f"labels are {target.dtype}: give int64, or probabilities in floating point")
        if target.shape != mu.shape[:-1]:
            need = f"logits {tuple(mu.shape)} need {tuple(mu.shape[:-1])}, with the classes along the last axis"
            values = "; values, such as those of a Bernoulli output, are floats" if target.shape == mu.shape else ""
            raise ValueError(f"labels have shape {tuple(target.shape)}: {need}{values}{see('shape-of-the-labels')}")
        self.check_values(target, mu.shape[-1])
        return (target != self.ignore_index).sum()

    def check_values(self, target: Tensor, classes: int) -> None:
        """Raise ValueError for a label outside 0 .. classes - 1 that is not ignored, or a probability outside [0, 1].

        On a GPU that is a device-side assertion, as torch's own.
        """
        if target.is_floating_point():
            _check_probabilities(target)
        elif not tracing.get():
            self._check_labels(target, classes)

    def _check_labels(self, labels: Tensor, classes: int) -> None:
        if not labels.is_cuda:
            low, high = labels.aminmax()
            if low >= 0 and high < classes:
                return
        wrong = ((labels < 0) | (labels >= classes)) & (labels != self.ignore_index)
        if wrong.is_cuda:
            torch._assert_async(~wrong.any(), "a label is outside 0 .. C - 1")
        elif wrong.any():
            raise ValueError(
                f"label {labels[wrong][0].item()} is outside 0 .. {classes - 1} (ignore_index is {self.ignore_index})"
            )

    def clamped(self, mu: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """-log q_y summed per sample ``[S]``; arguments as in `check_target`."""
        if target.is_floating_point():
            return super().clamped(mu, target, mask)
        energy = _ClampedCategorical.apply(mu.reshape(-1, mu.shape[-1]), target.reshape(-1), self.ignore_index)
        return sum_samples(energy, len(mu))

    def variables(self, mu: Tensor) -> float:
        """Rows."""
        return mu.numel() / mu.shape[-1]

    def _clamped_energy(self, target: Tensor, mu: Tensor) -> Tensor:
        return torch.xlogy(target, target) - target * log_softmax(mu)

    def node_forward(self, mu, state, pi, unit, *, form, **masks):
        return backend(mu).categorical_forward(mu, state, pi, form=form, **masks)

    def node_step(self, mu, state, grad, pi, unit, keep, move, **options):
        return backend(mu).categorical_step(mu, state, grad, pi, keep, move, **options)

    def fall(self, mu, grad, samples, **masks):
        p, g = self.emission(wide(mu), **masks), wide(grad)
        mean = (p * g).sum(-1, keepdim=True)
        return _fall(sum_samples(p * (g - mean) ** 2, samples))


def _fall(fall: Tensor) -> Tensor:
    """What `Distribution.fall` gives of a family that has no unit."""
    return torch.stack([torch.ones_like(fall), fall])


def _check_probabilities(target: Tensor) -> None:
    """Raise ValueError for a target outside [0, 1] (on a GPU assert on the device)."""
    if tracing.get():
        return
    wrong = ((target < 0) | (target > 1)).any()
    if wrong.is_cuda:
        torch._assert_async(~wrong, "a target probability is outside [0, 1]")
    elif wrong:
        raise ValueError("a target is outside [0, 1]: this output takes probabilities")


def output_family(given: Distribution | None, own: Distribution | None, target: Tensor) -> Distribution:
    """The family of the clamped output: the one given; Categorical for labels; the output node's own; Gaussian(1)."""
    if given is not None:
        return given
    if target.is_floating_point():
        return _VALUES if own is None else own
    return own if isinstance(own, Categorical) else _LABELS


_VALUES, _LABELS = Gaussian(1.0), Categorical()  # made once: every pass asks for the output's family


class Laplace(Distribution):
    """Laplace of scale 1, in units of the node's own scale: errors count by their size, not by its square."""

    measured = True

    def energy(self, u: Tensor, mu: Tensor) -> Tensor:
        """KL of two Laplace distributions of scale 1: ``|d| + exp(-|d|) - 1`` per element."""
        return laplace_energy(u - mu)

    def node_forward(self, mu, state, pi, unit, *, form):
        return backend(mu).laplace_forward(mu, state, pi, unit, form=form)

    def node_step(self, mu, state, grad, pi, unit, keep, move, **options):
        return backend(mu).laplace_step(mu, state, grad, pi, unit, keep, move, **options)

    def fall(self, mu, grad, samples):
        mean, fall = backend(mu).location_fall(mu, grad, samples)
        return torch.stack([mean, self.variance(mu) * fall])


class StudentT(Distribution):
    """Student's t with ``nu`` degrees of freedom > 0, in units of the node's own scale: heavy-tailed errors.

    The energy is the log likelihood ratio log D(mu; mu) - log D(u; mu), since its KL has no closed form.
    """

    measured = True

    def __init__(self, nu: float = 4.0) -> None:
        if not (nu > 0 and math.isfinite(nu)):
            raise ValueError(f"nu={nu}: give a positive finite number of degrees of freedom")
        super().__init__()
        self.nu = nu

    def energy(self, u: Tensor, mu: Tensor) -> Tensor:
        """(nu + 1) / 2 log(1 + d^2 / nu) per element."""
        return 0.5 * (self.nu + 1) * torch.log1p((u - mu) ** 2 / self.nu)

    def variance(self, mu: Tensor) -> float:
        """The inverse curvature nu / (nu + 1)."""
        return self.nu / (self.nu + 1)

    def node_forward(self, mu, state, pi, unit, *, form):
        return backend(mu).student_t_forward(mu, state, pi, unit, form=form, nu=self.nu)

    def node_step(self, mu, state, grad, pi, unit, keep, move, **options):
        return backend(mu).student_t_step(mu, state, grad, pi, unit, keep, move, nu=self.nu, **options)

    def fall(self, mu, grad, samples):
        mean, fall = backend(mu).location_fall(mu, grad, samples)
        return torch.stack([mean, self.variance(mu) * fall])
