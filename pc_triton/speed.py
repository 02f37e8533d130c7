"""How fast a run is: tokens a second, the share of the card's peak, and a trace of a few steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import checkpoint, orders
from .settings import Settings
from .text import InputError

BEFORE, TRACED = 2, 3
"""A trace is of so many training steps, after so many others."""


def products(settings: Settings) -> float:
    """Floating-point operations of the products of a training step for a token, without what is computed twice.

    A forward pass multiplies each weight of the blocks and the head once, and two matrices of the context's length in
    attention. A backward pass for the states or for the weights is as many products again.
    """
    s = settings
    weights = 12 * s.width**2 * s.blocks + s.width * s.vocabulary
    attention = 2 * s.context * s.width * s.blocks  # queries and keys, weights and values; masked pairs count too
    return 2 * (weights + attention) * passes(s)


def passes(settings: Settings) -> int:
    """How many forward passes the products of a training step are worth: 3 in backpropagation."""
    form, steps = orders.as_order(settings.order).form, settings.inference_steps
    if settings.method == "bp":
        return 3
    if form == "error":
        return 2 * steps + 1
    first = 2 if settings.precision == "auto" else 0  # a first backward pass for the precisions
    return first + (3 * steps if settings.order == "incremental" else 2 * steps + 2)


class Clock:
    """Tokens a second of the training steps, while it runs.

    tokens: of a step, in all processes. rate: floating-point operations a second at which all of them would be at their
    peak; None if that is not known.
    """

    def __init__(self, settings: Settings, rate: float | None) -> None:
        self.tokens, self.rate = settings.batch * settings.context, rate
        self.operations = products(settings)
        self.start(0)

    def start(self, step: int) -> None:
        """Count from this step on."""
        self.since, self.step = time.perf_counter(), step

    def read(self, step: int) -> dict[str, float]:
        """``tokens_per_second`` since the start, and where the peak is known ``share_of_peak``."""
        each = (step - self.step) * self.tokens / (time.perf_counter() - self.since)
        return {"tokens_per_second": each} | (
            {} if self.rate is None else {"share_of_peak": each * self.operations / self.rate}
        )


def told(speed: dict[str, float]) -> str:
    """What `Clock.read` returned, in words."""
    share = f", {speed['share_of_peak']:.0%} of the peak" if "share_of_peak" in speed else ""
    return f"{speed['tokens_per_second']:,.0f} tokens/s{share}"


@contextlib.contextmanager
def trace(path: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Within it the yielded function is called after each training step; leaves a trace of a few in the file ``path``.

    steps: how many will be made. Chrome's chrome://tracing and ui.perfetto.dev show the trace. Raises InputError if
    there are too few steps, or the file cannot be written.
    """
    if steps < BEFORE + TRACED:
        raise InputError(f"profile: {steps} steps are left, and a trace needs {BEFORE + TRACED}: give more --steps")
    checkpoint.check_replaceable(path)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=BEFORE - 1, warmup=1, active=TRACED, repeat=1)
    with torch.profiler.profile(
        activities=kinds, schedule=schedule, on_trace_ready=lambda profile: profile.export_chrome_trace(str(path))
    ) as profile:
        yield profile.step
