"""The output of a batch: what the model returned, clamped to y."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .arithmetic import sum_samples, wide
from .checks import check_finite, described, ordinary
from .distributions import Distribution
from .families import Categorical, output_family
from .node import Node
from .returned import refuse_activation_twice, refuse_classes_first


class Output:
    """What a batch of S samples is clamped to, and the energy of that.

    family: that of the output, if given. weight: of its energy in F. mask: bool, the target's shape, True where it is
    clamped; what the target holds elsewhere is not read.
    """

    def __init__(
        self, target: Any, samples: int, family: Distribution | None, weight: float, mask: Tensor | None
    ) -> None:
        if target is not None and not isinstance(target, Tensor):
            raise TypeError(f"y is a {type(target).__name__}: give a tensor, or None for a free output")
        self.samples, self.given, self.weight, self.mask = samples, family, weight, mask
        self.target = ordinary(target)
        self._apply_mask()
        check_finite("y", self.target)
        self.node: Node | None = None  # whose emission the model returns, if any
        self.direct = False  # whether what the model returns is clamped even so: some of that node's values
        self.shape: torch.Size | None = None  # of what the model returns, where that is another than the node's
        self.items: Tensor | None = None  # what the loss is a mean over

    def _apply_mask(self) -> None:
        if self.mask is None:
            return
        if self.target is None:
            raise ValueError("mask says where y is clamped, and y is None: give y, or leave the mask out")
        mask: Any = self.mask
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != self.target.shape:
            raise ValueError(
                f"mask is {described(mask)}: give a bool tensor {tuple(self.target.shape)}, True where y is clamped"
            )
        first = self.mask.flatten().int().argmax().view(1)  # a value that is clamped fits the output's family
        fill = self.target.flatten().index_select(0, first)
        fill = torch.where(self.mask.any(), fill, torch.zeros_like(fill))  # where nothing is, 0 fits all of ours
        self.target = torch.where(self.mask, self.target, fill)

    @property
    def family(self) -> Distribution:
        """The family that is clamped."""
        assert self.target is not None
        return output_family(self.given, None if self.node is None else self.node.family, self.target)

    def labels(self, family: Categorical) -> Tensor:
        """The labels; those that the mask does not clamp are ignored."""
        assert self.target is not None
        return self.target if self.mask is None else torch.where(self.mask, self.target, family.ignore_index)

    def check(self, family: Distribution, mu: Tensor) -> None:
        """Check, in a batch's first pass, that the target fits the output mu, and count its items."""
        if self.target is None:
            return
        if self.target.device != mu.device:
            raise ValueError(f"y is on {self.target.device}, the model's output on {mu.device}: move y there")
        if self.mask is not None and "mask" not in inspect.signature(family.clamped).parameters:
            raise TypeError(f"{type(family).__name__}.clamped(mu, target) takes no mask: add the argument mask=None")
        refuse_activation_twice(family, mu)
        if isinstance(family, Categorical) and not self.target.is_floating_point():
            refuse_classes_first(self.target, mu)
        self.items = family.check_target(self.target, mu)
        if self.mask is not None and isinstance(family, Categorical) and not self.target.is_floating_point():
            self.items = (self.labels(family) != family.ignore_index).sum()

    def energy(self, mu: Tensor, first: bool) -> Tensor:
        """The output's energy ``[S]`` for its prediction mu. first: whether mu is still to be checked."""
        if self.shape is not None:
            mu = mu.reshape(self.shape)
        if self.target is None:
            return wide(mu.detach()).new_zeros(self.samples)
        family = self.family
        if first:
            self.check(family, mu)
        if isinstance(family, Categorical) and not self.target.is_floating_point():
            energy = family.clamped(mu, self.labels(family))
        elif self.mask is None:
            energy = family.clamped(mu, self.target)
        else:
            energy = family.clamped(mu, self.target, self.mask)
        return self.weigh(wide(energy))

    def energy_of_rows(self, energy: Tensor) -> Tensor:
        """The output's energy ``[S]``, of a `Head`'s rows."""
        return self.weigh(sum_samples(energy, self.samples))

    def weigh(self, energy: Tensor) -> Tensor:
        """The energy by the output's weight."""
        return energy if self.weight == 1 else self.weight * energy
