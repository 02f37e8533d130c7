"""`Report`: where a model's inference stands on one batch: energy and residual per node, and the regime."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import orders
from .arithmetic import sum_samples
from .batch import Batch
from .node import Node
from .rules import Guarded, Rules

LONG_RUN = 60
"""Further inference steps, with the guard, that the reachable fall of F is measured by."""
SETTLED = 0.9
"""The fraction of the reachable fall of F from which on a report calls inference settled."""
PER_NODE = ("energy", "residual", "precision")
"""What `Report.scalars` gives for every node."""


class NodeStep(NamedTuple):
    """One node at one step of `FreeEnergy.record`."""

    energy: Tensor
    """``[S]``, in nats."""
    residual: Tensor
    """``[S]``, the norm of the natural gradient V dF/du over pi: 0 where settled."""


def look(batch: Batch) -> dict[str, NodeStep]:
    """Energy and residual of every node that has a state, by its name. Moves nothing."""
    batch.probe()
    batch.energies.pop()
    return {
        name: NodeStep(node.energy, node.residual)
        for name, node in batch.named_nodes().items()
        if node.state is not None and node.energy is not None and node.residual is not None
    }


@dataclass(frozen=True)
class NodeReport:
    """One value node on one batch: means over the samples."""

    name: str
    family: str
    precision: float
    energy: float
    """Nats per item."""
    residual: float
    """Norm of the natural gradient V dF/du after inference, in units of that at the prediction: 0 where settled."""


@dataclass(frozen=True)
class Report:
    """The regime of inference on one batch, from `FreeEnergy.report`. Print it for a table.

    Settled is not the same as far from backpropagation: with a high precision the equilibrium lies close to the
    forward pass. Hence both `settled` and `cosine`.
    """

    nodes: tuple[NodeReport, ...]
    free_energies: tuple[float, ...]
    """F per item at the prediction and after each move of the states, in nats: the last is where learning happens."""
    long_run: float
    """F per item after a long run: the reachable minimum."""
    residual: float
    """Norm of the natural gradient of all states where learning happens, relative to that at the prediction."""
    cosine: float
    """Cosine of the whole weight gradient to backpropagation's."""
    worst_cosine: float
    """The smallest such cosine of one parameter, of those whose gradient is more than rounding."""
    total_to_local: float = 1.0
    """Norm of the weight gradient over that of the gradient by each node's own energy alone, at the same states.

    State orders, and ``local=True``, learn by the latter, and have 1 here. In error order the weight gradient is the
    total derivative with e held (Goemaere et al. 2025). The two agree where inference is settled.
    """

    @property
    def settled(self) -> float:
        """The fraction of the reachable fall of F that inference achieved before learning; 0 where nothing moved."""
        if not self.nodes:
            return 0.0
        reachable = self.free_energies[0] - self.long_run
        return (self.free_energies[0] - self.free_energies[-1]) / reachable if reachable > 0 else 1.0

    @property
    def explained(self) -> float:
        """The fraction of F that inference explained away before learning."""
        first = self.free_energies[0]
        return (first - self.free_energies[-1]) / abs(first) if first else 0.0

    @property
    def regime(self) -> str:
        """One line: settled fraction, the part of F explained away, residual, cosines, total to local gradient."""
        if len(self.free_energies) == 1:
            return "backpropagation: the states are at their predictions"
        if not self.nodes:
            return "backpropagation: the model's forward visits no free value node; put pc.Gaussian() after a layer"
        advice = "" if self.settled >= SETTLED else "; not settled: lower the displacement, or give more steps"
        return (
            f"settled {self.settled:.1%} of the reachable fall in {len(self.free_energies) - 1} moves (it explains "
            f"{self.explained:.2%} of F), residual {self.residual:.2g}, cosine to backpropagation {self.cosine:.4f} "
            f"(worst parameter {self.worst_cosine:.3f}), total to local {self.total_to_local:.4f}{advice}"
        )

    def scalars(self) -> dict[str, float]:
        """Every number by its name, for what logs them: ``wandb.log``, Lightning's ``log_dict``, TensorBoard.

        ``free_energy``, of where learning happens, ``settled``, ``explained``, ``residual``, ``cosine`` and
        ``worst_cosine``; then ``energy/NODE``, ``residual/NODE`` and ``precision/NODE`` for every node.
        """
        whole = {name: getattr(self, name) for name in ("settled", "explained", "residual", "cosine", "worst_cosine")}
        each = {f"{name}/{node.name}": getattr(node, name) for name in PER_NODE for node in self.nodes}
        return {"free_energy": self.free_energies[-1]} | whole | each

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"{table(self)}<p>{self._falls}<br>{self.regime}</p>"

    @property
    def _falls(self) -> str:
        free_energies = ", ".join(f"{f:.6g}" for f in self.free_energies)
        return f"F per item: {free_energies}; long run {self.long_run:.6g}"

    def __str__(self) -> str:
        width = max(len(name) for name in ("node", *(node.name for node in self.nodes)))
        lines = [f"{'node':<{width}}  {'family':<14}  {'precision':>9}  {'energy':>9}  {'residual':>8}"]
        for node in self.nodes:
            numbers = f"{node.precision:>9.3g}  {node.energy:>9.3g}  {node.residual:>8.2g}"
            lines.append(f"{node.name:<{width}}  {node.family:<14}  {numbers}")
        return "\n".join([*lines, self._falls, self.regime])


def table(report: Report) -> str:
    """The nodes as an HTML table, with bars of the energies, the largest of them full, and of the residuals, 1 full."""
    most = max((node.energy for node in report.nodes if math.isfinite(node.energy)), default=0.0)
    left = 'style="text-align:left"'
    rows = "".join(
        f"<tr><td>{number}</td><td {left}>{escape(node.name).replace('.', '.<wbr>')}</td>"
        f"<td {left}>{escape(node.family)}</td>"
        f"<td>{node.precision:.3g}</td>{_bar(node.energy, most)}{_bar(node.residual, 1.0)}</tr>"
        for number, node in enumerate(report.nodes, 1)
    )
    head = f"<th></th><th {left}>node</th><th {left}>family</th><th>precision</th><th>energy</th><th>residual</th>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _bar(value: float, full: float) -> str:
    """A cell with a number before a bar, which is as wide as the cell where the value is ``full``."""
    part = min(max(value / full, 0.0), 1.0) if full > 0 and math.isfinite(value) else 0.0
    bar = f"linear-gradient(90deg,rgba(74,144,217,.45) {part:.1%},transparent 0) center/100% 75% no-repeat"
    return f'<td style="min-width:4.5em;background:{bar}">{value:.3g}</td>'


def report(
    make: Callable[..., Batch],
    settle: Callable[[Batch], Any],
    loss: Callable[[], Tensor],
    rules: Rules,
    moves: int,
    parameters: Sequence[Tensor],
) -> Report:
    """Measure a `Report` on one batch; see `FreeEnergy.report`.

    make: a new `Batch`. settle: moves its states as before learning, ``moves`` times. loss: the loss that learns.
    """
    with torch.random.fork_rng():
        batch = make()
        random = batch.random  # every run below sees the same noise
        measured: list[Tensor] = []
        if rules.inference_dtype is not None:  # F of its own passes tells of their rounding
            batch.watch = lambda batch: measured.append(batch.look())
        settle(batch)
        last = batch.probe()
        free_energies = measured or batch.energies[-moves - 1 :]
        local = _gradients(batch.learn(local=True).sum(), parameters) if batch.form == "error" else None
        random.restore()
        begun = make(form="error")
        free, at_prediction, long_run = _long_run(begun, rules, batch)
        random.restore()
        learning = _gradients(loss(), parameters)
        random.restore()
        backpropagation = _gradients(make(form="error").at_prediction(learns=True).sum(), parameters)
        random.restore()

    items = float(batch.items)
    nodes = tuple(
        NodeReport(
            name,
            type(node.family).__name__,
            float((node.precision if node.in_units is None else node.in_units).mean()),
            float(node.energy.sum() if node.energy is not None else 0.0) / items,
            _ratio([node.residual], [at_prediction[name]]),
        )
        for name, node in free.items()
    )
    rounding = 1e-5 * max((float(b.norm()) for b in backpropagation), default=0.0)
    cosines = [_cosine([g], [b]) for g, b in zip(learning, backpropagation) if b.norm() > rounding]
    return Report(
        nodes,
        tuple(float(e.sum()) / items for e in free_energies),
        float(torch.minimum(long_run, last).sum()) / items,
        _ratio([node.residual for node in free.values()], list(at_prediction.values())),
        _cosine(learning, backpropagation),
        min(cosines, default=1.0),
        1.0 if local is None else _ratio(learning, [g / items for g in local]),
    )


def _long_run(begun: Batch, rules: Rules, batch: Batch) -> tuple[dict[str, Node], dict[str, Tensor], Tensor]:
    """The guarded error order in float32, settled: the nodes of ``batch`` that it moves, and F ``[S]`` at its end.

    Between them, by name, the norm ``[S]`` of their natural gradient at the prediction.
    """
    settler = Rules(rules.precision, Guarded(rules.step.first), remembers=True)
    steps = orders.error(begun, settler, 1)
    states = {name: node.state for name, node in begun.named_nodes().items()}
    free, at_prediction = {}, {}
    for name, node in batch.named_nodes().items():
        state = states[name]
        if node.residual is not None and state is not None:
            free[name] = node
            at_prediction[name] = sum_samples(state**2, begun.samples).sqrt() / rules.step.first
    orders.descend(begun, settler, steps, LONG_RUN)
    assert isinstance(steps, Guarded)
    return free, at_prediction, steps.accepted


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of the loss in the parameters; none where all are frozen."""
    return torch.autograd.grad(loss, parameters, materialize_grads=True) if parameters else ()


def _ratio(norms: Sequence[Tensor | None], to: Sequence[Tensor]) -> float:
    """The ratio of two norms, each given in parts."""
    top, bottom = (sum(float(n.square().sum()) for n in part if n is not None) for part in (norms, to))
    return (top / bottom) ** 0.5 if bottom else 0.0


def _cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Cosine of the angle between two vectors, each given in parts, in float64."""
    dot, aa, bb = (
        sum(float((x.double() * y.double()).sum()) for x, y in pairs) for pairs in (zip(a, b), zip(a, a), zip(b, b))
    )
    return dot / (aa * bb) ** 0.5 if aa and bb else 0.0
