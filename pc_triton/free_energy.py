"""`FreeEnergy`: the free energy of a model after inference, as a loss whose ``backward()`` is learning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import orders
from .batch import Batch
from .chain import chain_loss
from .checks import check_free_input, check_model, check_options
from .context import outside_graphs, prepare_compiler
from .distributions import Distribution
from .families import Gaussian
from .infer import Settled, infer
from .orders import Order, Start, as_order
from .plumbing import Calls, hold_gathered, sharded_modules
from .report import NodeStep, Report, look, report
from .rules import Constant, Guarded, Precision, Rules, StateOptimizer, as_precision, as_step, as_stop
from .tracking import StepTracker, Tracked

OrderName = Literal["error", "sweep", "simultaneous", "incremental"]


class FreeEnergy(nn.Module):
    """The free energy F of a model of value nodes; its ``backward()`` leaves the learning gradients in ``.grad``.

    F = sum over nodes of pi KL[D(u) || D(mu)] + the energy of the clamped output (Pinchetti et al. 2022, eq. 5, 6), and
    what the model adds by `add_energy`.
    Inference lowers F in the states u, with the weights fixed; learning is one gradient of F in the weights::

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
        steps: T >= 1, the inference steps, each a forward and a backward pass of the model. None: 2 in error order,
            which two steps settle, and 3 in the others, which often need more.
        order: ``"error"``: the free variables are the errors e = u - mu, all moved at once; a step reaches every depth
            (Goemaere et al. 2025, arXiv 2505.20137). The last step is the learning pass: the states move T - 1 times,
            the cost is (2 T + 1) / 3 of backpropagation's products, and T = 1 *is* backpropagation.
            ``"simultaneous"``: all states move from the same old states, as in the paper; at step t the output's error
            has reached the top t nodes, and nothing below is computed backwards. ``"sweep"``: top-down, each node with
            the already moved error of those above. Both cost (2 T + 2) / 3, and 2 / 3 more with "auto".
            ``"incremental"``: the weights move at every step (Salvatori et al. 2024, arXiv 2212.00720); see
            `incremental`. Or an order of your own: a function settle(batch, rules, moves, start) that settles states
            u, or an `Order` of it.
        precision: pi > 0 of every hidden node, which multiplies its energy (a Gaussian's variance is 1 / pi); or
            ``"auto"``: set per node and sample from the displacement, Gaussian errors in units of the node's root mean
            square. They are short for `Fixed` and `Displacement`. Or any function (node, squared, free_energy, nodes)
            to pi ``[S]``, as in `rules.Precision`.
        displacement: with "auto", delta, the fraction of F that inference may explain away, each node the same part
            of it: 0 < delta < 1.
        step: 0 < step <= 1 in natural-gradient units (see ``reference.py``), for every move. None: it begins at 0.25
            for error, 0.5 for sweep, 0.2 else, and each later move but those of "incremental" is guarded: per sample,
            it first takes back a move that raised F and adapts the step, in error order by the parabola through F.
            With T = 2 in error order there is one move, and its step is learnt from batch to batch in training
            (`Tracked`); a first batch costs one forward pass more. Numbers are short for `Constant`, None for
            `Tracked` or `Guarded`; or give a rule derived from `Constant`.
        state_optimizer: None for the plain step, or a function that makes a ``torch.optim`` optimiser of the list of
            states, as in ``lambda states: torch.optim.SGD(states, lr=0.5, momentum=0.3)``; it is given the natural
            gradient, of which lr = 1 is Newton's step. Adam's moves have the size of its lr, in units of the states: it
            goes with a precision that you set. Not for "sweep" and "incremental", which move within the backward pass.
            Where it draws random numbers it gets new ones at every step; those of the model stay the same in a batch.
        state_dtype: what the states are kept in between the passes. None or ``torch.float32``: float32, and float64 in
            a float64 model. ``torch.bfloat16``: half the memory, and fewer bytes in every inference step; arithmetic
            stays as it is, each move is rounded. For order "error" alone, whose errors are small beside u; a chain of
            small layers that runs in one launch keeps its states on the chip, in float32 whatever this says.
        inference_dtype: of the products in passes that move states and do not learn. None: as in the learning pass.
            ``torch.float8_e4m3fn``: 8 bits, gradients in ``float8_e5m2``, for ``F.linear`` with parameters and sizes
            that are multiples of 16. GPUs of compute capability 8.9 and above multiply them at twice the rate;
            elsewhere they are emulated, at a cost. `infer` and what is reported keep their digits. The one step of
            T = 2 is then 1, and not learnt. For order "error" alone, whose errors are those of the learning pass too.
        output_weight: a factor on the energy of the clamped output, and so on the loss. A small one nudges the states
            towards y, a negative one away from it.
        stop: ends inference before its T steps. A number: once the last move changed F by at most that fraction of it,
            in every sample (`Tolerance`). Or a function of the list of F ``[S]`` before the first move and after each
            so far, that returns True to stop. The weights learn at the states reached.
        local: True: each node's weights learn from its own energy alone, with the states u held (E_local of Goemaere et
            al. 2025). The state orders always do. False: the error order learns by the total derivative of F with the
            errors e held, which is equal to that only where inference is settled.
        logits: the tensor that y clamps, as a function of what the model returns: ``lambda out: out[0]`` for a tuple.
            None: the tensor that it returns, or the ``logits`` of a mapping or a dataclass.

    Several processes: ``DistributedDataParallel(FreeEnergy(model))`` averages the gradients once a training step;
    order "incremental" has no single call to wrap, and takes ``FreeEnergy(DistributedDataParallel(model))``. FSDP2's
    ``fully_shard`` goes to the model, before FreeEnergy; see ``docs/large_runs.md``.

    Raises:
        ValueError: an argument out of range, a model without value nodes, or one in DistributedDataParallel already.
    """

    __call__: Callable[..., Tensor]  # to type checkers; in torch it gives Any

    def __init__(
        self,
        model: nn.Module,
        output: Distribution | None = None,
        *,
        steps: int | None = None,
        order: OrderName | Order | Callable[..., Constant] = "error",
        precision: float | Literal["auto"] | Precision = "auto",
        displacement: float = 0.003,
        step: float | Constant | None = None,
        state_optimizer: StateOptimizer | None = None,
        state_dtype: torch.dtype | None = None,
        inference_dtype: torch.dtype | None = None,
        output_weight: float = 1.0,
        stop: float | Callable[[Sequence[Tensor]], bool] | None = None,
        local: bool = False,
        logits: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._names = check_model(model, order)
        self.model, self.output, self.input_node = model, output, Gaussian()
        self._names[self.input_node] = "input"
        self.tracker = StepTracker()
        self._ddp_params_and_buffers_to_ignore = ["tracker.mean"]  # DistributedDataParallel would send it every step
        self.order, self.precision, self.displacement = order, precision, displacement
        self._steps, self._step = steps, step  # None: those of the order
        self.state_optimizer = state_optimizer
        self.state_dtype, self.inference_dtype = state_dtype, inference_dtype
        self.output_weight, self.stop, self.local, self.logits = output_weight, stop, local, logits
        _ = self.rules  # refuses what is out of range
        prepare_compiler()
        self._calls = Calls(model)
        self._compiled: Callable[..., Tensor] | None = None

    @property
    def steps(self) -> int:
        """T: what was given, or the order's own."""
        return as_order(self.order).steps if self._steps is None else self._steps

    @steps.setter
    def steps(self, steps: int | None) -> None:
        self._steps = steps

    @property
    def step(self) -> float | Constant:
        """The step, of the first move where it adapts: what was given, or the order's own."""
        return as_order(self.order).step if self._step is None else self._step

    @step.setter
    def step(self, step: float | Constant | None) -> None:
        self._step = step

    @property
    def rules(self) -> Rules:
        """The rules of inference as objects: what the arguments say, or what was set since. Raises ValueError."""
        order, optimizes = as_order(self.order), self.state_optimizer is not None
        if not (self.output is None or isinstance(self.output, Distribution)):
            raise ValueError(
                f"output={self.output!r}: give a pc_triton Distribution, for example pc_triton.Categorical()"
            )
        state_dtype = None if self.state_dtype == torch.float32 else self.state_dtype  # None: that of the arithmetic
        dtypes = state_dtype, self.inference_dtype
        check_options(self.steps, self.order, order.form, optimizes, *dtypes, self.output_weight)
        step = as_step(self.step)
        if self._step is None and not optimizes:
            only = order.form == "error" and self.steps == 2  # its one move is corrected by none
            step = self.tracker.rule(order.step, dtypes[1] is not None) if only else Guarded(order.step)
        return Rules(
            as_precision(self.precision, self.displacement),
            step,
            self.state_optimizer,
            *dtypes,
            as_stop(self.stop),
            remembers=order.form == "state" or self.steps > 3,
        )

    @property
    def settings(self) -> tuple[Any, ...]:
        """All that a training step follows from, but for the model and the batch."""
        return (
            self.steps, self.order, self.precision, self.displacement, self._step, self.state_optimizer,
            self.state_dtype, self.inference_dtype, self.output_weight, self.stop, self.local, self.logits,
            self.tracker.begun,
        )  # fmt: skip

    @property
    def moves(self) -> int:
        """How often the states move before the learning pass, which in error order is the last of the T steps."""
        return as_order(self.order).moves(self.steps)

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the model or a part of it."""
        return len(sharded_modules(self.model)) > 0

    def compile_model(self, backend: Any = "inductor") -> None:
        """Give the model to torch.compile in inference alone, unless its user has done so already."""
        self._calls.compile(backend)

    def batch(self, x: Any, y: Tensor | None, *, form: str | None = None, **options: Any) -> Batch:
        """A batch of this model, with its nodes still to be made; arguments and errors as in a call.

        form: what its states hold, if not what the order says. options: those of `Batch`.
        """
        return Batch(
            self.model, self._calls, self._names, x, y,
            form=form or as_order(self.order).form, output=self.output, output_weight=self.output_weight,
            logits=self.logits, **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        displacement = f", displacement={self.displacement}" if self.precision == "auto" else ""
        states = "" if self.state_dtype is None else f", state_dtype={self.state_dtype}"
        shown = f"steps={self.steps}, order={self.order!r}, precision={self.precision!r}{displacement}"
        return f"{shown}, step={self.step}{states}"

    def forward(
        self, x: Any, y: Tensor | None = None, *, mask: Tensor | None = None, start: Start | None = None
    ) -> Tensor:
        """Infer, and return the free energy per item: a scalar, in nats per label or, for other outputs, per sample.

        x: the model's input ``[S, ...]`` with S samples, or a tuple or dict of its arguments. y: what the output is
        clamped to: labels int64 (the shape of the output without its last axis) or values of the output's shape.
        None leaves the output free; then nothing moves, unless the model adds an energy of its own.
        mask: bool, y's shape, True where the output is clamped; what y holds elsewhere is not read.
        start: where the states start, if not at the forward pass: states u by the names of their nodes, as in
        ``{"blocks.0.up": u}``, or a function that is given the predictions by name and returns such states.

        The value is that of the learning pass: the energy at the states at which the weight gradients are taken.

        Raises ValueError for an empty batch, a wrong shape or device, a label out of range, NaN or infinity in x or y
        (values are checked on a GPU by a device-side assertion, so as not to wait for it), RuntimeError for a model
        whose forward takes another path at the second step.
        """
        if self.order == "incremental":
            raise ValueError("order='incremental': use `for loss in free_energy.incremental(x, y)`")
        loss = outside_graphs(self._loss, x, y, mask, start)
        return loss if torch.is_grad_enabled() else loss.detach()

    def _loss(self, x: Any, y: Tensor | None, mask: Tensor | None, start: Start | None) -> Tensor:
        tracks = self.training and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():  # inference is made of gradients, in evaluation too
            if mask is not None or start is not None:
                return self.loss_and_batch(x, y, mask, start, tracks=tracks)[0]
            loss = chain_loss(self, x, y, tracks)
            if loss is None and self._compiled is not None:
                self._check_compiles()  # a rule may have been set since
                loss = self._compiled(x, y, tracks)
            return self.loss_and_batch(x, y, tracks=tracks)[0] if loss is None else loss

    def loss_and_batch(
        self, x: Any, y: Tensor | None, mask: Tensor | None = None, start: Start | None = None, tracks: bool = False
    ) -> tuple[Tensor, Batch]:
        """The loss of a call, and the batch behind it with its states; arguments and errors as in a call.

        tracks: whether the batches that follow learn their step from this one.
        """
        batch, rules = self.batch(x, y, mask=mask), self.rules  # which are refused before anything moves
        if self.moves == 0 and start is None and not self.local:
            return batch.per_item(batch.at_prediction(learns=True, fuses=True)), batch
        with hold_gathered(self):
            steps = self.settle(batch, self.moves, start, rules)
        energy = batch.learn(local=self.local)
        if tracks and isinstance(steps, Tracked):
            self.tracker.shared |= self.sharded
            self.tracker.learn(steps, energy.detach())
        return batch.per_item(energy), batch

    def settle(self, batch: Batch, moves: int, start: Start | None = None, rules: Rules | None = None) -> Constant:
        """Move every state of a batch ``moves`` times from the prediction, or from ``start``. Returns the step rule."""
        rules = self.rules if rules is None else rules
        with batch.in_digits_of(rules.inference_dtype):
            steps = as_order(self.order).settle(batch, rules, moves, start)
        if not isinstance(steps, Constant):  # such as a generator's, which has moved nothing
            raise TypeError(f"order={self.order!r} returned {type(steps).__name__}: it must return the step rule")
        if moves > 0:
            batch.warn_if_none_is_free()
        return steps

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Make the whole training step, all of inference and the weight gradients, one graph; for small models.

        As ``nn.Module.compile`` it works in place: call it once, and train as before. Small models spend most of a step
        in Python, autograd and launches, and this removes it: on a CPU the graph is compiled by ``torch.compile``'s
        inductor (which needs a C++ compiler), on a GPU the model is, and the step is one CUDA graph. It is made at the
        first batch of each shape, and serves while parameters keep their shapes, ``requires_grad`` and, on a GPU, their
        place in memory (as optimisers that work in place leave it). options: inductor's on a CPU, such as
        ``{"max_autotune": True}``.

        The model's forward must not depend on the values of its inputs. Give a rule's new values by a new object: a
        rule that is changed in place is not looked at again. A call with ``mask`` or ``start`` is computed
        as before, without the graph. Raises ValueError here for ``order="incremental"``, a state_optimizer or a model
        that FSDP2 shards, at the first batch for dropout or, on a GPU, any random numbers.
        """
        self._check_compiles()
        if self.sharded:
            raise ValueError("compile() needs whole parameters: give a model that FSDP2 shards to torch.compile")
        from .compiled import CompiledSteps  # brings in much of torch that nothing else needs

        self._compiled = CompiledSteps(self, options)

    def _check_compiles(self) -> None:
        if self.order == "incremental" or self.state_optimizer is not None or self.stop is not None:
            raise ValueError("compile() needs order error, sweep or simultaneous, state_optimizer=None and stop=None")

    def incremental(
        self, x: Any, y: Tensor | None = None, *, mask: Tensor | None = None, start: Start | None = None
    ) -> Iterator[Tensor]:
        """Incremental PC: yields the free energy per item at each of the T steps, for you to move the weights::

            for loss in free_energy.incremental(x, y):
                optimizer.zero_grad(); loss.backward(); optimizer.step()

        ``backward()`` leaves the local weight gradients and moves the states, from the same old states (Salvatori et
        al. 2024, arXiv 2212.00720, algorithm 1). Arguments and errors as in a call. Raises ValueError unless
        ``order="incremental"``.
        """
        if self.order != "incremental":
            raise ValueError(f"order={self.order!r}: make FreeEnergy(model, order='incremental')")
        batch = self.batch(x, y, mask=mask)
        for energy in orders.incremental(batch, self.rules, self.steps, start):
            batch.warn_if_none_is_free()
            yield batch.per_item(energy)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def infer(
        self,
        x: Any,
        y: Tensor | None = None,
        *,
        clamp_input: bool | Tensor = True,
        mask: Tensor | None = None,
        start: Start | None = None,
        watch: Callable[[Batch], None] | None = None,
    ) -> Settled:
        """Inference alone: T moves of every state (in error order one more than before learning), no learning.

        x, y, mask, start: as in a call. ``clamp_input=False`` frees the input: x is then the prediction of a Gaussian
        input node, of variance 1 where the precision is "auto", and is inferred from y together with the hidden states.
        A bool tensor of x's shape frees it where it is False. With y None too, the model generates from x: the states
        stay at their predictions (GaussianLogVar nodes at a sample). watch: called with the `Batch` before every move
        and after the last, as `record` does.
        Raises ValueError as a call does, and where a free input is no floating-point tensor.
        """
        if clamp_input is not True:
            check_free_input(x, clamp_input)
        batch = self.batch(x, y, mask=mask, input_node=self.input_node, clamp_input=clamp_input, shows=True)
        batch.watch = watch
        rules = dataclasses.replace(self.rules, remembers=True, inference_dtype=None)
        with self._calls.held():
            return infer(batch, lambda: self.settle(batch, self.steps, start, rules))

    def record(self, x: Any, y: Tensor | None = None, **options: Any) -> list[dict[str, NodeStep]]:
        """Energy and residual of every node as inference goes: before each of the T moves, and after the last.

        Arguments and errors as in `infer`. Element t of the list has a `NodeStep` for each node that reaches the
        output, by its name; there are T + 1, or fewer where ``stop`` ended inference. It costs two passes a step. The
        guard's last look, by which `infer` takes back a move that raised F, comes after the record.
        """
        steps: list[dict[str, NodeStep]] = []
        self.infer(x, y, watch=lambda batch: steps.append(look(batch)), **options)
        return steps

    @torch.inference_mode(False)
    @torch.enable_grad()
    def report(self, x: Any, y: Tensor, tick: Callable[[], Any] = lambda: None) -> Report:
        """Where inference stands on one batch: energy and residual per value node, and the regime. Trains nothing.

        x, y: as in a call. It compares the T steps with a long run of the same inference, and the weight gradient with
        backpropagation's; it costs some 65 inference steps. See `Report`; print it. tick: called at each, for a bar.
        Raises ValueError as a call does.
        """
        if self.sharded:
            raise ValueError(
                "the report needs whole gradients, and FSDP2 shards this model: report on an unsharded copy"
            )
        with self._calls.held():
            return report(
                make=partial(self.batch, x, y),
                settle=lambda batch: self.settle(batch, self.moves),
                loss=lambda: self._first_loss(x, y),
                rules=self.rules,
                moves=self.moves,
                parameters=[p for p in self.model.parameters() if p.requires_grad],
                tick=tick,
            )

    def _first_loss(self, x: Any, y: Tensor | None) -> Tensor:
        return next(self.incremental(x, y)) if self.order == "incremental" else self.loss_and_batch(x, y)[0]
