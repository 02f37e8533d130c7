"""`FreeEnergy`: the free energy of a model after inference, as a loss whose ``backward()`` is learning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from . import parallel
from .chain import chain_loss
from .distributions import Distribution, Gaussian
from .inference import Inference, hold_gathered, hold_statistics, leave_graphs, sharded_modules
from .report import Report, report

if TYPE_CHECKING:
    from .compiled import CompiledSteps

Order = Literal["error", "sweep", "simultaneous", "incremental"]
StateOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class Settled(NamedTuple):
    """What `FreeEnergy.infer` returns."""

    input: Any
    """The model's input: as given, or where it was free its inferred values, a tensor of x's shape."""
    output: Tensor
    """What the model returns under the inferred states: the logits or parameters, where the output is clamped."""
    free_energy: Tensor
    """F per sample ``[S]`` in nats."""
    states: dict[str, Tensor]
    """What each free node emits, by its name in the model (a module visited again has ``#2`` added)."""


class FreeEnergy(nn.Module):
    """The free energy F of a model of value nodes; its ``backward()`` leaves the learning gradients in ``.grad``.

    F = sum over nodes of pi KL[D(u) || D(mu)] + the energy of the clamped output (Pinchetti et al. 2022, eq. 5, 6), and
    what the model adds by `add_energy`.
    Inference lowers F in the states u, with the weights fixed; learning is one gradient of F in the weights.

        free_energy = pc.FreeEnergy(model)
        loss = free_energy(x, y)       # inference inside
        loss.backward()
        optimizer.step()

    Arguments:
        model: any module with value nodes: `Linear`, `Attention`, a family such as `Categorical` after any
            module, or what `convert` makes. Where torch.compile has it or its blocks already, a pass of an inference
            step in error order is one graph with its Gaussian nodes, after a first pass that is eager; any other node
            breaks the graph. A compiled model infers in one thread at a time.
        output: family of the output, clamped to y. By default Categorical for integer y; else the family of the node
            whose emission the model returns; else Gaussian of variance 1. Such a last node is the output and not free.
        steps: T >= 1, the inference steps, each a forward and a backward pass of the model. The default 3 settles the
            error order; the others need more.
        order: ``"error"``: the free variables are the errors e = u - mu, all moved at once; a step reaches every depth
            (Goemaere et al. 2025, arXiv 2505.20137). The last step is the learning pass: the states move T - 1 times,
            the cost is (2 T + 1) / 3 of backpropagation's products, and T = 1 *is* backpropagation.
            ``"simultaneous"``: all states move from the same old states, as in the paper; at step t the output's error
            has reached the top t nodes, and nothing below is computed backwards. ``"sweep"``: top-down, each node with
            the already moved error of those above. Both cost (2 T + 2) / 3, and 2 / 3 more with "auto".
            ``"incremental"``: the weights move at every step (Salvatori et al. 2024, arXiv 2212.00720); see
            `incremental`.
        precision: pi > 0 of every hidden node, which multiplies its energy (a Gaussian's variance is 1 / pi); or
            ``"auto"``: set per node and sample from the displacement, Gaussian errors in units of the node's root mean
            square.
        displacement: with "auto", delta, the fraction of F that inference may explain away, each node the same part
            of it: 0 < delta < 1.
        step: 0 < step <= 1 in natural-gradient units (see ``reference.py``), for every move. None: it begins at 0.25
            for error, 0.5 for sweep, 0.2 else, and each later move but those of "incremental" is guarded: per sample,
            it first takes back a move that raised F and adapts the step, in error order by the parabola through F.
        state_optimizer: None for the plain step, or a function that makes a ``torch.optim`` optimiser of the list of
            states, as in ``lambda states: torch.optim.SGD(states, lr=0.5, momentum=0.3)``; it is given the natural
            gradient, of which lr = 1 is Newton's step. Adam's moves have the size of its lr, in units of the states: it
            goes with a precision that you set. Not for "sweep" and "incremental", which move within the backward pass.
        state_dtype: what the states are kept in between the passes. None or ``torch.float32``: float32, and float64 in
            a float64 model. ``torch.bfloat16``: half the memory, and fewer bytes in every inference step; arithmetic
            stays as it is, each move is rounded. For order "error" alone, whose errors are small beside u; a chain of
            small layers that runs in one launch keeps its states on the chip, in float32 whatever this says.

    Several processes: ``DistributedDataParallel(FreeEnergy(model))`` averages the gradients once a training step;
    order "incremental" has no single call to wrap, and takes ``FreeEnergy(DistributedDataParallel(model))``. FSDP2's
    ``fully_shard`` goes to the model, before FreeEnergy; see ``docs/large_runs.md``.

    Raises:
        ValueError: an argument out of range, a model without value nodes, or one in DistributedDataParallel already.
    """

    def __init__(
        self,
        model: nn.Module,
        output: Distribution | None = None,
        *,
        steps: int = 3,
        order: Order = "error",
        precision: float | Literal["auto"] = "auto",
        displacement: float = 0.003,
        step: float | None = None,
        state_optimizer: StateOptimizer | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}: the number of inference steps is a whole number of at least 1")
        if order not in get_args(Order):
            raise ValueError(f"order={order!r}: choose one of {', '.join(get_args(Order))}")
        if precision != "auto" and not (_is_number(precision) and 0 < precision < math.inf):
            raise ValueError(f"precision={precision!r}: give a positive finite number, or 'auto'")
        if not (_is_number(displacement) and 0 < displacement < 1):
            raise ValueError(f"displacement={displacement!r}: a fraction of the free energy, between 0 and 1")
        if step is not None and not (_is_number(step) and 0 < step <= 1):
            raise ValueError(f"step={step!r}: between 0 and 1 (1 is Newton's step of an isolated node)")
        if state_optimizer is not None and order in ("sweep", "incremental"):
            raise ValueError(f"order={order!r} moves its states within the backward pass: leave state_optimizer=None")
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype={state_dtype!r}: give torch.float32, torch.bfloat16 or None")
        if state_dtype == torch.bfloat16 and order != "error":
            raise ValueError(
                f"state_dtype=torch.bfloat16 with order={order!r}, whose states are u: rounded, they lose the small "
                "u - mu; use order='error', or float32 states"
            )
        if state_dtype == torch.bfloat16 and state_optimizer is not None:
            raise ValueError(
                "state_dtype=torch.bfloat16 with a state_optimizer, which would do its arithmetic in it: leave "
                "state_optimizer=None, or use float32 states"
            )
        if output is not None and not isinstance(output, Distribution):
            raise ValueError(f"output={output!r}: give a pc_triton Distribution, for example pc_triton.Categorical()")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}: give a module (torch.nn.Module)")
        if isinstance(model, nn.parallel.DistributedDataParallel):  # static_graph would not average the gradients
            if order != "incremental":
                raise ValueError(
                    "the model is in DistributedDataParallel: write DistributedDataParallel(FreeEnergy(model)), by "
                    "which all of inference is one call of it"
                )
            if model.static_graph or model.find_unused_parameters:
                raise ValueError(
                    "order='incremental' takes the model in DistributedDataParallel without static_graph and "
                    "find_unused_parameters: leave both False"
                )
        self._names = {
            module: name.replace("_orig_mod.", "")  # as torch.compile calls what it wraps
            for name, module in model.named_modules()
            if isinstance(module, Distribution)
        }
        if not self._names:
            raise ValueError("the model has no value node: use pc.Linear or pc.Gaussian() in it, or pc.convert(model)")
        leave_graphs()
        self.traced = any("_orig_mod" in name or module._compiled_call_impl for name, module in model.named_modules())
        self.norms = [m for m in model.modules() if isinstance(m, _NormBase)]
        self.model, self.output, self.input_node = model, output, Gaussian()
        self._names[self.input_node] = "input"
        self.steps, self.order, self.precision, self.displacement = steps, order, precision, displacement
        self.adaptive = step is None
        self.step = {"error": 0.25, "sweep": 0.5}.get(order, 0.2) if step is None else step
        self.state_optimizer = state_optimizer
        self.state_dtype = None if state_dtype == torch.float32 else state_dtype  # None: that of the arithmetic
        self._compiled: CompiledSteps | None = None
        self._traced_model: Callable[..., Any] | None = None

    @property
    def moves(self) -> int:
        """How often the states move before the learning pass, which in error order is the last of the T steps."""
        return self.steps - 1 if self.order == "error" else self.steps

    @property
    def calibrates(self) -> bool:
        """Whether inference begins with a backward pass at the prediction."""
        return self.order == "error" or self.precision == "auto"

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the model or a part of it."""
        return len(sharded_modules(self.model)) > 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model, as inference calls it."""
        if self._traced_model is None:
            return self.model(*args, **kwargs)
        return self._traced_model(self.model, *args, **kwargs)

    def compile_model(self, backend: Any = "inductor") -> None:
        """Give the model to torch.compile in inference alone, unless its user has done so already."""
        if not self.traced:
            own = FunctionType(
                _call.__code__.replace(), globals()
            )  # torch.compile counts recompilations by code object
            self.traced, self._traced_model = True, torch.compile(own, backend=backend)

    def name_of(self, module: Distribution) -> str:
        """The name of a value node in the model: its module's, without the ``.node`` of a layer."""
        return self._names.get(module, "").removesuffix(".node") or "node"

    def extra_repr(self) -> str:
        displacement = f", displacement={self.displacement}" if self.precision == "auto" else ""
        states = "" if self.state_dtype is None else f", state_dtype={self.state_dtype}"
        shown = f"steps={self.steps}, order={self.order!r}, precision={self.precision!r}{displacement}"
        return f"{shown}, step={self.step}{states}"

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        """Infer, and return the free energy per item: a scalar, in nats per label or, for other outputs, per sample.

        x: the model's input ``[S, ...]`` with S samples, or a tuple or dict of its arguments. y: what the output is
        clamped to: labels int64 (the shape of the output without its last axis) or values of the output's shape.
        None leaves the output free, and then nothing moves (but by an energy that the model adds).

        The value is that of the learning pass: the energy at the states at which the weight gradients are taken.

        Raises ValueError for an empty batch, a wrong shape or device, a label out of range, NaN or infinity in x or y
        (values are checked on a GPU by a device-side assertion, so as not to wait for it), RuntimeError for a model
        whose forward takes another path at the second step.
        """
        if self.order == "incremental":
            raise ValueError("order='incremental': use `for loss in free_energy.incremental(x, y)`")
        with torch.inference_mode(False), torch.enable_grad():  # inference is made of gradients, in evaluation too
            loss = chain_loss(self, x, y)
            if loss is None:
                loss = self._compiled(x, y) if self._compiled is not None else self.loss_and_inference(x, y)[0]
        return loss if torch.is_grad_enabled() else loss.detach()

    def loss_and_inference(self, x: Any, y: Tensor | None) -> tuple[Tensor, Inference]:
        """The loss of a call, and the inference behind it; arguments and errors as in a call."""
        inference = Inference(self, x, y)
        if self.moves == 0:
            return self._per_item(inference, inference.forward("first", learns=True)), inference
        with hold_gathered(self):
            self.settle(inference, self.moves)
        return self._per_item(inference, inference.learn()), inference

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Make the whole training step, all of inference and the weight gradients, one graph; for small models.

        As ``nn.Module.compile`` it works in place: call it once, and train as before. Small models spend most of a step
        in Python, autograd and launches, and this removes it: on a CPU the graph is compiled by ``torch.compile``'s
        inductor (which needs a C++ compiler), on a GPU the model is, and the step is one CUDA graph. It is made at the
        first batch of each shape, and serves while parameters keep their shapes, ``requires_grad`` and, on a GPU, their
        place in memory (as optimisers that work in place leave it). options: inductor's on a CPU, such as
        ``{"max_autotune": True}``.

        The model's forward must not depend on the values of its inputs. Raises ValueError here for
        ``order="incremental"``, a state_optimizer or a model that FSDP2 shards, at the first batch for dropout or, on a
        GPU, any random numbers.
        """
        if self.order == "incremental" or self.state_optimizer is not None:
            raise ValueError("compile() needs order error, sweep or simultaneous, and state_optimizer=None")
        if self.sharded:
            raise ValueError(
                "compile() needs whole parameters: give a model that FSDP2 shards to torch.compile instead"
            )
        from .compiled import CompiledSteps  # brings in much of torch that nothing else needs

        self._compiled = CompiledSteps(self, options)

    def incremental(self, x: Any, y: Tensor | None = None) -> Iterator[Tensor]:
        """Incremental PC: yields the free energy per item at each of the T steps, for you to move the weights.

            for loss in free_energy.incremental(x, y):
                optimizer.zero_grad(); loss.backward(); optimizer.step()

        ``backward()`` leaves the local weight gradients and moves the states, from the same old states (Salvatori et
        al. 2024, arXiv 2212.00720, algorithm 1). Arguments and errors as in a call. Raises ValueError unless
        ``order="incremental"``.
        """
        if self.order != "incremental":
            raise ValueError(f"order={self.order!r}: make FreeEnergy(model, order='incremental')")
        inference = Inference(self, x, y)
        energy = inference.forward("first", learns=not self.calibrates)
        if self.calibrates:
            inference.calibrate(energy)
            del energy  # as in `settle`
            energy = inference.forward("incremental", learns=True)
        for step in range(self.steps):
            inference.mode = "incremental"
            yield self._per_item(inference, energy)
            if step + 1 < self.steps:
                energy = inference.forward("incremental", learns=True)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def infer(self, x: Any, y: Tensor | None = None, *, clamp_input: bool = True) -> Settled:
        """Inference alone: T moves of every state (in error order one more than before learning), no learning.

        x, y: as in a call. ``clamp_input=False`` frees the input: x is then the prediction of a Gaussian input node,
        and is inferred from y together with the hidden states. With y None too, the model generates from x: the states
        stay at their predictions (GaussianLogVar nodes at a sample).
        Raises ValueError as a call does, and where a free input is no floating-point tensor.
        """
        if not clamp_input and not (isinstance(x, Tensor) and x.is_floating_point()):
            raise ValueError("clamp_input=False: a free input must be one floating-point tensor; embed tokens first")
        inference = Inference(self, x, y, clamp_input=clamp_input)
        inference.shows_output = True
        inference.remembers = inference.guarded
        with hold_statistics(self.norms):
            self.settle(inference, self.steps)
            energy = inference.probe()
            if inference.guarded:  # the last move too must not have raised F
                rose = inference.take_back(energy)
                if rose or parallel.together():  # all processes make the same passes
                    energy = inference.probe()
        states = {name: node.emission.detach() for name, node in inference.named_nodes().items()}
        return Settled(x if clamp_input else states["input"], inference.out.detach(), energy, states)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def report(self, x: Any, y: Tensor) -> Report:
        """Where inference stands on one batch: energy and residual per value node, and the regime. Trains nothing.

        x, y: as in a call. It compares the T steps with a long run of the same inference, and the weight gradient with
        backpropagation's; it costs some 65 inference steps. See `Report`; print it for a table.
        Raises ValueError as a call does.
        """
        with hold_statistics(self.norms):
            return report(self, x, y)

    def settle(self, inference: Inference, moves: int) -> None:
        """Move every state ``moves`` times from the prediction."""
        first = inference.forward("first")
        if self.calibrates:
            inference.calibrate(first)
            if self.order == "error" and self.state_optimizer is None:
                moves -= 1
            energy = None
        else:
            energy = first
        del first  # calibration leaves the graph below the first node
        for _ in range(moves):
            inference.infer(energy)
            energy = None

    @staticmethod
    def _per_item(inference: Inference, energy: Tensor) -> Tensor:
        items = inference.items if inference.target is not None else inference.samples
        return energy.sum() / (items.clamp_min(1) if isinstance(items, Tensor) else items)


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
