"""`Distribution`: what a family of value nodes is. ``families.py`` has the ones that come with the package.

A family is one module, put after any torch module whose output is to be a state of the network:
``nn.Sequential(nn.Conv2d(1, 8, 3), pc.Gaussian(), ...)``. Writing ``energy`` is enough to add one: its gradients then
come from autograd. A family may also bring its own fused pass, `node_forward` and `node_step`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .arithmetic import Step, error_of, kept, mean_square, moved_to, per_sample, state_at, sum_samples, wide
from .context import awaits_pass, outside_graphs, pass_here
from .errors import see


class Distribution(nn.Module):
    """A value node with distribution D(u). Subclass it and write `energy`; the rest has defaults.

    Outside inference the module is its emission: the identity for a Gaussian, softmax for a Categorical, sigmoid for a
    Bernoulli, a sample (in evaluation the mean) for GaussianLogVar. It has no parameters.

    States, predictions and gradients are ``[B, ...]`` with the parameters along the last axis. In inference ``pi`` is
    the precision ``[S]`` of each of S samples and ``unit`` the node's own scale ``[S]`` or None (see `measured`).
    """

    measured = False
    """True for a location family: errors count in units of the node's root mean square, measured per sample."""
    quadratic = False
    """True where the energy in units is the plain one over unit^2, which then goes into the precision once a batch."""
    error: Tensor | None = None
    """The error e that the node adds to its prediction in a compiled model's pass: see `Gaussian.shifted`."""

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script calls this first."""
        raise TypeError(
            "torch.jit.script takes no value nodes: give the model to torch.jit.trace or torch.export, or script the "
            "same model of plain layers, which loads its state dict" + see("export")
        )

    @property
    def qconfig(self) -> Any:
        """torch.ao.quantization sets this in every module."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise TypeError(
            "torch.ao.quantization goes by the very type of a layer and would leave pc.Linear as it is: quantise the "
            "same model of plain layers, which loads its state dict" + see("quantisation")
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A family derived from a built-in one, with mathematics of its own, is not computed by its parent's."""
        super().__init_subclass__(**kwargs)

        def place(name: str) -> int:
            return next(i for i, base in enumerate(cls.__mro__) if name in vars(base))

        own = min(map(place, ("energy", "emission", "variance")))
        for name in ("node_forward", "node_step", "fall", "quadratic"):
            if place(name) > own:
                setattr(cls, name, vars(Distribution)[name])

    def forward(self, mu: Tensor, **frozen: Any) -> Tensor:
        """The emission of the node for its prediction mu ``[B, ..., C]``; in inference that of its state.

        frozen: what the family needs beside mu and inference holds fixed, such as attention's masks.
        """
        if self.error is not None:
            return mu + self.error
        return outside_graphs(self._emit, mu, frozen) if awaits_pass(self) else self._at_prediction(mu, frozen)

    def _emit(self, mu: Tensor, frozen: dict[str, Any]) -> Tensor:
        here = pass_here()
        return self._at_prediction(mu, frozen) if here is None else here.emit(self, mu, frozen)

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
        """What a batch's first pass makes and inference holds, as keyword arguments of `emission`; by default none.

        Such as random numbers, or the first prediction mu itself.
        """
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
        return torch.full((), float(len(mu)), dtype=torch.float32, device=mu.device)

    def check_values(self, target: Tensor, classes: int) -> None:
        """Raise ValueError for values that the output cannot have (on a GPU assert on the device); here for none."""

    def clamped(self, mu: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Energy of an output node clamped to ``target``, per sample ``[S]``; shapes as in `check_target`.

        mask: bool, the target's shape, True where it is clamped; None for everywhere.
        """
        energy = self._clamped_energy(target.to(mu.dtype), mu)
        if mask is not None:
            if energy.shape != mask.shape:
                raise ValueError(f"a mask needs an energy for each element, and {type(self).__name__} has one for more")
            energy = torch.where(mask, energy, 0.0)
        return sum_samples(energy, len(mu))

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
            new = moved_to(new, d, keep, move)
        pi_ = per_sample(pi, mu_)
        if form == "error":
            return kept(new, state, state_dtype), (pi_ * (e_u + e_mu) + push).to(mu.dtype)
        u = state_at(mu_, new, state, keep, move)
        if moved:
            return u, self.node_step(mu, u, grad, pi, unit, None, None, form=form, **frozen)[1]
        return u, (pi_ * e_mu).to(mu.dtype)

    def fall(self, mu: Tensor, grad: Tensor, samples: int, **frozen: Any) -> Tensor:
        """Of each sample unit^2 and <J'g, V J'g> with a unit of 1, ``[2, S]``.

        unit^2 is the mean of mu^2, and is read where the family is `measured`. The second times unit^2 is 2 pi times
        the fall of F by inference, to first order in 1 / pi.
        """
        with torch.enable_grad():
            u = wide(mu.detach()).requires_grad_()
            push = torch.autograd.grad(self.emission(u, **frozen), u, wide(grad))[0]
        u = u.detach()
        return torch.stack([mean_square(u, samples), sum_samples(self.variance(u) * push * push, samples)])

    def variables(self, mu: Tensor) -> float:
        """How many variables have their states in mu: its elements; for a Categorical its rows."""
        return mu.numel()

    def _in_units(self, u: Tensor, mu: Tensor, unit: Tensor | None) -> Tensor:
        if unit is None:
            return self.energy(u, mu)
        scale = per_sample(unit, mu).clamp_min(torch.finfo(mu.dtype).tiny)
        return self.energy(u / scale, mu / scale)

    def _variance(self, mu: Tensor, unit: Tensor | None) -> Tensor | float:
        return self.variance(mu) if unit is None else self.variance(mu) * per_sample(unit, mu) ** 2


def node_of(module: nn.Module) -> Distribution | None:
    """The value node of a module's output: the module itself, where it is a family."""
    node = module if isinstance(module, Distribution) else getattr(module, "node", None)
    return node if isinstance(node, Distribution) else None
