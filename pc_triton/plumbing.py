"""What a training step has to hold still around the mathematics: random numbers, batch statistics, weights, FSDP2."""

from __future__ import annotations

import contextlib
import functools
import pickle
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .errors import see


class RandomState:
    """The state of the generators that a model on a device draws from, as they are when this is made.

    elsewhere: a model, whose own generators are then among them, with Python's and NumPy's. They take longer to look at
    than a small layer does.
    """

    def __init__(self, device: torch.device, elsewhere: nn.Module | None = None) -> None:
        self.device = device
        self.elsewhere = [] if elsewhere is None else [(*g, g[0]()) for g in _generators_elsewhere(elsewhere)]
        self.cpu = torch.get_rng_state()
        self.cuda = None
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():  # a CUDA graph draws nothing
            self.cuda = torch.cuda.get_rng_state(device)

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        for _, set_state, state in self.elsewhere:
            set_state(state)

    def moved_elsewhere(self) -> bool:
        """Whether a generator that is not torch's default has been drawn from since."""
        return any(pickle.dumps(get_state()) != pickle.dumps(state) for get_state, _, state in self.elsewhere)


Generator = tuple[Callable[[], Any], Callable[[Any], object]]
"""How to get the state of a generator, and to set it."""


def _generators_elsewhere(model: nn.Module) -> list[Generator]:
    """Python's generator, NumPy's where that is in use, and those that are attributes of the model's modules."""
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    found: list[Generator] = [(random.getstate, random.setstate)]
    if numpy is not None:
        found.append((numpy.get_state, numpy.set_state))
    for g in {id(g): g for module in model.modules() for g in vars(module).values()}.values():
        if isinstance(g, random.Random) and not isinstance(g, random.SystemRandom):  # which has no state
            found.append((g.getstate, g.setstate))
        elif isinstance(g, torch.Generator) or (numpy is not None and isinstance(g, numpy.RandomState)):
            found.append((g.get_state, g.set_state))
        elif numpy is not None and isinstance(g, numpy.Generator):
            bits = g.bit_generator
            found.append((functools.partial(getattr, bits, "state"), functools.partial(setattr, bits, "state")))
    return found


@contextlib.contextmanager
def hold_statistics(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Within it batch normalisation moves no running statistics: a batch counts once, in its first pass of training."""
    held = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in held:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in held:
            norm.track_running_stats = True


def statistics_of(norms: Sequence[_NormBase]) -> list[tuple[Tensor, Tensor]]:
    """The running statistics that a training pass will move, each with a copy: a batch that is refused moves none."""
    moving = [norm for norm in norms if norm.training and norm.track_running_stats]
    return [(b, b.clone()) for norm in moving for b in norm.buffers(recurse=False)]


Slot = tuple[nn.Module, str]
"""A module and the name of a buffer in it."""


class Buffers:
    """The buffers of a model, but for batch normalisation's, and which of them its forward changes.

    A running statistic or a counter of the user's own is to move once in a batch, and the forward to be the same
    function in every pass of it. So every pass but the first is given copies of what they were before that.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [m for m in model.modules() if not isinstance(m, _NormBase)]
        self.slots: list[Slot] = [(m, name) for m in modules for name, b in m._buffers.items() if b is not None]
        self.moving: set[Slot] | None = None  # those that were seen to; None before the first pass

    def note(self, everything: bool) -> Noted:
        """What they are now, with copies of those that may move, or of all."""
        copies: dict[int, Tensor] = {}  # one of each: modules may share a buffer
        noted: list[tuple[Slot, Tensor, int, Tensor | None]] = []
        for slot in self.slots:
            b = slot[0]._buffers.get(slot[1])
            if b is None:
                continue
            if id(b) not in copies and (everything or self.moving is None or slot in self.moving):
                copies[id(b)] = b.detach().clone()
            noted.append((slot, b, times_written(b), copies.get(id(b))))
        return Noted(noted)


class Noted:
    """Buffers as they were: each with its slot, its version and perhaps a copy."""

    def __init__(self, noted: list[tuple[Slot, Tensor, int, Tensor | None]]) -> None:
        self.noted = noted

    def moved(self) -> list[tuple[Slot, Tensor]]:
        """Those that have changed since, and what they were: where that was not kept, what they are now."""
        return [
            ((module, name), module._buffers[name].clone() if copy is None else copy)  # type: ignore[union-attr]
            for (module, name), b, version, copy in self.noted
            if module._buffers[name] is not b or times_written(b) != version
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Make them what they were."""
        for (module, name), b, version, copy in self.noted:
            if copy is not None and times_written(b) != version:
                b.copy_(copy)
            module._buffers[name] = b


def times_written(buffer: Tensor) -> int:
    """How often a buffer or a parameter was changed in place."""
    return 0 if buffer.is_inference() else buffer._version


@contextlib.contextmanager
def hold_buffers(held: Sequence[tuple[Slot, Tensor]]) -> Iterator[None]:
    """Within it these buffers are copies of what is given, and after it what they were."""
    before = [module._buffers[name] for (module, name), _ in held]
    copies = {id(value): value.clone() for _, value in held}
    for (module, name), value in held:
        module._buffers[name] = copies[id(value)]
    try:
        yield
    finally:
        for ((module, name), _), buffer in zip(held, before):
            module._buffers[name] = buffer


@contextlib.contextmanager
def hold_weights(weights: Sequence[nn.Parameter]) -> Iterator[None]:
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


class Calls:
    """How inference calls the model: as it is, or by torch.compile.

    Its user may have compiled the model or parts of it; `compile` has inference alone call a compiled one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.compiled = any("_orig_mod" in n or m._compiled_call_impl for n, m in model.named_modules())
        self.norms = [m for m in model.modules() if isinstance(m, _NormBase)]
        self.time_first = {n: m for n, m in model.named_modules() if _takes_time_first(m)}
        self.functions = any(getattr(m, "has_function_node", None) is True for m in model.modules())
        self.buffers = Buffers(model)
        self.batches: Counter[bool] = Counter()
        self.draws_elsewhere = False  # whether its forward was seen to draw from others than torch's default
        self.run: Callable[..., Any] = _call
        self.backend: Any = None  # torch.compile's, where inference alone compiles the model
        self.said: set[str] = set()

    def say(self, warning: str) -> None:
        """Warn of what cannot be known to be wrong, once."""
        if warning not in self.said:
            self.said.add(warning)
            warnings.warn(warning, stacklevel=2)

    def looks_again(self, training: bool) -> bool:
        """Whether to look once more at what the forward changes and draws: at batches 1, 2, 4, 8 and so on."""
        self.batches[training] += 1
        return self.batches[training] & (self.batches[training] - 1) == 0

    def learn(self, moved: Sequence[tuple[Slot, Tensor]], draws_elsewhere: bool) -> None:
        """Take in what a first pass changed, and whether it drew from generators that are not torch's."""
        self.buffers.moving = (self.buffers.moving or set()).union(slot for slot, _ in moved)
        self.draws_elsewhere |= draws_elsewhere

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it passes leave the model's buffers alone, whatever they are."""
        noted = self.buffers.note(everything=True)
        try:
            with hold_statistics(self.norms):
                yield
        finally:
            noted.restore()

    def compile(self, backend: Any = "inductor") -> None:
        """Give the model to torch.compile, unless its user has done so already."""
        if not self.compiled:
            self.compiled, self.backend, self.run = True, backend, torch.compile(_call, backend=backend)

    def eager(self) -> AbstractContextManager[Any]:
        """Within it the model is eager: in the first pass, since to make nodes would break every graph."""
        return torch.compiler.set_stance("force_eager")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "run": None}  # what torch.compile made is compiled again where it is called

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.run = _call if self.backend is None else torch.compile(_call, backend=self.backend)

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Within it the compiled model draws the random numbers of the first pass, whose draws were eager."""
        dynamo = torch._dynamo.config
        limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # that of torch 2.6
        with torch._inductor.config.patch(fallback_random=True), dynamo.patch({limit: MODELS}):
            yield


def refuse_second_derivative(grad: Tensor) -> None:
    """A hook on a loss whose states were inferred: its gradient has no derivative, and a wrong one would be silent."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: the free energy has no second derivative, since its graph does not hold how the "
            "inferred states depend on the weights. FreeEnergy(model, steps=1), which is backpropagation, has one"
            + see("second-derivatives")
        )


def once_differentiable(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The backward of an `autograd.Function` that made its gradients beforehand; what: the refusal of a second one.

    torch's own lets ``create_graph=True`` pass where the gradient that comes in requires none, as that of a loss.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(f"create_graph=True: {what}")
            return backward(ctx, *grads)

        return once

    return decorate


def _takes_time_first(module: nn.Module) -> bool:
    """Whether a module's input is [time, samples, ...]: torch's default, also where `convert` transposes it within."""
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first:
        return True
    return getattr(module, "time_first", None) is True


MODELS = 64
"""How many models one process may compile: they share one function, and torch.compile counts its recompilations."""


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def ones(energy: Tensor) -> Tensor:
    """The gradient of the summed energy in each sample's, made of nothing that a graph would have to keep for it."""
    return torch.full(energy.shape, 1.0, dtype=energy.dtype, device=energy.device)
