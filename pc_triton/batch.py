"""One batch: F as a function of the weights and of the states of its value nodes.

A state is a leaf tensor. `Batch.free_energy` is one pass of the user's own model under the states, and returns F with
its graph; `Batch.move` is the backward pass in which the states answer their gradients. What the T moves are is said in
``orders.py``; what a move is, in ``node.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arithmetic import sum_of_nodes, sum_samples, wide
from .checks import check_batch, check_devices, samples_first
from .context import running
from .dispatch import tracing
from .distributions import Distribution
from .errors import see
from .families import Gaussian
from .float8 import FewDigits
from .node import Gradient, Node, Response
from .output import Output
from .passes import ModelPass, Nodes
from .plumbing import (
    Calls,
    RandomState,
    hold_weights,
    ones,
    refuse_second_derivative,
    sharded_modules,
    statistics_of,
    times_written,
)
from .returned import refuse_own_loss, refuse_own_tokens
from .rules import Displacement, Precision, precisions


class Batch(Nodes):
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
        logits: Callable[[Any], Any] | None = None,
    ) -> None:
        self.model, self.inputs = model, inputs
        self.args, self.kwargs, first = check_batch(inputs, target)
        clamped = Output(target, len(first), output, output_weight, mask)
        super().__init__(len(first), calls, names, form, clamped)
        self.input_node, self.clamp_input, self.device = input_node, clamp_input, first.device
        self.shows = shows  # whether its nodes' emissions will be read after inference
        parameters = dict(model.named_parameters())
        check_devices(parameters, first.device)
        self.weights: list[nn.Parameter] = []  # what a compiled pass must be told not to differentiate
        if calls.compiled and not sharded_modules(model):
            self.weights = [p for p in parameters.values() if p.requires_grad and p.is_leaf]
        self.logits = logits or _logits  # the tensor that is clamped, of what the model returns
        self.out = torch.empty(0)  # that tensor in the last pass
        self.energies: list[Tensor] = []  # F [S] of every pass
        self.few_digits: FewDigits | None = None
        self.watch: Callable[[Batch], None] | None = None  # called before every move, and after the last
        self.awaits: tuple[ModelPass, list[Tensor]] | None = None  # the last pass, until its response is known
        self.makes_graph = tracing.get() or (first.is_cuda and torch.cuda.is_current_stream_capturing())
        self.looks = calls.looks_again(model.training) and not self.makes_graph
        if self.looks:
            refuse_own_tokens(model, inputs, target)
        self.random = self._random_state(self.looks)  # as before the first pass

    @property
    def items(self) -> Tensor | int:
        """What a loss is a mean over: the labels that count, or the samples; at least 1."""
        items = self.output.items
        return self.samples if items is None else items.clamp_min(1)

    def per_item(self, energy: Tensor) -> Tensor:
        """F ``[S]`` as a loss, its mean over the `items`. On a CPU, where a look is cheap, NaN is told of once."""
        loss = energy.sum() / self.items
        if loss.device.type == "cpu" and not tracing.get() and not loss.detach().isfinite():
            self.calls.say(f"the free energy is not finite where the weights learn{self._lost()}" + see("not-finite"))
        return loss

    def _lost(self) -> str:
        """Since when F has not been finite, in which node's state it shows, and what to do."""
        lost, moves = ~self.energies[-1].isfinite(), len(self.energies) - 1
        while moves and not self.energies[moves - 1][lost].isfinite().all():
            moves -= 1
        sizes = {
            node.name: torch.linalg.vector_norm(node.state, torch.inf).nan_to_num(nan=torch.inf).item()
            for node in self.nodes
            if node.state is not None
        }
        if moves == 0 or not sizes:
            return (
                ", nor at the prediction, before any state has moved: the model's output or an energy that it adds is "
                "too large. Give a smaller learning rate; clip or skip such gradients"
            )
        name = max(sizes, key=sizes.__getitem__)
        return (
            f", and has not been since move {moves} of the states, which was too long: the largest state is that of "
            f"node {name!r}, {sizes[name]:.1e}. Give a smaller step or a larger precision; clip or skip such gradients"
        )

    # Passes.

    def free_energy(
        self, *, learns: bool = False, moves: bool = True, shows: bool = False, local: bool = False
    ) -> Tensor:
        """F ``[S]`` at the states, with its graph: one forward pass of the model. The first makes the nodes.

        learns: weight gradients will be taken of it. moves: gradients of the states will be. shows: nodes keep their
        emissions and energies. local: each node's weights see its own energy alone, whatever the order.
        """
        here = ModelPass(self, learns, moves, shows, local, None if learns or shows else self.few_digits)
        with self._same_in_every_pass(here.first), running(here), self._as_this_pass_needs(here):
            args = self.args if self.clamp_input is True else (self._free_input(), *self.args[1:])
            out = self.calls.run(self.model, *args, **self.kwargs)
            self.out = self.logits(out)
            if self.looks and here.first:
                refuse_own_loss(out, self.out, self.output.target)
            here.check(self.out)
            energy = torch.stack([here.output_energy(self.out), *here.added, *here.energies], -1).sum(-1)
        at_prediction = here.first and not moves  # there learning is plain backpropagation
        if learns and not at_prediction and energy.requires_grad:
            energy.register_hook(refuse_second_derivative)
        self.energies.append(energy.detach())
        self.awaits = (here, here.leaves) if moves else None
        here.close()
        self.out = self.out.detach()
        return energy

    def _random_state(self, looks: bool) -> RandomState:
        return RandomState(self.device, self.model if looks or self.calls.draws_elsewhere else None)

    @contextlib.contextmanager
    def _same_in_every_pass(self, first: bool) -> Iterator[None]:
        """Within it the model draws the numbers, and finds the buffers, of the first pass.

        What draws between the passes, such as a rule, a start or a state_optimizer of the user's, must not see the same
        numbers again: after it the generators are where they were. A batch that is refused draws and moves nothing.
        """
        now = self._random_state(first and self.looks)
        noted, frozen = None, {}
        if first and self.looks:
            still = [(name, p) for name, p in self.model.named_parameters() if not p.requires_grad]
            frozen = {name: (p, times_written(p)) for name, p in still}
        if first:
            self.random, noted = now, self.calls.buffers.note(self.looks)
        else:
            self.random.restore()
        statistics = statistics_of(self.calls.norms) if first and not self.makes_graph else []
        holds = not first and (self.calls.norms or self.moved)
        try:
            with self.held() if holds else contextlib.nullcontext():
                yield
        except BaseException:
            self.random.restore()
            if noted is not None:
                noted.restore()
            for statistic, before in statistics:
                statistic.copy_(before)
            raise
        if noted is None:
            now.restore()
        else:
            self.moved = noted.moved()
            for name in [n for n, (p, before) in frozen.items() if times_written(p) != before]:
                self.calls.say(
                    f"the model's forward changes parameter {name!r}, which does not learn, and so at every inference "
                    "step: make it a buffer (register_buffer), which moves once in a batch"
                    + see("a-parameter-that-the-forward-changes")
                )
            self.calls.learn(self.moved, self.random.moved_elsewhere())

    @contextlib.contextmanager
    def _as_this_pass_needs(self, here: ModelPass) -> Iterator[None]:
        """Within it torch, its compiler and the functions that a model calls do what this pass needs."""
        with torch.enable_grad(), here.digits(), here.functions(), contextlib.ExitStack() as held:
            if not here.learns and self.weights:
                held.enter_context(hold_weights(self.weights))
            if self.calls.compiled:
                self._put_errors_in_the_graph(here, held)
                eager = here.first or here.local or self.places is not None or here.few_digits is not None
                eager |= self.calls.functions
                held.enter_context(self.calls.eager() if eager else self.calls.traced())
            if self.looks and here.first and self.calls.time_first:
                held.enter_context(samples_first(self.calls.time_first, self.samples))
            yield

    @contextlib.contextmanager
    def in_digits_of(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Within it passes that neither learn nor show have their products made in this dtype; None: as all others."""
        self.few_digits = None if dtype is None else FewDigits()
        try:
            yield
        finally:
            self.few_digits = None

    def move(self, energy: Tensor, response: Response) -> None:
        """One backward pass: every state answers its gradient. Weight gradients are not computed."""
        leaves = self.respond(response)
        if energy.requires_grad:
            torch.autograd.grad(energy, leaves, ones(energy), allow_unused=True)
        for node in self.in_graph:
            if not node.displaced and not isinstance(response, Gradient):
                raise RuntimeError(
                    f"node {node.name!r}: the model's forward passes it by; inference needs the same path at every step"
                    + see("another-path")
                )

    def respond(self, response: Response) -> list[Tensor]:
        """Have the states answer so in the last pass's backward; returns the leaves of it."""
        assert self.awaits is not None
        here, leaves = self.awaits
        here.response, self.awaits = response, None  # a pass knows its batch: to hold it would be a cycle
        return leaves

    def probe(self) -> Tensor:
        """F ``[S]`` at the states; leaves in every node its energy, and its natural gradient's norm. Moves nothing."""

        def residual(node: Node, natural: Tensor) -> None:
            node.residual = sum_samples(natural * natural, self.samples).sqrt()

        energy = self.free_energy(shows=True)
        self.move(energy, Gradient(residual))
        return energy.detach()

    def look(self) -> Tensor:
        """F ``[S]`` at the states, by a forward pass that `energies` does not count."""
        energy = self.free_energy(learns=True, moves=False)  # as the learning pass, whose graph a compiled model has
        self.energies.pop()
        return energy.detach()

    def _free_input(self) -> Tensor:
        assert self.input_node is not None
        x = self.args[0]
        free = self.input_node(x)
        return torch.where(self.clamp_input, x, free) if isinstance(self.clamp_input, Tensor) else free

    def _put_errors_in_the_graph(self, here: ModelPass, held: contextlib.ExitStack) -> None:
        """Have the Gaussian nodes of a compiled model add their errors to their predictions, within ``held``."""
        for node in self.in_graph:
            node.displaced = False
            assert isinstance(node.family, Gaussian)
            held.enter_context(node.family.shifted(here.error_of(node, node.dtype)))

    # What a batch is begun with.

    def at_prediction(self, *, learns: bool = False, fuses: bool = False) -> Tensor:
        """F ``[S]`` with every node at its prediction, where it is made.

        learns: it is the learning pass already. fuses: a kernel may compute a prediction
        and the node on it in one, since nothing else will read the prediction.
        """
        self.fuses_first = fuses and not self.shows
        energy = self.free_energy(learns=learns, moves=False)
        if learns:
            self.let_go()
        return energy

    def let_go(self) -> None:
        """Forget predictions and emissions, which hold the first pass's graph."""
        for node in self.nodes:
            node.mu = node.emission = node.fused = None

    def place(self, states: dict[Node, Tensor]) -> None:
        """Put the states of these nodes at u, by one pass of the model; the others, at the predictions that follow."""
        if isinstance(self.clamp_input, Tensor):  # where it is clamped the input stays as it is
            x, free = self.args[0], {node: u for node, u in states.items() if node.family is self.input_node}
            states = states | {node: torch.where(self.clamp_input, wide(x), u) for node, u in free.items()}
        self.places = states
        try:
            self.free_energy(moves=False, shows=True)
        finally:
            self.places = None
        self.energies.pop()

    def warn_if_none_is_free(self) -> None:
        """Warn, once for a model, where y is clamped and there is no state to move."""
        if self.output.target is None or any(node.is_free for node in self.nodes):
            return
        visited = ", ".join(repr(node.name) for node in self.nodes)
        self.calls.say(
            f"no free value node: the forward visits {visited}, and the output depends on none that is not itself the "
            "output. Inference moves nothing, and training is backpropagation. Put pc.Gaussian() after a hidden layer; "
            "print(changes) shows what pc.convert left and why, changes.visit(free_energy, x) what the forward visits"
            + see("no-free-value-node")
        )

    def learn(self, *, local: bool = False) -> Tensor:
        """The learning pass: F ``[S]``, whose backward leaves the weight gradients.

        In ePC that is the total derivative, with every e held. local: each node's own energy alone, with every u held
        (E_local of Goemaere et al. 2025); the two agree where inference is settled.
        """
        if local:
            self.in_graph, self.called = [], self.nodes
        return self.free_energy(learns=True, moves=False, local=local)

    def calibrate(self, energy: Tensor, precision: Precision) -> tuple[list[tuple[Node, Tensor]], Tensor]:
        """Set precisions and units from one backward pass at the prediction.

        Returns the nodes that reach the output, each with the gradient of F in its emission; and the slope ``[S]`` of F
        along Newton's step of all of them.
        """
        free = [node for node in self.nodes if node is not self.output.node]
        grads: tuple[Tensor | None, ...] = (None,) * len(free)
        if energy.requires_grad and free:
            emissions = [node.emission for node in free]
            grads = torch.autograd.grad(energy, emissions, ones(energy), allow_unused=True)  # type: ignore[arg-type]
        for node in self.nodes:
            node.mu = None if node.mu is None else node.mu.detach()
        reached = [(node, grad) for node, grad in zip(free, grads) if grad is not None]
        f0 = energy.detach()
        if not reached:
            return reached, torch.zeros_like(f0)
        measures = torch.stack([node.measure(grad, self.samples) for node, grad in reached]).to(f0.dtype)
        units2, falls = measures.unbind(1)  # [nodes, S] each
        in_units = getattr(precision, "in_units", True)
        # What is free is to be inferred, and not predicted: it is N(x, 1), since a displacement would keep it at x.
        priors = [type(precision) is Displacement and node.family is self.input_node for node, _ in reached]
        scaled = [in_units and node.family.measured and not prior for (node, _), prior in zip(reached, priors)]
        if any(scaled):
            units = units2.sqrt()
            for (node, _), own, unit in zip(reached, scaled, units):
                node.unit = unit if own else None
        squared = torch.stack([a if own else b for own, a, b in zip(scaled, falls * units2, falls)])
        pi = precisions(precision, [node for node, _ in reached], squared, f0)
        if any(priors):
            pi = torch.stack([torch.ones_like(row) if prior else row for row, prior in zip(pi, priors)])
        absolute = pi / units2.clamp_min(1e-30)  # where the unit is 0 the state stays at mu
        for row, (node, _) in enumerate(reached):
            node.precision = pi[row]
            if node.unit is not None and node.family.quadratic:
                node.precision, node.in_units, node.unit = absolute[row], pi[row], None
        return reached, sum_of_nodes(squared / pi)


def _logits(out: Any) -> Any:
    """The logits of a mapping or a dataclass that has them; else what was returned."""
    if isinstance(out, Mapping):
        return out.get("logits", out)
    return getattr(out, "logits", out)
