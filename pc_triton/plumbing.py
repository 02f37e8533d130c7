"""What a training step has to hold still around the mathematics: random numbers, batch statistics, weights, FSDP2."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


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
        self.run: Callable[..., Any] = _call
        self.said: set[str] = set()

    def say(self, warning: str) -> None:
        """Warn of what cannot be known to be wrong, once."""
        if warning not in self.said:
            self.said.add(warning)
            warnings.warn(warning, stacklevel=2)

    def compile(self, backend: Any = "inductor") -> None:
        """Give the model to torch.compile, unless its user has done so already."""
        if not self.compiled:
            self.compiled, self.run = True, torch.compile(_call, backend=backend)

    def eager(self) -> AbstractContextManager[Any]:
        """Within it the model is eager: in the first pass, since to make nodes would break every graph."""
        return torch.compiler.set_stance("force_eager")

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Within it the compiled model draws the random numbers of the first pass, whose draws were eager."""
        with torch._inductor.config.patch(fallback_random=True), torch._dynamo.config.patch(recompile_limit=MODELS):
            yield


def refuse_second_derivative(grad: Tensor) -> None:
    """A hook on a loss whose states were inferred: its gradient has no derivative, and a wrong one would be silent."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: the free energy has no second derivative, since its graph does not hold how the "
            "inferred states depend on the weights. FreeEnergy(model, steps=1), which is backpropagation, has one"
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


MODELS = 64
"""How many models one process may compile: they share one function, and torch.compile counts its recompilations."""


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def ones(energy: Tensor) -> Tensor:
    """The gradient of the summed energy in each sample's, made of nothing that a graph would have to keep for it."""
    return torch.full(energy.shape, 1.0, dtype=energy.dtype, device=energy.device)
