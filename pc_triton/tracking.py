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

    def __init__(self, step: float, mean: Tensor | None = None, coarse: bool = False) -> None:
        super().__init__(step)
        self.mean = mean
        self.coarse = coarse  # whether F is too coarse to learn from

    def begin(self, free_energy: Tensor, slope: Tensor | None, remembers: bool) -> None:
        super().begin(free_energy, slope, remembers)
        if self.mean is not None:
            self.step = torch.zeros_like(free_energy) + torch.where(self.mean.isfinite(), self.mean, self.first)

    def unguarded(self, nodes: Sequence[Node], free_energy: Tensor) -> tuple[Tensor, Tensor]:
        """Where F is coarse, Newton's step.

        In bfloat16 u = mu + e loses what is small in e, and F tells of its rounding. And where the move was made in
        fewer digits than the weights learn in, F before it and after it differ by their rounding.
        """
        if self.coarse or any(node.dtype == torch.bfloat16 for node in nodes):
            self.coarse, self.step = True, torch.ones_like(self.step)
        return super().unguarded(nodes, free_energy)

    def finish(self, nodes: Sequence[Node], look: Callable[[], Tensor]) -> None:
        if self.mean is not None or self.coarse or self.moves != 1 or self.slope is None:
            return
        best = self.slope / torch.maximum(self._curvature(look()), self.slope)
        best = torch.where(best > 0, best, self.step)  # where nothing moved
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
        """Of F ``[S]`` along the first move, from F and its slope before it and F after it.

        At most so large that a tenth of the step would have been the best. Where F is no number, the step was too long,
        but not known by how much; and no one sample may decide for all.
        """
        assert self.slope is not None
        curvature = 2 * (free_energy - self.accepted + self.step * self.slope) / self.step**2
        most = 10 * self.slope / self.step
        return torch.minimum(curvature.nan_to_num(nan=torch.inf, posinf=torch.inf), most)


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
        self.holds = 0  # how many `hold` are entered

    def rule(self, step: float, coarse: bool = False) -> Tracked:
        """The rule for a batch; ``step`` is that of a first one, coarse as in `Tracked`."""
        return Tracked(step, self.mean if self.begun else None, coarse)

    def awaits(self, rule: Constant) -> bool:
        """Whether this rule is that of a first batch, whose step the batches after it will start from."""
        return isinstance(rule, Tracked) and not self.begun

    def learn(self, rule: Tracked, free_energy: Tensor) -> None:
        """Have the batches that follow begin with the step that was the best for the rule's.

        That is the minimum of the samples' summed parabolas, at most 1, Newton's. free_energy: F ``[S]`` of the
        learning pass.
        """
        if rule.coarse and not self.begun:
            self.mean, self.begun = torch.ones_like(self.mean, device=free_energy.device), True
        parabola = None if rule.coarse else rule.parabola(free_energy)
        if parabola is None:
            return
        self.seen = parabola if self.seen is None else self.seen + parabola
        if not self.holds:
            self._update()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Within it the step stays as it is; after it all batches within count as one, as micro-batches do."""
        self.holds += 1
        try:
            yield
        except BaseException:
            self.seen = None
            raise
        finally:
            self.holds -= 1
        if not self.holds:
            self._update()

    def _update(self) -> None:
        if self.seen is None:
            return
        slope, curvature = parallel.total(self.seen) if self.shared else self.seen
        self.seen = None
        if not self.begun and not bool(slope > 0):
            return  # nothing moved: the next batch is the first
        self.mean = self.mean.to(slope.device)
        best = (slope / torch.maximum(curvature, slope)).clamp(SMALLEST, 1.0).to(self.mean.dtype)
        if self.begun:
            best = torch.where(slope > 0, self.mean + NEWEST * (best - self.mean), self.mean)  # else nothing moved
        self.mean.copy_(best)
        self.begun = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """A checkpoint made before steps were tracked has none, and begins as a new model does."""
        name = f"{prefix}mean"
        given = name in state_dict
        state_dict.setdefault(name, torch.full((), torch.nan, dtype=torch.float32))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self.begun = given and bool(state_dict[name].isfinite())
