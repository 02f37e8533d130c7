"""`Report`: where a model's inference stands on one batch: energy and residual per node, and the regime."""

from __future__ import annotations

import contextlib
import math
import re
import textwrap
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
LEFT = math.sqrt(1 - SETTLED)
"""The residual from which on it says that a node has not: what F may still fall goes with the residual's square."""
CLOSE = 0.99
"""The cosine from which on it calls the weight gradient close to backpropagation's."""
ROUNDING = 1e-6
"""Of F: a fall or a rise below this part of it tells nothing, as float32 sums are no finer."""
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
    return _shown(batch)


def _shown(batch: Batch) -> dict[str, NodeStep]:
    """What the last probe left in the nodes."""
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
    """The regime of inference on one batch, from `FreeEnergy.report`. Print it: first words, then a table.

    In a notebook it also shows how the energies of the nodes grow, as a heat map, if matplotlib is installed.

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
    """Cosine of the whole weight gradient to backpropagation's. 0 where no parameter learns."""
    worst_cosine: float
    """The smallest such cosine of one parameter, of those whose gradient is more than rounding."""
    total_to_local: float = 1.0
    """Norm of the weight gradient over that of the gradient by each node's own energy alone, at the same states.

    State orders, and ``local=True``, learn by the latter, and have 1 here. In error order the weight gradient is the
    total derivative with e held (Goemaere et al. 2025). The two agree where inference is settled.
    """
    energies: tuple[tuple[float, ...], ...] = ()
    """The energy of each node, in nats per item, wherever `free_energies` has F; none if an order shows no states."""

    @property
    def settled(self) -> float:
        """The fraction of the reachable fall of F that inference achieved before learning; 0 where nothing moved.

        NaN where F is not finite.
        """
        if not self.nodes:
            return 0.0
        reachable = self.free_energies[0] - self.long_run
        fall = self.free_energies[0] - self.free_energies[-1]
        if not (math.isfinite(reachable) and math.isfinite(fall)):
            return math.nan
        return fall / reachable if reachable > 0 else 1.0

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
        return (
            f"settled {self.settled:.1%} of the reachable fall in {len(self.free_energies) - 1} moves (it explains "
            f"{self.explained:.2%} of F), residual {self.residual:.2g}, cosine to backpropagation {self.cosine:.4f} "
            f"(worst parameter {self.worst_cosine:.3f}), total to local {self.total_to_local:.4f}"
        )

    @property
    def summary(self) -> str:
        """What the numbers say, in a few plain sentences, with what to do. Names of nodes are in backticks."""
        first, last = self.free_energies[0], self.free_energies[-1]
        if len(self.free_energies) == 1:
            return "Backpropagation: the states stay at their predictions. Give more inference steps to move them."
        if not self.nodes:
            return "Backpropagation: the forward visits no free value node. Put pc.Gaussian() after a hidden layer."
        if not math.isfinite(first):
            return "F is not finite before anything moves: the model's output is not. Look at its weights and inputs."
        if not (math.isfinite(last) and math.isfinite(self.long_run)):
            return "F is not finite: inference diverged. Give a smaller step, or a larger precision."
        settled, raised = self.settled >= SETTLED, last - first > ROUNDING * abs(first)
        if raised:
            settled, said = False, ["Not settled: inference raised F."]
        elif first - self.long_run <= ROUNDING * abs(first):
            settled, said = True, ["All that F could fall by is within its rounding."]
        else:
            said = ["Settled." if settled else f"Not settled: {self.settled:.0%} of the reachable fall of F was made."]
        if self.cosine == 0 or math.isnan(self.cosine):
            said.append("There is no finite weight gradient to compare with backpropagation's.")
        else:
            close = "Close" if self.cosine >= CLOSE else "Not close"
            said.append(f"{close} to backpropagation: the cosine of the weight gradients is {self.cosine:.4f}.")
        numbered = list(enumerate(self.nodes, 1))
        late = [(number, node) for number, node in numbered if not node.residual <= LEFT]
        unreached = [] if settled else [(number, node) for number, node in numbered if node.energy == 0]
        if late:
            have, most = ("has" if len(late) == 1 else "have"), max(node.residual for _, node in late)
            said.append(f"{_named(late, 'Node')} {have} not settled: the residual is {most:.2g}.")
        if unreached:
            said.append(f"The error has not reached {_named(unreached)}.")
        if raised:
            said.append("Give a smaller step, or none: the default is guarded.")
        elif unreached:
            said.append("Give more steps, or use order='error', which reaches every node in one.")
        elif not settled:
            said.append("Give more steps, a lower displacement, or a larger precision.")
        elif late:
            said.append("Give more steps.")
        return " ".join(said)

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
        return f"<p>{words(self)}</p>{table(self)}{self._heat_map}<p>{self._falls}<br>{escape(self.regime)}</p>"

    @property
    def _heat_map(self) -> str:
        if not self.nodes or not self.energies:
            return ""
        try:
            from .plots import heat_map
        except ModuleNotFoundError:
            return "<p>For a heat map of the energies: pip install matplotlib</p>"
        return f'<div style="max-width:30em">{heat_map(self.energies)}</div>'

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
        return "\n".join(
            [*textwrap.wrap(self.summary, 100, break_on_hyphens=False), "", *lines, self._falls, self.regime]
        )


def _named(pairs: Sequence[tuple[int, NodeReport]], node: str = "node") -> str:
    """As in: nodes 3 (`a`), 4 (`b`) and 2 more."""
    names = ", ".join(f"{number} (`{node.name}`)" for number, node in pairs[:3])
    more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
    return f"{node}{'s' if len(pairs) > 1 else ''} {names}{more}"


def words(report: Report) -> str:
    """The report's summary as HTML."""
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(report.summary, quote=False))


def table(report: Report) -> str:
    """The nodes as an HTML table, with bars of the energies, the largest of them full, and of the residuals, 1 full."""
    most = max((node.energy for node in report.nodes if math.isfinite(node.energy)), default=0.0)
    left = 'style="text-align:left"'
    rows = "".join(
        f"<tr><td>{number}</td><td {left}>{_breaking(node.name)}</td>"
        f"<td {left}>{escape(node.family)}</td>"
        f"<td>{node.precision:.3g}</td>{_bar(node.energy, most)}{_bar(node.residual, 1.0)}</tr>"
        for number, node in enumerate(report.nodes, 1)
    )
    head = f"<th></th><th {left}>node</th><th {left}>family</th><th>precision</th><th>energy</th><th>residual</th>"
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div style="overflow-x:auto">{whole}</div>'


def _breaking(name: str) -> str:
    """A name that may go on in another line after a dot or an underscore."""
    return re.sub(r"([._])", r"\1<wbr>", escape(name))


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
    tick: Callable[[], Any],
) -> Report:
    """Measure a `Report` on one batch; see `FreeEnergy.report`.

    make: a new `Batch`. settle: moves its states as before learning, ``moves`` times. loss: the loss that learns.
    """
    with torch.random.fork_rng():
        batch = make()
        random = batch.random  # every run below sees the same noise
        seen: list[dict[str, NodeStep]] = []
        measured: list[Tensor] = []

        def watch(batch: Batch) -> None:
            with batch.calls.eager() if batch.calls.compiled else contextlib.nullcontext():  # its graphs stay as many
                seen.append(look(batch))
            if rules.inference_dtype is not None:  # F of its own passes tells of their rounding
                measured.append(batch.look())

        batch.watch = watch
        settle(batch)
        last = batch.probe()
        if seen:
            seen[-1] = _shown(batch)  # the end of inference may have moved the states once more
        free_energies = measured or batch.energies[-moves - 1 :]
        local = _gradients(batch.learn(local=True).sum(), parameters) if batch.form == "error" else None
        random.restore()
        begun = make(form="error")
        free, at_prediction, long_run = _long_run(begun, rules, batch, tick)
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
        tuple(tuple(float(step[name].energy.sum()) / items for name in free) for step in seen),
    )


def _long_run(
    begun: Batch, rules: Rules, batch: Batch, tick: Callable[[], Any]
) -> tuple[dict[str, Node], dict[str, Tensor], Tensor]:
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
    begun.watch = lambda batch: tick()
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
    """Cosine of the angle between two vectors, each given in parts, in float64; 0 where one of them is."""
    dot, aa, bb = (
        sum(float((x.double() * y.double()).sum()) for x, y in pairs) for pairs in (zip(a, b), zip(a, a), zip(b, b))
    )
    return dot / (aa * bb) ** 0.5 if aa and bb else 0.0
