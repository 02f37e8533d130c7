"""What a training run needs around it: its folder, the tensors to save, a status line and Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .text import InputError


def status(losses: list[float], evaluations: list[dict[str, Any]]) -> str:
    """One line: the mean of the last ten losses, and the numbers of the last evaluation."""
    recent = losses[-10:]
    parts = [f"loss {sum(recent) / len(recent):.3f}"] if recent else []
    if evaluations:
        last = evaluations[-1]
        parts.append(f"held-out perplexity {last['perplexity']:.1f}")
        if "settled" in last:
            parts.append(f"settled {last['settled']:.0%}, cosine {last['cosine']:.4f}")
    return ", ".join(parts)


def state(model: nn.Module, tracker: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What changes in training: weights, the tracked step, optimiser state and torch's random generator."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    if tracker is not None:
        tensors |= {f"tracker.{name}": t for name, t in tracker.state_dict().items()}
    for number, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": t for name, t in entries.items()}
    return tensors | {"rng.torch": torch.get_rng_state()}


def restore(
    path: str | Path,
    tensors: dict[str, Tensor],
    model: nn.Module,
    tracker: nn.Module | None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Put back what `state` saved. Raises InputError if it does not fit the model."""
    with checkpoint.fitting(path):
        model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model.")})
        if tracker is not None:
            tracker.load_state_dict({name[8:]: t for name, t in tensors.items() if name.startswith("tracker.")})
        if optimizer is not None:
            state: dict[int, dict[str, Tensor]] = {}
            for name, t in tensors.items():
                if name.startswith("optimizer."):
                    _, number, entry = name.split(".")
                    state.setdefault(int(number), {})[entry] = t
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
            torch.set_rng_state(tensors["rng.torch"])


def make_folder(folder: Path) -> None:
    """Make the folder of a run and try to write to it, so that the run does not fail at its first checkpoint.

    Files that a killed run left half-written are removed. Raises InputError if the folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}: choose another --out") from None
    probe = folder / ".probe"
    checkpoint.write(probe, b"")
    for left in (probe, *folder.glob(".*.tmp")):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C is only noted: the yielded function then returns True. A second one interrupts."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
