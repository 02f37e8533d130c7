"""What a training run needs around it: its folder, what it saves, its status and its faults, Ctrl-C and SIGTERM."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from . import checkpoint, shards
from .text import InputError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
RISE = 10
"""A run diverges if a loss is above so many times its first loss, which is about that of a model that knows nothing. It
also diverges if the held-out cross-entropy is above so many times the logarithm of the vocabulary."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


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


def state(
    model: nn.Module, tracker: nn.Module | None, optimizer: torch.optim.Optimizer, sharded: bool = False
) -> dict[str, Tensor]:
    """What changes in training: weights, the tracked step, optimiser state and torch's random generator.

    sharded: leave out the weights and the optimiser's state, which are in shards.
    """
    tensors = {"rng.torch": torch.get_rng_state()}
    if tracker is not None:
        tensors |= {f"tracker.{name}": t for name, t in tracker.state_dict().items()}
    if sharded:
        return tensors
    tensors |= {f"model.{name}": t for name, t in model.state_dict().items()}
    for number, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": t for name, t in entries.items()}
    return tensors


def restore(
    path: str | Path,
    tensors: dict[str, Tensor],
    record: dict[str, Any],
    model: nn.Module,
    tracker: nn.Module | None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Put back what `state` saved, and the shards if there are. Raises InputError if it does not fit the model."""
    with checkpoint.fitting(path):
        if tracker is not None:
            tracker.load_state_dict({name[8:]: t for name, t in tensors.items() if name.startswith("tracker.")})
        if optimizer is not None:
            torch.set_rng_state(tensors["rng.torch"])
    if "shards" in record:
        shards.load(checkpoint.folder_of(path) / record["shards"], model, optimizer)
        return
    with checkpoint.fitting(path):
        model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model.")})
        if optimizer is not None:
            state: dict[int, dict[str, Tensor]] = {}
            for name, t in tensors.items():
                if name.startswith("optimizer."):
                    _, number, entry = name.split(".")
                    state.setdefault(int(number), {})[entry] = t
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Make the folder of a run, try to write to it, and keep other runs out of it while within.

    Yields whether the file system has locks; without them nothing is kept out. The lock is the system's, on a file in
    the folder. It goes when the process dies, however it dies, so a file that is left behind locks nothing. On a
    network file system it holds for all machines if that has a lock service.

    Files that a killed run left half-written are removed, and on leaving the folders that were made and stayed empty.
    Raises InputError if another run is there, or the folder cannot be used.
    """
    made = [f for f in (folder, *folder.parents) if not os.path.lexists(f)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}: choose another --out") from None
    try:
        file, locks = _lock(folder)
        try:
            checkpoint.write(folder / ".probe", b"")
            for left in (folder / ".probe", *folder.glob(".*.tmp")):
                left.unlink(missing_ok=True)
            yield locks
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()  # before it is let go: who holds it is who may remove it
            file.close()
    finally:
        with contextlib.suppress(OSError):
            for empty in made:
                empty.rmdir()


def _lock(folder: Path) -> tuple[IO[str], bool]:
    """The open lock file of a folder, and whether it could be locked."""
    while True:
        try:
            file = open(folder / LOCK, "w")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}: choose another --out") from None
        if fcntl is None:
            return file, False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise InputError(f"another run is writing to {folder}: wait for its end, or choose another --out") from None
        except OSError:
            return file, False
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                return file, True
        file.close()  # another run removed it after it was opened here


@contextlib.contextmanager
def stops() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C or SIGTERM is only noted: the yielded function then returns True.

    A second one interrupts. SIGTERM is what batch schedulers and torchrun send to end a process.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def note(number: int, frame: Any) -> None:
        asked.set()
        for each in SIGNALS:
            signal.signal(each, signal.default_int_handler)

    before = [signal.signal(number, note) for number in SIGNALS]
    try:
        yield asked.is_set
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)


def summary_writer() -> Any:
    """TensorBoard's writer of event files. Raises InputError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise InputError("tensorboard is not installed: pip install tensorboard") from None
    return SummaryWriter


def fault_of(loss: float, norm: float, earlier: list[float]) -> str | None:
    """What is wrong with a step's loss or its gradient's norm, given the earlier losses; None if nothing is."""
    if not math.isfinite(loss):
        return f"loss is not finite ({loss})"
    if not math.isfinite(norm):
        return f"gradient's norm is not finite ({norm})"
    if earlier and loss > RISE * earlier[0]:
        return f"loss is {loss:.4g}, over {RISE} times the first ({earlier[0]:.4g})"
    return None
