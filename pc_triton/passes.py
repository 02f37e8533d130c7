"""One pass of the model: what its layers meet, and what it leaves behind."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import reference
from .arithmetic import sum_samples, wide
from .context import First, Fused, running
from .dispatch import as_state, backend, tracing
from .distributions import Distribution
from .errors import see
from .families import Categorical, Gaussian
from .float8 import FewDigits
from .functions import FunctionNodes
from .node import Node, Response
from .operations import Emit, respond_to
from .output import Output
from .plumbing import Calls, Slot, hold_buffers, hold_statistics
from .recompute import Again, in_checkpoint
from .returned import LAYOUT, made_of

WHERE_FROM = "their number is the length of x's first tensor that is as long as y, or without one of x's first tensor"


class Nodes:
    """The value nodes of a batch of S samples, as its passes share them."""

    def __init__(
        self, samples: int, calls: Calls, names: Mapping[Distribution, str], form: str, output: Output
    ) -> None:
        self.samples, self.calls, self.names, self.form, self.output = samples, calls, names, form, output
        self.nodes: list[Node] = []
        self.called = self.nodes  # those of them whose layers call a pass after the first
        self.in_graph: list[Node] = []  # the others: in a compiled model they are mu + e in its graph
        # Stands for the states in autograd's graph: `anchor` in passes in which they move, `anchor_held` in the others.
        self.anchor = torch.zeros((), dtype=torch.float32, requires_grad=True)
        self.anchor_held = self.anchor.detach()
        self.moved: list[tuple[Slot, Tensor]] = []  # buffers that the first pass changed, as they were before it
        self.places: dict[Node, Tensor] | None = None  # where the pass under way puts states u
        self.fuses_first = False  # whether the first pass too may do without a node's prediction
        self.begins: Callable[[Node], None] | None = None  # gives a node its state in the first pass already

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it a pass changes no buffers of the model, and finds them as the first pass did."""
        with hold_statistics(self.calls.norms), hold_buffers(self.moved):
            yield

    def name_of(self, family: Distribution) -> str:
        """The name of a value node in the model: its module's, without the ``.node`` of a layer."""
        return self.names.get(family, "").removesuffix(".node") or "node"

    def named_nodes(self) -> dict[str, Node]:
        """The nodes but the output, by name: a module visited again has ``#2`` added."""
        named: dict[str, Node] = {}
        visits: Counter[str] = Counter()
        for node in self.nodes:
            if node is not self.output.node:
                visits[node.name] += 1
                named[node.name + (f"#{visits[node.name]}" if visits[node.name] > 1 else "")] = node
        return named


class ModelPass:
    """One pass of the model under the states of a batch: what its layers meet (`context.Pass`)."""

    def __init__(
        self, batch: Nodes, learns: bool, moves: bool, shows: bool, local: bool, few_digits: FewDigits | None
    ) -> None:
        self.batch, self.form = batch, batch.form
        self.first = not batch.nodes  # it makes them
        self.learns, self.shows, self.local, self.few_digits = learns, shows, local, few_digits
        self.response: Response | None = None  # `Batch.move` gives it, before the backward pass
        self.differentiates = moves
        self.visits = 0
        self.again = False  # whether a part of the pass is being computed again, for its backward
        self.checkpointed = False  # whether the model is where `checkpoint_contexts` are
        self.energies: list[Tensor] = []  # [S], of the nodes
        self.added: list[Tensor] = []  # [S], that the model added
        self.anchor = batch.anchor if moves else batch.anchor_held
        self.leaves = [self.anchor] if moves else []  # what the states' backward pass begins from
        self.seen: list[tuple[Node, Tensor, int]] = []  # emissions, and how often each had been changed
        self.head: tuple[Tensor, Tensor] | None = None
        self.output_mu = torch.empty(0)

    # What layers call.

    def emit(self, family: Distribution, mu: Tensor, frozen: dict[str, Any]) -> Tensor:
        batch = self.batch
        if self.first and not self.again:
            node = self._new_node(family, mu, {**family.frozen(mu), **frozen})
        else:
            node = self._next_node(family)
            family.frozen(mu)  # drawn again and not used, so that what is drawn after it is the same
        if node is batch.output.node:
            self.visits += 1
            if not self.again:
                self.output_mu = mu
            return mu
        if not node.is_free:
            return self._record(node, self._at_prediction(node, mu))
        if node.only_move is not None and self._needs_no_state(mu):
            return self._record(node, *Emit.apply(mu, self.anchor, node, self, self.form, None))
        assert node.state is not None
        node.state = as_state(node.state)  # an order or a rule of the user's may have permuted it
        if self.shows:
            node.u = wide(mu.detach()) + node.state if self.form == "error" else node.state.clone()
        if batch.places is not None:
            emission = self._placed(node, mu, batch.places.get(node))
            return self._record(node, emission, wide(mu.detach()).new_zeros(batch.samples))
        if self.local:  # u as it is, whatever the order
            u = as_state(wide(mu.detach()) + node.state) if self.form == "error" else node.state
            return self._record(node, *Emit.apply(mu, self.anchor, node, self, "state", u))
        if self._is_mu_plus_e(node, mu):
            error = self.error_of(node, mu.dtype)
            u = mu + error
            if not tracing.get():
                error.data = error.new_empty(0)  # the graph keeps the leaf, and need not keep an old state with it
            return self._record(node, u)
        return self._record(node, *Emit.apply(mu, self.anchor, node, self, self.form, node.state))

    def emit_fused(self, family: Distribution, fused: Fused, first: First | None = None) -> Tensor | None:
        if self.form != "error" or self.shows or self.local:
            return None  # a node that shows itself needs what the kernel never writes
        if self.first:
            return None if first is None or not self.batch.fuses_first else self._emit_first(family, first)
        node = self._next_node(family)
        if node is self.batch.output.node or node.state is None:
            return None
        node.state = as_state(node.state)
        return self._record(node, *fused(node, self, self.anchor))

    def _emit_first(self, family: Distribution, first: First) -> Tensor:
        emission, frozen, fused = first()
        if not emission.requires_grad:
            emission = emission + emission.new_zeros((), requires_grad=True)
        if self.again:
            return self._record(self._next_node(family), emission)
        node = self._new_node(family, emission, frozen)
        node.mu, node.fused = None, fused
        return self._record(node, emission)

    def add_energy(self, energy: Tensor) -> None:
        samples = self.batch.samples
        if energy.dim() == 0 or energy.shape[0] % samples:
            raise ValueError(
                f"add_energy got shape {tuple(energy.shape)} in a batch of {samples}: an energy needs its samples "
                "along the first axis, a whole number of rows each"
            )
        energy = sum_samples(wide(energy), samples)
        if not self.again:
            self.added.append(energy)

    def labels_for(self, logits: Tensor) -> tuple[Tensor, int, bool] | None:
        output = self.batch.output
        if output.target is not None and output.target.is_floating_point() and output.given is None:
            self.batch.calls.say(
                "y holds values, and pc.Head gives logits: they are compared by squared error. Give FreeEnergy "
                "output=pc.Categorical() for probabilities, or output=pc.Gaussian() for what is done now"
                + see("values-for-a-head")
            )
        if output.target is None or output.target.is_floating_point() or self.shows or tracing.get():
            return None
        family = output.family
        if not isinstance(family, Categorical) or type(family).clamped is not Categorical.clamped:
            return None
        if self.first:
            output.check(family, logits)
        return output.labels(family), family.ignore_index, self.learns

    def clamp(self, logits: Tensor, energy: Tensor) -> None:
        if not self.again:
            self.head = logits, energy

    def within_checkpoint(self) -> tuple[Any, Any]:
        if self.batch.calls.compiled or tracing.get():
            raise RuntimeError("torch.utils.checkpoint in a compiled model: inference takes the one or the other")
        return self._in_checkpoint(), Again(self._computes_again, self.visits)

    # How it answers.

    def _record(self, node: Node, emission: Tensor, energy: Tensor | None = None) -> Tensor:
        self.visits += 1
        if self.again:
            return emission
        self.seen.append((node, emission, emission._version))
        if energy is not None:
            self.energies.append(energy)
        if self.first:
            node.emission = emission
        if self.shows:
            node.emission = emission.detach()
            node.energy = self.energies[-1].detach() if node.state is not None else None
        return emission

    def _at_prediction(self, node: Node, mu: Tensor) -> Tensor:
        emission = node.family.emission(mu, **node.frozen)
        if self.first and not emission.requires_grad:  # here autograd begins
            emission = emission + emission.new_zeros((), requires_grad=True)
        return emission

    def _placed(self, node: Node, mu: Tensor, u: Tensor | None) -> Tensor:
        """Put the node's state at u, or at its prediction; what it then emits."""
        assert node.state is not None
        prediction = wide(mu.detach())
        u = prediction if u is None else u
        state = u.clone()
        if self.form == "error":
            state = (u - prediction).masked_fill(prediction == -torch.inf, 0.0)  # a masked logit has no state
        node.state = as_state(state.to(node.state.dtype))
        node.displaced = True
        return node.family.emission(u, **node.frozen).to(mu.dtype)

    def error_of(self, node: Node, dtype: torch.dtype) -> Tensor:
        """The leaf e of a Gaussian node that emits mu + e in plain autograd; counts the node's energy."""
        assert isinstance(node.family, Gaussian)
        assert node.state is not None
        leaf = node.state.detach().to(dtype).requires_grad_(self.differentiates)
        if self.differentiates:
            respond_to(leaf, node, self)
        if self.again:
            return leaf
        if self.differentiates:
            self.leaves.append(leaf)
        self.energies.append(node.family.error_energy(node.state, node.precision, node.unit))
        if self.shows:
            node.energy = self.energies[-1]
        return leaf

    def _needs_no_state(self, mu: Tensor) -> bool:
        """Whether a kernel may compute e where it reads the gradient that moved it: in the learning pass alone."""
        shows = self.shows or self.local or self.batch.places is not None
        return self.learns and not shows and backend(mu) is not reference

    def _is_mu_plus_e(self, node: Node, mu: Tensor) -> bool:
        """Whether the node is left to plain autograd: elsewhere one kernel has the sum, its energy and the move."""
        return self.form == "error" and type(node.family) is Gaussian and backend(mu) is reference

    def _next_node(self, family: Distribution) -> Node:
        called = self.batch.called
        if self.visits == len(called) or called[self.visits].family is not family:
            raise RuntimeError(
                f"node {self.batch.name_of(family)!r}: the model visits its nodes in another order than in its "
                "first pass; inference needs the same path at every step" + see("another-path")
            )
        return called[self.visits]

    def _new_node(self, family: Distribution, mu: Tensor, frozen: dict[str, Any]) -> Node:
        batch = self.batch
        name = batch.name_of(family)
        if mu.dim() == 0 or mu.shape[0] % batch.samples:
            raise ValueError(
                f"node {name!r} sees shape {tuple(mu.shape)} in a batch of {batch.samples}: a value node needs its "
                f"samples along the first axis, a whole number of rows each; {WHERE_FROM}"
                + see("samples-along-the-first-axis")
            )
        if in_checkpoint() and not self.checkpointed:
            raise RuntimeError(
                f"node {name!r} lies in a torch.utils.checkpoint, whose backward would not know its state: give "
                "checkpoint() context_fn=pc_triton.checkpoint_contexts" + see("checkpointing")
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"node {name!r} lies within torch.no_grad(), where no state can move: freeze parameters by "
                "requires_grad_(False) instead, and give checkpoint() use_reentrant=False"
                + see("a-node-within-no_grad")
            )
        node = Node(family, name, len(batch.nodes), frozen, mu=mu, dtype=mu.dtype)
        if batch.begins is not None:
            batch.begins(node)
        batch.nodes.append(node)
        return node

    # The pass itself.

    def check(self, out: Any) -> None:
        """Raise an error where the model is none that inference can take; find its output node in the first pass."""
        batch = self.batch
        if not isinstance(out, Tensor):
            raise TypeError(
                f"the model returned {type(out).__name__}: it must return one tensor, or a mapping with its "
                "'logits'; or say which tensor y clamps, as in FreeEnergy(model, logits=lambda out: out[0])"
                + see("what-the-model-returns")
            )
        if not batch.nodes or self.visits != len(batch.called):
            raise RuntimeError(
                f"the model's forward visited {self.visits} value nodes, and {len(batch.called)} in its first pass: "
                "inference needs at least one, and the same at every step" + see("another-path")
            )
        if out.dim() == 0 or out.shape[0] != batch.samples:
            raise ValueError(
                f"the model's output has shape {tuple(out.shape)} for a batch of {batch.samples} samples; {WHERE_FROM}"
            )
        if self.first:
            self._find_output(out)
        for node, emission, version in self.seen:
            if node is not batch.output.node and emission._version != version:
                raise RuntimeError(
                    f"an operation after node {node.name!r} changes its output in place: use inplace=False there"
                    + see("in-place-after-a-node")
                )

    def _find_output(self, out: Tensor) -> None:
        """The last node whose emission the model returns is its output: it is clamped, and has no state."""
        output = self.batch.output
        returned = [
            (node, emission) for node, emission, _ in self.seen if node.fused is None and _is_emission(out, emission)
        ]
        if returned:
            node, emission = returned[-1]
        else:
            found = self._passed_on(out)
            if found is None:
                return
            node, emission, output.direct = found, out, True
        assert node.mu is not None
        if node.state is not None:  # it has no energy of its own
            del self.energies[[n for n, *_ in self.seen].index(node)]
        output.node, self.output_mu, node.state, node.energy = node, node.mu, None, None
        if emission.shape != out.shape:
            output.shape = out.shape  # the model flattens or squeezes what its last node emits

    def _passed_on(self, out: Tensor) -> Node | None:
        """The one node of which the model returns values as they are, some of them or as log_softmax of logits."""
        output = self.batch.output
        found = made_of(out, [(node, emission) for node, emission, _ in self.seen if node.fused is None])
        if found is None:
            return None
        node, names, alone = found
        labels = output.target is not None and not output.target.is_floating_point()
        same = names[1:] if labels and names and names[0] == "LogSoftmax" else names  # log_softmax of it is the same
        if alone and set(same) <= LAYOUT and type(node.family).emission is Distribution.emission:
            return node
        last = next(name for name in names if name not in LAYOUT) if set(names) - LAYOUT else names[0]
        self.batch.calls.say(
            f"the model returns what its last node, {node.name!r}, emits after {last.lower()} and nothing that learns: "
            "the last layer's output is then a hidden state of its own, which explains a part of the error away. To "
            "clamp the output itself use a plain layer there, such as nn.Linear for pc.Linear"
            + see("the-output-is-a-hidden-state")
        )
        return None

    def output_energy(self, out: Tensor) -> Tensor:
        """The energy ``[S]`` of the output, at what the model returned."""
        output = self.batch.output
        if self.head is None:
            return output.energy(out if output.node is None or output.direct else self.output_mu, self.first)
        stands_for, energy = self.head
        if out is not stands_for:
            raise RuntimeError(
                "a pc.Head gives no logits in inference: the model must return what it returns, untouched; "
                "use nn.Linear for a layer that something follows" + see("after-a-head")
            )
        return output.energy_of_rows(energy)

    def digits(self) -> AbstractContextManager[Any]:
        """Within it products have the digits of this pass."""
        return contextlib.nullcontext() if self.few_digits is None else self.few_digits

    def functions(self) -> AbstractContextManager[Any]:
        """Within it functions in the place of a node, such as ``F.softmax``, have the node that `convert` gave them."""
        return FunctionNodes(self.batch.samples) if self.batch.calls.functions else contextlib.nullcontext()

    def close(self) -> None:
        """Let go of all that holds the graph: a graph holds its pass, and Python cannot collect such a cycle."""
        self.energies, self.added, self.leaves, self.seen, self.head = [], [], [], [], None
        self.output_mu = self.output_mu.detach().new_empty(0)

    @contextlib.contextmanager
    def _in_checkpoint(self) -> Iterator[None]:
        before, self.checkpointed = self.checkpointed, True
        try:
            yield
        finally:
            self.checkpointed = before

    @contextlib.contextmanager
    def _computes_again(self, visits: int) -> Iterator[None]:
        """Within it a part of the pass is computed again, for its backward, from that visit on."""
        before, (self.visits, self.again) = (self.visits, self.again), (visits, True)
        try:
            with running(self), self.digits(), self.functions(), self.batch.held(), self._in_checkpoint():
                yield
        finally:
            self.visits, self.again = before


def _is_emission(out: Tensor, emission: Tensor) -> bool:
    """Whether the model returns a node's emission, in its own shape or in another with the elements in their order."""
    same = out.numel() == emission.numel() and out.data_ptr() == emission.data_ptr()
    return out is emission or (same and out.is_contiguous() and emission.is_contiguous())
