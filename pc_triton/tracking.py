"""The step of inference's only move, learnt from batch to batch: T = 2 in error order, the default.

After one move no pass is left that could correct it. But the learning pass shows F at the moved states. With F and its
slope before the move that is a parabola, whose minimum is the step that would have been the best. The running mean of
that is the step of the batches that follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import parallel
from .arithmetic import per_sample
from .node import Node
from .rules import Constant, Guarded

NEWEST = 0.1
"""The part of the newest batch in the running mean."""
SMALLEST = 1e-3
"""The smallest step: one that is 0 would never show how much larger it could be."""


class Tracked(Guarded):
    """A guarded step whose first move goes by ``mean``, the running mean of the steps that were the best, 0-dim.

    None stands for no batch so far. Then the first move goes by ``step`` and is corrected at once, in each sample, by a
    forward pass more.
    """

    def __init__(self, step: float, mean: Tensor | None = None) -> None:
        super().__init__(step)
        self.mean = mean

    def begin(self, free_energy: Tensor, slope: Tensor | None, remembers: bool) -> None:
        super().begin(free_energy, slope, remembers)
        if self.mean is not None:
            self.step = torch.zeros_like(free_energy) + self.mean.to(free_energy)

    def finish(self, nodes: Sequence[Node], look: Callable[[], Tensor]) -> None:
        if self.mean is not None or self.moves != 1 or self.slope is None:
            return
        best = self.slope / torch.maximum(self._curvature(look()), self.slope)
        best = torch.where(best > 0, best, self.step)  # where nothing moved, or F is no number
        for node in nodes:
            if node.state is not None:
                node.state = node.state * per_sample(best / self.step, node.state).to(node.state.dtype)
        self.step = best

    def parabola(self, free_energy: Tensor) -> Tensor | None:
        """Slope and curvature ``[2]`` of F along the only move, summed over samples; free_energy ``[S]`` is after it.

        None where another number of moves was made, or where they did not start from the prediction.
        """
        if self.moves != 1 or self.slope is None:
            return None
        both = torch.stack([self.slope, self._curvature(free_energy)])
        return torch.where(both.isfinite().all(0), both, 0.0).sum(1)

    def _curvature(self, free_energy: Tensor) -> Tensor:
        """Of F ``[S]`` along the first move, from F and its slope before it and F after it."""
        assert self.slope is not None
        return 2 * (free_energy - self.accepted + self.step * self.slope) / self.step**2


class StepTracker(nn.Module):
    """The running mean of the best steps, as a part of `FreeEnergy`: a buffer, which checkpoints then hold.

    Processes learn a step each, of their own samples; with `shared` one of the samples of all of them.
    """

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((), torch.nan, dtype=torch.float32))
        self.begun = False  # whether it holds a step; to look into the buffer would wait for the GPU
        self.shared = False  # whether all processes learn one step, of what all of them see
        self.seen: Tensor | None = None  # parabolas, since the last update
        self.holds = False

    def rule(self, step: float) -> Tracked:
        """The rule for a batch; ``step`` is that of a first one."""
        return Tracked(step, self.mean if self.begun else None)

    def awaits(self, rule: Constant) -> bool:
        """Whether this rule is of a first batch, from which a step is to be learnt."""
        return isinstance(rule, Tracked) and not self.begun

    def learn(self, rule: Tracked, free_energy: Tensor) -> None:
        """Have the batches that follow begin with the step that was the best for the rule's.

        That is the minimum of the samples' summed parabolas, at most 1, Newton's. free_energy: F ``[S]`` of the
        learning pass.
        """
        parabola = rule.parabola(free_energy)
        if parabola is None:
            return
        self.seen = parabola if self.seen is None else self.seen + parabola
        self.first = rule.first
        if not self.holds:
            self._update()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Within it the step stays as it is; after it all batches within count as one, as micro-batches do."""
        self.holds = True
        try:
            yield
        except BaseException:
            self.seen = None
            raise
        finally:
            self.holds = False
        self._update()

    def _update(self) -> None:
        if self.seen is None:
            return
        slope, curvature = parallel.total(self.seen) if self.shared else self.seen
        self.seen = None
        self.mean = self.mean.to(slope.device)
        best = (slope / torch.maximum(curvature, slope)).clamp(SMALLEST, 1.0).to(self.mean.dtype)
        mean = self.mean if self.begun else torch.full_like(best, self.first)
        best = torch.where(slope > 0, best, mean)  # where nothing moved there is nothing to learn
        self.mean.copy_(mean + NEWEST * (best - mean) if self.begun else best)
        self.begun = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """A checkpoint made before steps were tracked has none, and begins as a new model does."""
        name = f"{prefix}mean"
        state_dict.setdefault(name, torch.full_like(self.mean, torch.nan))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self.begun = bool(state_dict[name].isfinite())
