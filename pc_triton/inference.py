"""Inference: the states of one batch, and the passes of the model that move them.

One inference step is one forward and one backward of the user's own module, in which every value node is an
autograd.Function (``visits.py``). Weight gradients are pruned away until the learning pass.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from . import reference
from .checks import check_batch, check_devices, check_finite, ordinary
from .dispatch import backend, fuses, tracing
from .distributions import Categorical, Distribution, Gaussian, current, running
from .recompute import in_checkpoint
from .reference import per_sample, sum_samples, wide
from .visits import AttentionVisit, LinearVisit, Start, ValueNode, Visit

if TYPE_CHECKING:
    from .free_energy import FreeEnergy


TRUST = 0.3
"""The largest root-mean-square move of a node's states, in units of its scale, that "auto" precision lets the first
Newton step make: a node that F hardly depends on is not thrown far for its share."""


class Inference:
    """The states of one batch through its inference. `FreeEnergy` drives it; a value node calls `visit`."""

    def __init__(self, owner: FreeEnergy, inputs: Any, target: Tensor | None, *, clamp_input: bool = True) -> None:
        self.owner, self.clamp_input = owner, clamp_input
        leave_graphs()
        self.order = owner.order
        if target is not None and not isinstance(target, Tensor):
            raise TypeError(f"y is a {type(target).__name__}: give a tensor, or None for a free output")
        self.args, self.kwargs, first = check_batch(inputs)
        self.target = ordinary(target)
        self.samples = first.shape[0]
        parameters = dict(owner.model.named_parameters())
        self.weights = [p for p in parameters.values() if p.requires_grad and p.is_leaf]
        check_devices(parameters, first.device)
        check_finite("y", target)
        self.form = "error" if self.order == "error" else "state"
        self.mode = "first"  # then "infer", "incremental", "probe" or "learn"
        self.nodes: list[ValueNode] = []
        self.visited = self.nodes  # those of them that the passes after the first visit
        self.leaves: list[ValueNode] = []  # the others: the model adds their e, a leaf of autograd's
        self.errors: list[Tensor] = []  # those leaves, in the last pass
        self.visits = 0
        self.output: ValueNode | None = None  # the node whose emission the model returns, if any
        self.output_shape: torch.Size | None = None  # that of what the model returns, where it is another
        self.out: Tensor = torch.empty(0)  # what the model returned in the last pass
        self.head: tuple[Tensor, Tensor] | None = None  # what a Head returned, and its energy [R]
        self.added: list[Tensor] = []  # the energies [S] that the model added in this pass
        self.shows_output = False  # whether a Head has to give its logits
        self.learns = False  # whether weight gradients are taken of this pass
        self.checkpointed = False  # whether the model is where `checkpoint_contexts` are
        self.again = False  # whether such a part of a pass is being computed again, for its backward
        self.items = torch.ones(())
        self.set_step(torch.full((self.samples,), owner.step, device=first.device))
        self.slope = torch.zeros_like(self.step)  # of F along the first move
        self.accepted = self.slope  # F [S] at the states to which the guard would go back
        self.moves = 0
        self.skips = owner.order == "simultaneous" and owner.state_optimizer is None  # what is 0 for certain
        self.lowest = math.inf  # the number of the first node that has moved: those before it are at their predictions
        self.guarded = owner.adaptive and owner.state_optimizer is None
        self.remembers = self.guarded and (self.form == "state" or owner.steps > 3)  # keeps the accepted states
        self.energies: list[Tensor] = []  # F [S] of every forward pass
        self.optimizer: torch.optim.Optimizer | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self.random = RandomState(first.device)

    # What a value node and its backward call.

    def visit(self, family: Distribution, mu: Tensor, frozen: dict[str, Any]) -> Tensor:
        """The emission, in this pass, of the next node of the model's forward."""
        if self.mode == "first" and not self.again:
            node = self._new_node(family, mu, frozen)
        else:
            node = self._next_node(family)
            family.frozen(mu)  # drawn again and not used, so that what is drawn after it is the same
        if node is self.output:
            self.visits += 1
            if not self.again:
                node.mu = mu
            return mu
        if node.state is not None:
            return self._emit(node, *Visit.apply(mu, self._anchor, node, self))
        emission = node.family.emission(mu, **node.frozen)
        if self.mode == "first" and not emission.requires_grad:
            emission = Start.apply(emission, self._anchor)
        return self._emit(node, emission)

    def _emit(self, node: ValueNode, emission: Tensor, energy: Tensor | None = None) -> Tensor:
        self.visits += 1
        if not self.again:
            node.emission, node.energy, node.version = emission, energy, emission._version
        return emission

    def add_energy(self, energy: Tensor) -> None:
        """Count in F an energy of the model's own, ``[S * r, ...]``, in this pass."""
        if energy.dim() == 0 or energy.shape[0] % self.samples:
            raise ValueError(
                f"add_energy got shape {tuple(energy.shape)} in a batch of {self.samples}: an energy needs its samples "
                "along the first axis, a whole number of rows each"
            )
        energy = sum_samples(wide(energy), self.samples)
        if not self.again:
            self.added.append(energy)

    def labelled_output(self) -> tuple[Categorical, Tensor] | None:
        """The output's family and its labels, where a `Head` can clamp it to them; None where it must give logits."""
        if self.target is None or self.target.is_floating_point() or self.shows_output or tracing.get():
            return None
        family = output_family(self.owner.output, None, self.target)
        return (family, self.target) if isinstance(family, Categorical) else None

    def count_items(self, family: Distribution, mu: Tensor) -> None:
        """Check, in a batch's first pass, that y fits the output mu, and count its items."""
        if self.mode != "first" or self.target is None:
            return
        if self.target.device != mu.device:
            raise ValueError(f"y is on {self.target.device}, the model's output on {mu.device}: move y there")
        self.items = family.check_target(self.target, mu)

    def visit_linear(self, family: Gaussian, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """As `visit` for mu = x W' + b, in one kernel with the product; None where that is not to be."""
        if self.mode == "first" or self.form == "state" or not fuses(x, weight):
            return None
        node = self._next_node(family)
        if node is self.output or node.state is None:
            return None
        return self._emit(node, *LinearVisit.apply(x, weight, bias, self._anchor, node, self))

    def visit_attention(self, family: Categorical, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
        """softmax(u) v for mu = scale q k', in one kernel with the node; None where that is not to be.

        `calibrate` needs the gradient in the weights, and `FreeEnergy.infer` shows them: those passes make them.
        """
        ours = backend(q)
        if self.mode in ("first", "probe") or self.form == "state" or ours is reference or q.shape[-1] > ours.WIDEST:
            return None
        node = self._next_node(family)
        if node is self.output or node.state is None:
            return None
        return self._emit(node, *AttentionVisit.apply(q, k, v, self._anchor, node, self, scale))

    def named_nodes(self) -> dict[str, ValueNode]:
        """The nodes but the output, by name: a module visited again has ``#2`` added."""
        named: dict[str, ValueNode] = {}
        visits: Counter[str] = Counter()
        for node in self.nodes:
            if node is not self.output:
                visits[node.name] += 1
                named[node.name + (f"#{visits[node.name]}" if visits[node.name] > 1 else "")] = node
        return named

    def _next_node(self, family: Distribution) -> ValueNode:
        if self.visits == len(self.visited) or self.visited[self.visits].family is not family:
            raise RuntimeError(
                f"node {self.owner.name_of(family)!r}: the model visits its nodes in another order than in its "
                "first pass; inference needs the same path at every step"
            )
        return self.visited[self.visits]

    def _new_node(self, family: Distribution, mu: Tensor, frozen: dict[str, Any]) -> ValueNode:
        name = self.owner.name_of(family)
        if mu.dim() == 0 or mu.shape[0] % self.samples:
            raise ValueError(
                f"node {name!r} sees shape {tuple(mu.shape)} in a batch of {self.samples}: a value node needs its "
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
        node = ValueNode(family, name, len(self.nodes), mu, {**family.frozen(mu), **frozen})
        if not self.owner.calibrates:
            node.pi = torch.full_like(self.step, float(self.owner.precision))
            node.state = wide(mu.detach()).clone()
        self.nodes.append(node)
        return node

    def move_state(self, node: ValueNode, step: Callable[[Tensor], tuple[Tensor | None, Any]]) -> Any:
        """Move the node's state by one step, which returns the new state, and what goes to the layer below."""
        assert node.state is not None
        by_gradient = self.optimizer is not None or self.mode == "probe"
        state = wide(node.state.clone()) if by_gradient else node.state  # a kernel moves it in place
        moved, grad_below = step(state)
        assert moved is not None
        if not by_gradient:
            node.state = moved
            return grad_below
        natural = node.state - moved  # the natural gradient, since the step is 1
        if self.mode == "probe":
            node.residual = sum_samples(natural * natural, self.samples).sqrt()
        else:
            node.state.grad = natural
        return grad_below

    # Passes.

    def forward(self, mode: str, *, learns: bool = False) -> Tensor:
        """One forward pass of the model under the states: F per sample ``[S]``, with its graph.

        learns: whether weight gradients will be taken of it.
        """
        self.mode, self.visits, self.learns, self.head, self.added = mode, 0, learns, None, []
        self.random.restore()  # dropout and noise are the same in every pass
        weights = [] if learns or not self.owner.traced or self.owner.sharded else self.weights
        try:
            with torch.enable_grad(), self._visited(), hold_weights(weights):
                args = self.args
                if not self.clamp_input:
                    args = (self.owner.input_node(args[0]), *args[1:])
                with self._leaves(), self._compilation():
                    self.out = _logits(self.owner.run(*args, **self.kwargs))
                self._check_pass()
                energy = sum(self.added, self._output_energy())
                for node in self.nodes:
                    if node.energy is not None:
                        energy = energy + node.energy
        except BaseException:
            self.random.restore()  # a batch that is refused draws nothing
            raise
        self.energies.append(energy.detach())
        if mode != "first" or not self.owner.calibrates:
            self._release()
        return energy

    @contextlib.contextmanager
    def _visited(self) -> Iterator[None]:
        """Within it the model's value nodes visit this inference; batch statistics move in its first pass alone."""
        token = current.set(self)
        running.append(self)
        try:
            with hold_statistics([] if self.mode == "first" else self.owner.norms):
                yield
        finally:
            running.remove(self)
            current.reset(token)

    @contextlib.contextmanager
    def _leaves(self) -> Iterator[None]:
        """Within it the model adds the errors of `leaves` to their predictions, in the dtype of these."""
        self.errors = []
        try:  # `error` is set and deleted, not set to None: torch.compile guards on whether it is an attribute
            for node in self.leaves:
                assert node.state is not None
                assert isinstance(node.family, Gaussian)
                error = node.state.detach().to(node.mu.dtype).requires_grad_(self.mode != "learn")
                node.family.error = error
                node.energy = node.family.error_energy(node.state, node.pi, node.unit)
                self.errors.append(error)
            yield
        finally:
            for node in self.leaves:
                vars(node.family).pop("error", None)

    @contextlib.contextmanager
    def _compilation(self) -> Iterator[None]:
        """Within it torch.compile has the model in every pass but the first, whose nodes break graphs whole later on.

        Random numbers are drawn as in that pass.
        """
        if not self.owner.traced:
            yield
        elif self.mode == "first":
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            with torch._inductor.config.patch(fallback_random=True):
                yield

    @contextlib.contextmanager
    def within_checkpoint(self) -> Iterator[None]:
        """Within it the model may be computed again, by `computes_again`."""
        before, self.checkpointed = self.checkpointed, True
        try:
            yield
        finally:
            self.checkpointed = before

    @contextlib.contextmanager
    def computes_again(self, mode: str, visits: int) -> Iterator[None]:
        """Within it a part of the last pass is computed again, for its backward, from that visit and in that mode."""
        before = self.mode, self.visits
        self.mode, self.visits, self.again = mode, visits, True
        try:
            with self._visited(), self.within_checkpoint():
                yield
        finally:
            self.mode, self.visits, self.again = *before, False

    def _release(self) -> None:
        """Keep values only: a value node's graph holds this object, and Python cannot collect such a cycle."""
        self.out, self.head, self.added = self.out.detach(), None, []
        for node in self.nodes:
            node.mu = node.mu.new_empty(0)
            node.emission = node.emission.detach() if self.shows_output else node.mu
            node.energy = None if node.energy is None else node.energy.detach()

    def _check_pass(self) -> None:
        if not isinstance(self.out, Tensor):
            raise TypeError(
                f"the model returned {type(self.out).__name__}: it must return one tensor, or a mapping with its "
                "'logits'; wrap it"
            )
        if not self.nodes or self.visits != len(self.visited):
            raise RuntimeError(
                f"the model's forward visited {self.visits} value nodes, and {len(self.visited)} in its first pass: "
                "inference needs at least one, and the same at every step"
            )
        if self.out.dim() == 0 or self.out.shape[0] != self.samples:
            shape = tuple(self.out.shape)
            raise ValueError(f"the model's output has shape {shape} for a batch of {self.samples} samples")
        if self.mode == "first":
            returned = [node for node in self.nodes if _is_emission(self.out, node.emission)]
            if returned:
                self.output = returned[-1]
                self.output.free, self.output.state, self.output.energy = False, None, None
        for node in self.visited:
            if node is not self.output and node.emission._version != node.version:
                raise RuntimeError(
                    f"an operation after node {node.name!r} changes its output in place: use inplace=False there"
                )

    def _output_energy(self) -> Tensor:
        mu = self.out
        if self.head is not None:
            stands_for, energy = self.head
            if self.out is not stands_for:
                raise RuntimeError(
                    "a pc.Head gives no logits in inference: the model must return what it returns, untouched; "
                    "use nn.Linear for a layer that something follows"
                )
            return sum_samples(energy, self.samples)
        if self.output is not None:
            mu = self.output.mu
            if self.mode == "first" and self.output.emission.shape != self.out.shape:
                self.output_shape = self.out.shape  # the model flattens or squeezes what its last node emits
            if self.output_shape is not None:
                mu = mu.reshape(self.output_shape)
        if self.target is None:
            return wide(mu.detach()).new_zeros(self.samples)
        own = None if self.output is None else self.output.family
        family = output_family(self.owner.output, own, self.target)
        self.count_items(family, mu)
        return wide(family.clamped(mu, self.target))

    def _backward(self, energy: Tensor) -> None:
        """One backward pass: every value node moves its state. Weight gradients are not computed."""
        if energy.requires_grad:
            inputs = [self._anchor, *self.errors]
            _, *grads = torch.autograd.grad(energy, inputs, _ones(energy), allow_unused=True)
            for node, grad in zip(self.leaves, grads):
                self._move_leaf(node, grad)
        if self.skips:
            self.lowest = min((node.number for node in self.nodes if node.reached), default=math.inf)

    def _move_leaf(self, node: ValueNode, grad: Tensor | None) -> None:
        if grad is None:
            raise RuntimeError(
                f"node {node.name!r}: the model's forward passes it by; inference needs the same path at every step"
            )
        coefficients = (node.pi, node.unit, self.keep, self.move)
        self.move_state(node, lambda e: node.family.node_step(grad, e, grad, *coefficients, form="error"))  # no mu

    # The parts of inference.

    def calibrate(self, energy: Tensor) -> None:
        """Set precisions and units from one backward pass at the prediction; in error form that makes the first move.

        With G the gradient in a node's errors, in units of the node's scale, inference lowers F by |G|^2 / (2 pi) to
        first order in 1 / pi. ``precision="auto"`` sets pi = n |G|^2 / (2 delta |F|) for each of the n nodes and each
        sample, so that every node may explain away the same part delta / n of F (and none moves by more than `TRUST`).
        Nothing in this depends on the model's scale, width or depth, nor on the rest of the batch.
        """
        free = [node for node in self.nodes if node.free]
        grads: tuple[Tensor | None, ...] = (None,) * len(free)
        if energy.requires_grad and free:
            emissions = [node.emission for node in free]
            grads = torch.autograd.grad(energy, emissions, _ones(energy), allow_unused=True)
        self.accepted = energy.detach()
        self.set_step(torch.full_like(self.accepted, self.owner.step))
        for node, grad in zip(free, grads):
            node.mu, node.free = node.mu.detach(), grad is not None
        reached = [(node, grad) for node, grad in zip(free, grads) if grad is not None]
        for node, grad in reached:
            self._set_precision(node, grad, len(reached))
            if self.form == "state":
                node.state = wide(node.mu).clone()
            elif self.owner.state_optimizer is not None:
                node.state = torch.zeros_like(wide(node.mu))
            else:
                node.state, _ = node.family.node_step(
                    node.mu, None, grad, node.pi, node.unit, self.keep, self.move,
                    form="error", state_dtype=self.owner.state_dtype, **node.frozen,
                )  # fmt: skip
                self.moves = 1
            node.mu = node.emission = node.mu.new_empty(0)  # read no more: let them go
        if self.owner.traced and self.form == "error" and self.owner.state_optimizer is None and not self.shows_output:
            times = Counter(node.family for node in self.nodes)
            self.leaves = [n for n, _ in reached if type(n.family) is Gaussian and times[n.family] == 1]
            self.visited = [n for n in self.nodes if n not in self.leaves]

    def _set_precision(self, node: ValueNode, grad: Tensor, nodes: int) -> None:
        owner, mu, f0 = self.owner, node.mu, self.accepted.abs()
        if owner.precision == "auto" and node.family.measured:
            node.unit = (sum_samples(wide(mu) ** 2, self.samples) * (self.samples / mu.numel())).sqrt()
        squared = node.family.fall(mu, grad, self.samples, node.unit, **node.frozen)  # |G|^2
        if owner.precision == "auto":
            share = squared * nodes / (2 * owner.displacement * f0).clamp_min(torch.finfo(f0.dtype).tiny)
            trust = (squared / (node.family.units(mu) / self.samples)).sqrt() / TRUST
            node.pi = torch.maximum(share, trust).clamp(1e-12, 1e12)
        else:
            node.pi = torch.full_like(f0, float(owner.precision))
        self.slope = self.slope + squared / node.pi

    def set_step(self, step: Tensor) -> None:
        """The step ``[S]`` of the next moves; 1 is Newton's where the node's own energy is all the curvature."""
        self.step, self.keep, self.move = step, 1 - step, step

    def infer(self, energy: Tensor | None = None) -> None:
        """One inference step: a forward pass (or the one that gave ``energy``) and a backward pass."""
        if energy is None:
            energy = self.forward("infer")
        self.mode = "infer"
        if self.owner.state_optimizer is None:
            if self.guarded:
                self._guard()
            self._backward(energy)
            self.moves += 1
            return
        if self.optimizer is None:
            self.optimizer = self.owner.state_optimizer([n.state for n in self.nodes if n.state is not None])
        self.set_step(torch.ones_like(self.step))  # the optimiser is given the whole natural gradient
        self._backward(energy)
        self.optimizer.step()

    def _guard(self) -> None:
        """Take back the last move in the samples whose F rose, and set the step of each sample.

        The first move of error form: the parabola through F, its slope and F after the move gives the best step along
        it. A sample whose F rose goes back to that parabola's minimum; the others go on with that step, at most
        Newton's. Any other move: a sample whose F rose goes halfway back and halves its step.
        """
        before, now = self.accepted, self.energies[-1].nan_to_num(nan=math.inf, posinf=math.inf)
        rose = now > before if self.moves else torch.zeros_like(now, dtype=torch.bool)
        self.accepted = torch.minimum(before, now) if self.moves else now
        if self.form == "error" and self.moves == 1:
            first = self.step
            curvature = 2 * (now - before + first * self.slope) / first**2
            self.set_step(torch.where(curvature > self.slope, self.slope / curvature, torch.ones_like(curvature)))
            back = self.step / first  # e = 0 lay before the move: going back is shortening e
        else:
            self.set_step(torch.where(rose, 0.5 * self.step, self.step))
            back = torch.ones_like(self.step)
        self.keep = torch.where(rose, back, self.keep)
        self.move = torch.where(rose, torch.zeros_like(back), self.move)
        if not self.remembers:
            return
        for node in self.nodes:
            if node.state is not None:
                rows = per_sample(rose, node.state)
                if node.accepted is not None:
                    node.state = torch.where(rows, 0.5 * (node.accepted + node.state), node.state)
                    node.accepted = torch.where(rows, node.accepted, node.state)
                else:
                    begun = torch.zeros_like(node.state) if self.form == "error" else node.state
                    node.accepted = torch.where(rows, begun, node.state)

    def take_back(self, energy: Tensor) -> bool:
        """Go back to the accepted states in the samples whose F ``[S]`` is above that; whether there are any."""
        rose = ~(energy <= self.accepted)  # or is no number
        if self.moves == 0 or not rose.any():
            return False
        for node in self.nodes:
            if node.state is not None:
                begun = torch.zeros_like(node.state) if node.accepted is None else node.accepted
                node.state = torch.where(per_sample(rose, node.state), begun, node.state)
        return True

    def long_run(self, steps: int) -> Tensor:
        """The lowest F per sample ``[S]`` that ``steps`` more guarded inference steps reach."""
        self.guarded = self.remembers = True
        for _ in range(steps):
            self.infer()
        return self.accepted

    def learn(self) -> Tensor:
        """The learning pass: F per sample ``[S]``, whose backward leaves the weight gradients."""
        return self.forward("learn", learns=True)

    def probe(self) -> Tensor:
        """F per sample ``[S]`` at the states; leaves in every node the norm of its natural gradient. Moves nothing."""
        energy = self.forward("probe")
        held = self.keep, self.move
        self.keep, self.move = torch.zeros_like(self.step), torch.ones_like(self.step)
        self._backward(energy)
        self.keep, self.move = held
        return energy.detach()


def _logits(out: Any) -> Any:
    """What a model returned; its logits where that is a mapping, as it is of Hugging Face's models."""
    return out["logits"] if isinstance(out, Mapping) and "logits" in out else out


def _ones(energy: Tensor) -> Tensor:
    """The gradient of the summed energy in each sample's, made of nothing that a graph would have to keep for it."""
    return torch.full(energy.shape, 1.0, dtype=energy.dtype, device=energy.device)


def output_family(given: Distribution | None, own: Distribution | None, target: Tensor) -> Distribution:
    """The family of the clamped output: the one given; Categorical for labels; the output node's own; Gaussian(1)."""
    if given is not None:
        return given
    own = Gaussian(1.0) if own is None else own
    return own if target.is_floating_point() or isinstance(own, Categorical) else Categorical()


class RandomState:
    """The state of the generators that a model on a device draws from, as they are when this is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = None
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():  # a CUDA graph draws nothing
            self.cuda = torch.cuda.get_rng_state(device)

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


_leaves_graphs = False


def leave_graphs() -> None:
    """Have torch.compile, where it is in use, leave its graphs for a pass of inference, and where a layer visits one.

    Not by decorators, which import torch's compiler: `import pc_triton` is to be quick.
    """
    global _leaves_graphs
    if _leaves_graphs or "torch._dynamo" not in sys.modules:
        return
    _leaves_graphs = True
    from . import distributions
    from .head import Head
    from .nn import Attention, Linear, MultiheadAttention

    layers = [(layer, "_visit") for layer in (Distribution, Linear, Attention, MultiheadAttention, Head)]
    for owner, name in ((Inference, "forward"), (distributions, "_add_energy"), *layers):
        setattr(owner, name, torch.compiler.disable(getattr(owner, name)))


@contextlib.contextmanager
def hold_weights(weights: list[nn.Parameter]) -> Iterator[None]:
    """Within it these require no gradient: a compiled backward computes all that its forward saw required.

    Not for parameters that FSDP2 shards: what it gathers would keep that for good.
    """
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@contextlib.contextmanager
def hold_gathered(module: nn.Module) -> Iterator[None]:
    """Within it a backward pass leaves parameters that FSDP2 shards gathered: they do not change until learning.

    After it the next backward pass, learning's, shards them again.
    """
    sharded = sharded_modules(module)
    for m in sharded:
        m.set_reshard_after_backward(False, recurse=False)  # type: ignore[operator]
    try:
        yield
    finally:
        for m in sharded:
            m.set_reshard_after_backward(True, recurse=False)  # type: ignore[operator]


def sharded_modules(module: nn.Module) -> list[nn.Module]:
    """Those in a module that FSDP2's fully_shard was given."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    return [m for m in module.modules() if hasattr(m, "set_reshard_after_backward")]


@contextlib.contextmanager
def hold_statistics(norms: list[_NormBase]) -> Iterator[None]:
    """Within it batch normalisation moves no running statistics: a batch counts once, in its first pass of training."""
    held = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in held:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in held:
            norm.track_running_stats = True


def _is_emission(out: Tensor, emission: Tensor) -> bool:
    """Whether the model returns a node's emission, in its own shape or in another with the elements in their order."""
    same = out.numel() == emission.numel() and out.data_ptr() == emission.data_ptr()
    return out is emission or (same and out.is_contiguous() and emission.is_contiguous())
