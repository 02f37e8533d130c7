"""One batch: F as a function of the weights and of the states of its value nodes.

A state is a leaf tensor. `Batch.free_energy` is one pass of the user's own model under the states, and returns F with
its graph; `Batch.move` is the backward pass in which the states answer their gradients. What the T moves are is said in
``orders.py``; what a move is, in ``node.py``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .checks import check_batch, check_devices, check_finite, ordinary
from .context import Fused, running
from .dispatch import backend, tracing
from .distributions import Distribution
from .families import Categorical, Gaussian, output_family
from .node import Gradient, Node, Response
from .operations import Emit, respond_to
from .plumbing import Calls, RandomState, hold_statistics, hold_weights, ones, sharded_modules
from .recompute import Again, in_checkpoint
from .reference import sum_samples, wide
from .rules import Precision


class ModelPass:
    """One pass of the model under the states of a batch: what its layers meet (`context.Pass`)."""

    def __init__(self, batch: Batch, first: bool, learns: bool, moves: bool, shows: bool, local: bool) -> None:
        self.batch, self.first, self.learns, self.shows, self.local = batch, first, learns, shows, local
        self.form = batch.form
        self.response: Response | None = None  # `Batch.move` gives it, before the backward pass
        self.differentiates = moves
        self.visits = 0
        self.again = False  # whether a part of the pass is being computed again, for its backward
        self.checkpointed = False  # whether the model is where `checkpoint_contexts` are
        self.energies: list[Tensor] = []  # [S], of the nodes
        self.added: list[Tensor] = []  # [S], that the model added
        self.leaves: list[Tensor] = []
        self.seen: list[tuple[Node, Tensor, int]] = []  # emissions, and how often each had been changed
        self.head: tuple[Tensor, Tensor] | None = None
        self.output_mu = torch.empty(0)
        self.output_shape = torch.Size()

    # What layers call.

    def emit(self, family: Distribution, mu: Tensor, frozen: dict[str, Any]) -> Tensor:
        batch = self.batch
        if self.first and not self.again:
            node = self._new_node(family, mu, {**family.frozen(mu), **frozen})
        else:
            node = self._next_node(family)
            family.frozen(mu)  # drawn again and not used, so that what is drawn after it is the same
        if node is batch.output:
            self.visits += 1
            if not self.again:
                self.output_mu = mu
            return mu
        if node.state is None:
            return self._record(node, self._at_prediction(node, mu))
        if batch.places is not None:
            emission = self._placed(node, mu, batch.places.get(node))
            return self._record(node, emission, wide(mu.detach()).new_zeros(batch.samples))
        if self.local:  # u as it is, whatever the order
            u = _u_of(node.state, mu, self.form)
            return self._record(node, *Emit.apply(mu, u, node, self, "state"))
        if self._is_mu_plus_e(node, mu):
            return self._record(node, mu + self.error_of(node, mu.dtype))
        return self._record(node, *Emit.apply(mu, self._leaf(node.state), node, self, self.form))

    def emit_fused(self, family: Distribution, fused: Fused) -> Tensor | None:
        if self.form != "error" or self.first or self.shows or self.local:
            return None  # a node that shows itself needs what the kernel never writes
        node = self._next_node(family)
        if node is self.batch.output or node.state is None:
            return None
        return self._record(node, *fused(node, self, self._leaf(node.state)))

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
        batch = self.batch
        if batch.target is None or batch.target.is_floating_point() or self.shows or tracing.get():
            return None
        family = output_family(batch.given_output, None, batch.target)
        if not isinstance(family, Categorical):
            return None
        batch.count_items(family, logits, self.first)
        return batch.labels(family), family.ignore_index, self.learns

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
        clamped = self.batch.clamp_input
        if node.family is self.batch.input_node and isinstance(clamped, Tensor):
            u = torch.where(clamped, prediction, u)
        node.state = (u - prediction if self.form == "error" else u.clone()).to(node.state.dtype)
        node.moved = True
        return node.family.emission(u, **node.frozen).to(mu.dtype)

    def _leaf(self, state: Tensor) -> Tensor:
        leaf = state.detach().requires_grad_(self.differentiates)
        if self.differentiates and not self.again:
            self.leaves.append(leaf)
        return leaf

    def error_of(self, node: Node, dtype: torch.dtype) -> Tensor:
        """The leaf e of a Gaussian node that emits mu + e in plain autograd; counts the node's energy."""
        assert isinstance(node.family, Gaussian)
        assert node.state is not None
        assert node.precision is not None
        leaf = self._leaf(node.state.detach().to(dtype))
        if self.again:
            return leaf
        if self.differentiates:
            respond_to(leaf, node, self)
        self.energies.append(node.family.error_energy(node.state, node.precision, node.unit))
        if self.shows:
            node.energy = self.energies[-1]
        return leaf

    def _is_mu_plus_e(self, node: Node, mu: Tensor) -> bool:
        """Whether the node is left to plain autograd: elsewhere one kernel has the sum, its energy and the move."""
        return self.form == "error" and type(node.family) is Gaussian and backend(mu) is reference

    def _next_node(self, family: Distribution) -> Node:
        visited = self.batch.visited
        if self.visits == len(visited) or visited[self.visits].family is not family:
            raise RuntimeError(
                f"node {self.batch.name_of(family)!r}: the model visits its nodes in another order than in its "
                "first pass; inference needs the same path at every step"
            )
        return visited[self.visits]

    def _new_node(self, family: Distribution, mu: Tensor, frozen: dict[str, Any]) -> Node:
        batch = self.batch
        name = batch.name_of(family)
        if mu.dim() == 0 or mu.shape[0] % batch.samples:
            raise ValueError(
                f"node {name!r} sees shape {tuple(mu.shape)} in a batch of {batch.samples}: a value node needs its "
                "samples along the first axis, a whole number of rows each"
            )
        if in_checkpoint() and not self.checkpointed:
            raise RuntimeError(
                f"node {name!r} lies in a torch.utils.checkpoint, whose backward would not know its state: give "
                "checkpoint() context_fn=pc_triton.checkpoint_contexts"
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"node {name!r} lies within torch.no_grad(), where no state can move: freeze parameters by "
                "requires_grad_(False) instead, and give checkpoint() use_reentrant=False"
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
                "'logits'; wrap it"
            )
        if not batch.nodes or self.visits != len(batch.visited):
            raise RuntimeError(
                f"the model's forward visited {self.visits} value nodes, and {len(batch.visited)} in its first pass: "
                "inference needs at least one, and the same at every step"
            )
        if out.dim() == 0 or out.shape[0] != batch.samples:
            raise ValueError(f"the model's output has shape {tuple(out.shape)} for a batch of {batch.samples} samples")
        if self.first:
            returned = [(node, e) for node, e, _ in self.seen if _is_emission(out, e)]
            if returned:
                batch.output, emission = returned[-1]
                if batch.output.state is not None:  # it has no energy of its own
                    del self.energies[[n for n, *_ in self.seen].index(batch.output)]
                self.output_shape = emission.shape
                assert batch.output.mu is not None
                self.output_mu, batch.output.state, batch.output.energy = batch.output.mu, None, None
        for node, emission, version in self.seen:
            if node is not batch.output and emission._version != version:
                raise RuntimeError(
                    f"an operation after node {node.name!r} changes its output in place: use inplace=False there"
                )

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
            with running(self), hold_statistics(self.batch.calls.norms), self._in_checkpoint():
                yield
        finally:
            self.visits, self.again = before


class Batch:
    """A model, the arguments it is called with, what its output is clamped to, and the states of its value nodes."""

    def __init__(
        self,
        model: nn.Module,
        calls: Calls,
        names: Mapping[Distribution, str],
        inputs: Any,
        target: Tensor | None,
        *,
        form: str,
        output: Distribution | None = None,
        output_weight: float = 1.0,
        mask: Tensor | None = None,
        input_node: Distribution | None = None,
        clamp_input: bool | Tensor = True,
        shows: bool = False,
    ) -> None:
        if target is not None and not isinstance(target, Tensor):
            raise TypeError(f"y is a {type(target).__name__}: give a tensor, or None for a free output")
        self.model, self.calls, self.names, self.form = model, calls, names, form
        self.args, self.kwargs, first = check_batch(inputs)
        self.target, self.mask = ordinary(target), mask
        self._mask_target()
        self.given_output, self.output_weight = output, output_weight
        self.input_node, self.clamp_input = input_node, clamp_input
        self.shows = shows  # whether its nodes will be asked what they emit
        self.samples = first.shape[0]
        parameters = dict(model.named_parameters())
        check_devices(parameters, first.device)
        check_finite("y", self.target)
        self.weights: list[nn.Parameter] = []  # what a compiled pass must be told not to differentiate
        if calls.compiled and not sharded_modules(model):
            self.weights = [p for p in parameters.values() if p.requires_grad and p.is_leaf]
        self.nodes: list[Node] = []
        self.visited = self.nodes  # those of them that later passes meet
        self.shifted: list[Node] = []  # the others: in a compiled model they are mu + e in its graph
        self.output: Node | None = None  # the node whose emission the model returns, if any
        self.output_shape: torch.Size | None = None  # that of what the model returns, where it is another
        self.items: Tensor | None = None  # what the loss is a mean over
        self.places: dict[Node, Tensor] | None = None  # where the pass under way puts states u: see `place`
        self.begins: Callable[[Node], None] | None = None  # gives a node its state in the first pass already
        self.out = torch.empty(0)  # what the model returned in the last pass
        self.energies: list[Tensor] = []  # F [S] of every pass
        self.watch: Callable[[Batch], None] | None = None  # called before every move, and after the last
        self.leaves: list[Tensor] = []
        self.random = RandomState(first.device)
        self.resumes_random = False  # whether something else draws between the passes

    def _mask_target(self) -> None:
        """Leave free what the mask does not clamp: its values count nothing, whatever they are."""
        if self.mask is None or self.target is None:
            return
        if self.mask.dtype != torch.bool or self.mask.shape != self.target.shape:
            raise ValueError(
                f"mask is {self.mask.dtype} {tuple(self.mask.shape)}: give a bool tensor {tuple(self.target.shape)}, "
                "True where y is clamped"
            )
        first = self.mask.flatten().int().argmax().view(1)  # a value that is clamped fits the output's family
        fill = self.target.flatten().index_select(0, first)
        self.target = torch.where(self.mask, self.target, fill.nan_to_num() if fill.is_floating_point() else fill)

    # Passes.

    def free_energy(
        self, *, first: bool = False, learns: bool = False, moves: bool = True, shows: bool = False, local: bool = False
    ) -> Tensor:
        """F ``[S]`` at the states, with its graph: one forward pass of the model.

        first: the pass that makes the nodes, at their predictions. learns: weight gradients will be taken of it. moves:
        gradients of the states will be. shows: nodes keep their emissions and energies. local: each node's weights see
        its own energy alone, whatever the order.
        """
        here = ModelPass(self, first, learns, moves, shows, local)
        resume = RandomState(self.random.device) if self.resumes_random and not first else None
        self.random.restore()  # dropout and noise are the same in every pass
        try:
            with contextlib.ExitStack() as held:
                held.enter_context(torch.enable_grad())
                held.enter_context(running(here))
                held.enter_context(hold_statistics([] if first else self.calls.norms))
                held.enter_context(hold_weights([] if learns else self.weights))
                held.enter_context(self._errors_in_the_graph(here))
                held.enter_context(self.calls.eager() if first or self.places is not None else self.calls.traced())
                args = self.args if self.clamp_input is True else (self._free_input(), *self.args[1:])
                out = self.calls.run(self.model, *args, **self.kwargs)
                self.out = out["logits"] if isinstance(out, Mapping) and "logits" in out else out
                here.check(self.out)
                energy = sum([*here.added, *here.energies], self._output_energy(here))
        except BaseException:
            self.random.restore()  # a batch that is refused draws nothing
            raise
        if resume is not None:
            resume.restore()
        self.energies.append(energy.detach())
        self.leaves, self.last = here.leaves, here
        here.close()
        self.out = self.out.detach()
        return energy

    def move(self, energy: Tensor, response: Response) -> None:
        """One backward pass: every state answers its gradient. Weight gradients are not computed."""
        self.last.response = response
        leaves, self.leaves = self.leaves, []
        if energy.requires_grad and leaves:
            torch.autograd.backward(energy, ones(energy), inputs=leaves)
        for node in self.shifted:
            if not node.moved and not isinstance(response, Gradient):
                raise RuntimeError(
                    f"node {node.name!r}: the model's forward passes it by; inference needs the same path at every step"
                )

    def gradients(self, take: Callable[[Node, Tensor], None]) -> Tensor:
        """F ``[S]`` at the states, whose natural gradients go to ``take``; nodes show what they are. Moves nothing."""
        energy = self.free_energy(shows=True)
        self.move(energy, Gradient(take))
        return energy.detach()

    def probe(self) -> Tensor:
        """F ``[S]`` at the states; leaves in every node its energy, and the norm of its natural gradient."""

        def residual(node: Node, natural: Tensor) -> None:
            node.residual = sum_samples(natural * natural, self.samples).sqrt()

        return self.gradients(residual)

    def _free_input(self) -> Tensor:
        assert self.input_node is not None
        x = self.args[0]
        free = self.input_node(x)
        return torch.where(self.clamp_input, x, free) if isinstance(self.clamp_input, Tensor) else free

    @contextlib.contextmanager
    def _errors_in_the_graph(self, here: ModelPass) -> Iterator[None]:
        """Within it the Gaussian nodes of a compiled model add their errors to their predictions."""
        with contextlib.ExitStack() as stack:
            for node in self.shifted:
                node.moved = False
                assert isinstance(node.family, Gaussian)
                stack.enter_context(node.family.shifted(here.error_of(node, node.dtype)))
            yield

    def _output_energy(self, here: ModelPass) -> Tensor:
        """The energy ``[S]`` of the output, at what the model returned."""
        mu = self.out
        if here.head is not None:
            stands_for, energy = here.head
            if self.out is not stands_for:
                raise RuntimeError(
                    "a pc.Head gives no logits in inference: the model must return what it returns, untouched; "
                    "use nn.Linear for a layer that something follows"
                )
            return self.output_weight * sum_samples(energy, self.samples)
        if self.output is not None:
            mu = here.output_mu
            if here.first and here.output_shape != self.out.shape:
                self.output_shape = self.out.shape  # the model flattens or squeezes what its last node emits
            if self.output_shape is not None:
                mu = mu.reshape(self.output_shape)
        if self.target is None:
            return wide(mu.detach()).new_zeros(self.samples)
        family = output_family(self.given_output, None if self.output is None else self.output.family, self.target)
        self.count_items(family, mu, here.first)
        target = self.target
        if isinstance(family, Categorical) and not target.is_floating_point():
            energy = wide(family.clamped(mu, self.labels(family)))
        elif self.mask is None:
            energy = wide(family.clamped(mu, target))
        elif len(inspect.signature(family.clamped).parameters) < 3:
            raise TypeError(f"{type(family).__name__}.clamped(mu, target) takes no mask: add the argument mask=None")
        else:
            energy = wide(family.clamped(mu, target, self.mask))
        return energy if self.output_weight == 1 else self.output_weight * energy

    def count_items(self, family: Distribution, mu: Tensor, first: bool) -> None:
        """Check, in a batch's first pass, that y fits the output mu, and count its items."""
        if not first or self.target is None:
            return
        if self.target.device != mu.device:
            raise ValueError(f"y is on {self.target.device}, the model's output on {mu.device}: move y there")
        self.items = family.check_target(self.target, mu)
        if self.mask is not None and not self.target.is_floating_point():
            self.items = (self.mask & (self.target != getattr(family, "ignore_index", -100))).sum()

    def labels(self, family: Categorical) -> Tensor:
        """The labels of the output; those that the mask does not clamp are ignored."""
        assert self.target is not None
        return self.target if self.mask is None else torch.where(self.mask, self.target, family.ignore_index)

    def name_of(self, family: Distribution) -> str:
        """The name of a value node in the model: its module's, without the ``.node`` of a layer."""
        return self.names.get(family, "").removesuffix(".node") or "node"

    # What a batch is begun with.

    def at_prediction(self, *, learns: bool = False) -> Tensor:
        """F ``[S]`` with every node at its prediction, where it is made."""
        return self.free_energy(first=True, learns=learns, moves=False)

    def place(self, states: dict[Node, Tensor]) -> None:
        """Put the states of these nodes at u, by one pass of the model; the others, at the predictions that follow."""
        self.places = states
        try:
            self.free_energy(moves=False, shows=True)
        finally:
            self.places = None
        self.energies.pop()

    def learn(self, *, local: bool = False) -> Tensor:
        """The learning pass: F ``[S]``, whose backward leaves the weight gradients.

        In ePC that is the total derivative, with every e held. local: each node's own energy alone, with every u held
        (E_local of Goemaere et al. 2025); the two agree where inference is settled.
        """
        if local:
            self.shifted, self.visited = [], self.nodes
        return self.free_energy(learns=True, moves=False, local=local)

    def calibrate(self, energy: Tensor, precision: Precision) -> list[tuple[Node, Tensor]]:
        """Set precisions and units from one backward pass at the prediction.

        Returns the nodes that reach the output, each with the gradient of F in its emission.
        """
        free = [node for node in self.nodes if node is not self.output]
        grads: tuple[Tensor | None, ...] = (None,) * len(free)
        if energy.requires_grad and free:
            emissions = [node.emission for node in free]
            grads = torch.autograd.grad(energy, emissions, ones(energy), allow_unused=True)  # type: ignore[arg-type]
        for node in self.nodes:
            node.mu = None if node.mu is None else node.mu.detach()
        reached = [(node, grad) for node, grad in zip(free, grads) if grad is not None]
        free_energy, in_units = energy.detach(), getattr(precision, "in_units", True)
        for node, grad in reached:
            assert node.mu is not None
            mu = node.mu
            if in_units and node.family.measured:
                node.unit = (sum_samples(wide(mu) ** 2, self.samples) * (self.samples / mu.numel())).sqrt()
            squared = node.family.fall(mu, grad, self.samples, node.unit, **node.frozen)
            pi = precision(node, squared, free_energy, len(reached))
            if not isinstance(pi, Tensor) or pi.shape != free_energy.shape:
                raise ValueError(f"precision={precision!r} gave no tensor {tuple(free_energy.shape)}, pi by sample")
            node.precision = pi.to(free_energy.dtype)
            node.squared = squared
        return reached

    def named_nodes(self) -> dict[str, Node]:
        """The nodes but the output, by name: a module visited again has ``#2`` added."""
        named: dict[str, Node] = {}
        visits: Counter[str] = Counter()
        for node in self.nodes:
            if node is not self.output:
                visits[node.name] += 1
                named[node.name + (f"#{visits[node.name]}" if visits[node.name] > 1 else "")] = node
        return named


def _u_of(state: Tensor, mu: Tensor, form: str) -> Tensor:
    """The state u of what a node holds by its form."""
    return wide(mu.detach()) + state if form == "error" else state


def _is_emission(out: Tensor, emission: Tensor) -> bool:
    """Whether the model returns a node's emission, in its own shape or in another with the elements in their order."""
    same = out.numel() == emission.numel() and out.data_ptr() == emission.data_ptr()
    return out is emission or (same and out.is_contiguous() and emission.is_contiguous())
