"""The families of a value node: what its state means, what it emits, and what its energy is.

A family is one module, put after any torch module whose output is to be a state of the network:
``nn.Sequential(nn.Conv2d(1, 8, 3), pc.Gaussian(), ...)``. Writing ``energy`` is enough to add one: the gradients then
come from autograd (see `Laplace`, five lines). The four families of Pinchetti et al. 2022 compute energy, gradients and
move in one fused pass instead (``reference.py`` on a CPU, ``kernels/`` on a GPU).
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .dispatch import backend, tracing
from .reference import (
    Step,
    bernoulli_energy,
    categorical_energy,
    error_of,
    gaussian_logvar_energy,
    kept,
    log_softmax,
    mask_logits,
    per_sample,
    sum_samples,
    wide,
)

if TYPE_CHECKING:
    from .inference import Inference

current: ContextVar[Inference | None] = ContextVar("pc_triton_inference", default=None)
"""The inference under way in this thread; None outside it, where a value node is its emission."""
running: list[Inference] = []
"""Those under way in any thread. torch.compile guards on whether there are any, as it cannot on a ContextVar."""


def inference_here() -> Inference | None:
    """`current`, or None where no inference is running at all: so much of it torch.compile can trace."""
    return current.get() if len(running) > 0 else None


def visited(node: Distribution | None) -> bool:
    """Whether this node's layer may have to visit an inference, which it does outside of torch.compile's graphs.

    Such layers break the graph, and what lies between them is compiled. Outside inference the model is one graph.
    """
    return len(running) > 0 and node is not None and node.error is None  # torch 2.11 traces no bool(list)


def add_energy(energy: Tensor) -> None:
    """Add a term of your own to the free energy, from within a model's forward: a prior, a penalty, a constraint.

        h = self.hidden(x)               # a pc layer
        pc.add_energy(0.01 * h.abs())    # inference and learning lower this too

    energy: ``[S, ...]`` in nats, S samples along the first axis (or a whole number of rows each), a differentiable
    function of what value nodes emit. Counted in each sample's F as it is, whatever the nodes' precision. Outside
    `FreeEnergy` it does nothing.
    """
    if running:
        _add_energy(energy)


def _add_energy(energy: Tensor) -> None:
    inference = inference_here()
    if inference is not None:
        inference.add_energy(energy)


class Distribution(nn.Module):
    """A value node with distribution D(u). Subclass it and write `energy`; the rest has defaults.

    Outside inference the module is its emission: the identity for a Gaussian, softmax for a Categorical, sigmoid for a
    Bernoulli, a sample (in evaluation the mean) for GaussianLogVar. It has no parameters.

    States, predictions and gradients are ``[B, ...]`` with the parameters along the last axis. In inference ``pi`` is
    the precision ``[S]`` of each of S samples and ``unit`` the node's own scale ``[S]`` or None (see `measured`).
    """

    measured = False
    """True for a location family: errors count in units of the node's root mean square, measured per sample."""
    error: Tensor | None = None
    """The node's e, while it is a leaf of autograd's in a pass of a compiled model: see `Inference.leaves`."""

    def forward(self, mu: Tensor, **frozen: Any) -> Tensor:
        """The emission of the node for its prediction mu ``[B, ..., C]``; in inference that of its state.

        frozen: what the family needs beside mu and inference holds fixed, such as attention's masks.
        """
        if self.error is not None:
            return mu + self.error
        return self._visit(mu, frozen) if visited(self) else self._at_prediction(mu, frozen)

    def _visit(self, mu: Tensor, frozen: dict[str, Any]) -> Tensor:
        inference = inference_here()
        return self._at_prediction(mu, frozen) if inference is None else inference.visit(self, mu, frozen)

    def _at_prediction(self, mu: Tensor, frozen: dict[str, Any]) -> Tensor:
        if self.training:
            frozen = {**self.frozen(mu), **frozen}
        return self.emission(mu, **frozen)

    def energy(self, u: Tensor, mu: Tensor) -> Tensor:
        """Energy per element in nats, e.g. KL[D(u) || D(mu)] (Pinchetti et al. 2022, eq. 5): >= 0, and 0 at u = mu.

        u, mu: ``[B, ...]``, float. Returns any shape that begins with B; inference sums it per sample.
        """
        raise NotImplementedError(f"{type(self).__name__} needs an energy(u, mu)")

    def emission(self, u: Tensor) -> Tensor:
        """What the node hands on to its children, m(u): by default the state itself. u ``[B, ...]``."""
        return u

    def variance(self, mu: Tensor) -> Tensor | float:
        """The inverse of the energy's curvature in u at u = mu, by which the state's move is scaled; by default 1."""
        return 1.0

    def frozen(self, mu: Tensor) -> dict[str, Any]:
        """Random numbers drawn once per batch and held through its inference, as keyword arguments; by default none."""
        return {}

    def check_target(self, target: Tensor, mu: Tensor) -> Tensor:
        """Check what an output node is to be clamped to; the number of items in it (0-dim): here its samples.

        mu ``[S, ...]``; target of mu's shape. Raises ValueError if the shapes differ, or for `check_values`.
        """
        if not target.is_floating_point():
            raise ValueError(f"target is {target.dtype}: {type(self).__name__} needs floating point: cast it to float")
        if target.shape != mu.shape:
            raise ValueError(
                f"target has shape {tuple(target.shape)}, the model's output {tuple(mu.shape)}: "
                f"{type(self).__name__} needs them equal"
            )
        self.check_values(target, mu.shape[-1])
        return torch.full((), float(len(mu)), device=mu.device)

    def check_values(self, target: Tensor, classes: int) -> None:
        """Raise ValueError for values that the output cannot have (on a GPU assert on the device); here for none."""

    def clamped(self, mu: Tensor, target: Tensor) -> Tensor:
        """Energy of an output node clamped to ``target``, per sample ``[S]``; shapes as in `check_target`."""
        return sum_samples(self._clamped_energy(target.to(mu.dtype), mu), len(mu))

    def _clamped_energy(self, target: Tensor, mu: Tensor) -> Tensor:
        return self.energy(target, mu)

    # What inference calls. Here by autograd; the built-in families override both with a fused pass.

    def node_forward(
        self, mu: Tensor, state: Tensor, pi: Tensor, unit: Tensor | None, *, form: str, **frozen: Any
    ) -> tuple[Tensor, Tensor]:
        """Emission and energy ``[S]`` of the node; arguments as in ``reference.py``."""
        mu_ = wide(mu)
        u = mu_ + state if form == "error" else state
        return self.emission(u, **frozen).to(mu.dtype), pi * sum_samples(self._in_units(u, mu_, unit), len(pi))

    def node_step(
        self,
        mu: Tensor,
        state: Tensor | None,
        grad: Tensor | None,
        pi: Tensor,
        unit: Tensor | None,
        keep: Tensor | None,
        move: Tensor | None,
        *,
        form: str,
        moved: bool = False,
        state_dtype: torch.dtype | None = None,
        **frozen: Any,
    ) -> Step:
        """One inference step (state, dF/dmu); arguments as in ``reference.py``."""
        mu_ = wide(mu.detach()).requires_grad_()
        d = error_of(state, mu_.detach(), form)
        with torch.enable_grad():
            u = (mu_ + d).detach().requires_grad_()
            e_u, e_mu = torch.autograd.grad(self._in_units(u, mu_, unit).sum(), [u, mu_], materialize_grads=True)
            push = mu_.new_zeros(())
            if grad is not None:
                push = torch.autograd.grad(self.emission(u, **frozen), u, wide(grad))[0]
        mu_ = mu_.detach()
        new = d
        if keep is not None and move is not None:
            v = self._variance(mu_, unit)
            new = d - v * (per_sample(1 - keep, mu_) * e_u + per_sample(move / pi, mu_) * push)
        pi_ = per_sample(pi, mu_)
        if form == "error":
            return kept(new, state, state_dtype), (pi_ * (e_u + e_mu) + push).to(mu.dtype)
        if moved:
            return mu_ + new, self.node_step(mu, mu_ + new, grad, pi, unit, None, None, form=form, **frozen)[1]
        return mu_ + new, (pi_ * e_mu).to(mu.dtype)

    def fall(self, mu: Tensor, grad: Tensor, samples: int, unit: Tensor | None, **frozen: Any) -> Tensor:
        """<J'g, V J'g> per sample ``[S]``: 2 pi times the fall of F by inference, to first order in 1 / pi."""
        with torch.enable_grad():
            u = wide(mu.detach()).requires_grad_()
            push = torch.autograd.grad(self.emission(u, **frozen), u, wide(grad))[0]
        return sum_samples(self._variance(u.detach(), unit) * push * push, samples)

    def units(self, mu: Tensor) -> float:
        """The number of units whose states mu holds: its elements; for a Categorical its rows."""
        return mu.numel()

    def _in_units(self, u: Tensor, mu: Tensor, unit: Tensor | None) -> Tensor:
        if unit is None:
            return self.energy(u, mu)
        scale = per_sample(unit, mu).clamp_min(torch.finfo(mu.dtype).tiny)
        return self.energy(u / scale, mu / scale)

    def _variance(self, mu: Tensor, unit: Tensor | None) -> Tensor | float:
        return self.variance(mu) if unit is None else self.variance(mu) * per_sample(unit, mu) ** 2


class Gaussian(Distribution):
    """Gaussian of fixed variance; the state is its mean (Pinchetti et al. 2022, section 3; Rao & Ballard 1999).

    variance: sigma^2 > 0. None (default): a hidden node counts its error in units of its own root mean square, as
    ``precision="auto"`` measures it; an output node, or a number given for the precision, has variance 1.
    Raises ValueError if it is not a positive finite number.
    """

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
            return pi / self._sigma2
        return pi / (unit * unit).clamp_min(1e-30)

    def node_forward(self, mu, state, pi, unit, *, form):
        return backend(mu).gaussian_forward(mu, state, self._precision(pi, unit), form=form)

    def node_step(self, mu, state, grad, pi, unit, keep, move, **options):
        return backend(mu).gaussian_step(mu, state, grad, self._precision(pi, unit), keep, move, **options)

    def error_energy(self, state: Tensor, pi: Tensor, unit: Tensor | None) -> Tensor:
        """The energy ``[S]`` in error form, where it is one of e alone."""
        dtype = torch.promote_types(state.dtype, torch.float32)
        norm = torch.linalg.vector_norm(state.view(len(pi), -1), dim=1, dtype=dtype)
        return 0.5 * self._precision(pi, unit) * norm**2

    def linear_forward(self, x, weight, bias, state, pi, unit):
        """`node_forward` in error form for the prediction x W' + b, x ``[R, K]``: see ``reference.py``."""
        return backend(x).linear_forward(x, weight, bias, state, self._precision(pi, unit), form="error")

    def linear_step(self, grad, weight, state, pi, unit, keep, move):
        """`node_step` in error form: the moved state, and the gradient in x."""
        return backend(grad).linear_backward(grad, weight, state, self._precision(pi, unit), keep, move)

    def fall(self, mu, grad, samples, unit):
        g = wide(grad)
        return sum_samples(g * g, samples) * (self._sigma2 if unit is None else unit * unit)

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

    def fall(self, mu, grad, samples, unit, *, noise):
        if self.prior:
            return super().fall(mu, grad, samples, unit, noise=noise)
        _, s = wide(mu).chunk(2, -1)
        g = wide(grad)
        return sum_samples(s.exp() * g * g * (1 + 0.5 * wide(noise) ** 2), samples)


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

    def fall(self, mu, grad, samples, unit):
        p, g = torch.sigmoid(wide(mu)), wide(grad)
        return sum_samples(p * (1 - p) * g * g, samples)


class _ClampedCategorical(torch.autograd.Function):
    """-log q_y per row; the gradient q - y is made in the backward pass from the saved log-sum-exp."""

    @staticmethod
    def forward(ctx, mu, labels, ignore_index):
        energy, lse = backend(mu).clamped_categorical_forward(mu, labels, ignore_index)
        ctx.save_for_backward(mu, labels, lse)
        ctx.ignore_index = ignore_index
        return energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_energy):
        mu, labels, lse = ctx.saved_tensors
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
        return log_softmax(mask_logits(u, causal, padding, segments)).exp()

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
            raise ValueError(f"labels have shape {tuple(target.shape)}: {need}{values}")
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

    def clamped(self, mu: Tensor, target: Tensor) -> Tensor:
        """-log q_y summed per sample ``[S]``; shapes as in `check_target`."""
        if target.is_floating_point():
            return super().clamped(mu, target)
        energy = _ClampedCategorical.apply(mu.reshape(-1, mu.shape[-1]), target.reshape(-1), self.ignore_index)
        return sum_samples(energy, len(mu))

    def units(self, mu: Tensor) -> float:
        """Rows."""
        return mu.numel() / mu.shape[-1]

    def _clamped_energy(self, target: Tensor, mu: Tensor) -> Tensor:
        return torch.xlogy(target, target) - target * log_softmax(mu)

    def node_forward(self, mu, state, pi, unit, *, form, **masks):
        return backend(mu).categorical_forward(mu, state, pi, form=form, **masks)

    def node_step(self, mu, state, grad, pi, unit, keep, move, **options):
        return backend(mu).categorical_step(mu, state, grad, pi, keep, move, **options)

    def fall(self, mu, grad, samples, unit, **masks):
        p, g = self.emission(wide(mu), **masks), wide(grad)
        mean = (p * g).sum(-1, keepdim=True)
        return sum_samples(p * (g - mean) ** 2, samples)


def _check_probabilities(target: Tensor) -> None:
    """Raise ValueError for a target outside [0, 1] (on a GPU assert on the device)."""
    if tracing.get():
        return
    wrong = ((target < 0) | (target > 1)).any()
    if wrong.is_cuda:
        torch._assert_async(~wrong, "a target probability is outside [0, 1]")
    elif wrong:
        raise ValueError("a target is outside [0, 1]: this output takes probabilities")


class Laplace(Distribution):
    """Laplace of scale 1, in units of the node's own scale: an example of a family written by its energy alone."""

    measured = True

    def energy(self, u: Tensor, mu: Tensor) -> Tensor:
        """KL of two Laplace distributions of scale 1: \\|d\\| + exp(-\\|d\\|) - 1 per element."""
        d = (u - mu).abs()
        return d + torch.expm1(-d)

    def node_forward(self, mu, state, pi, unit, *, form):
        return backend(mu).laplace_forward(mu, state, pi, unit, form=form)

    def node_step(self, mu, state, grad, pi, unit, keep, move, **options):
        return backend(mu).laplace_step(mu, state, grad, pi, unit, keep, move, **options)


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
        return backend(mu).student_t_forward(mu, state, pi, unit, nu=self.nu, form=form)

    def node_step(self, mu, state, grad, pi, unit, keep, move, **options):
        return backend(mu).student_t_step(mu, state, grad, pi, unit, keep, move, nu=self.nu, **options)
