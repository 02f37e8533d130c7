"""One run in several processes, as torchrun starts them: each takes its part of every batch.

In a process of its own all of this changes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .text import InputError


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within it the processes that torchrun started are a group: by nccl for GPU tensors, by gloo for others.

    Raises InputError where another of them has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise InputError("another process of this run has ended: see what it said, and --resume") from None
        raise
    dist.destroy_process_group()  # not after an error, when the others may never come to it


def choose_device(name: str) -> torch.device:
    """The device called auto (a GPU if there is one), cpu or cuda: of several processes each has a GPU of its own.

    Raises InputError if it is not available.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("no CUDA GPU is available here: use --device cpu, or auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise InputError(f"no GPU is left for process {number}: use --nproc-per-node {torch.cuda.device_count()}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def together() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number among `processes`; 0 writes the files and prints."""
    return dist.get_rank() if together() else 0


def processes() -> int:
    """The number of processes."""
    return dist.get_world_size() if together() else 1


def part(rows: Tensor) -> Tensor:
    """This process's consecutive rows of a tensor ``[R, ...]`` that all have, as many for each as R allows."""
    return rows.tensor_split(processes())[rank()]


def total(t: Tensor) -> Tensor:
    """The sum of t over the processes; all of them call it."""
    if together():
        t = t.clone()
        dist.all_reduce(t)
    return t


def mean(t: Tensor) -> Tensor:
    """The mean of t over the processes; all of them call it."""
    return total(t) / processes()


def gathered(rows: list[Any]) -> list[Any]:
    """The rows of all processes, in their order; all of them call it."""
    if not together():
        return rows
    lists: list[Any] = [None] * processes()
    dist.all_gather_object(lists, rows)
    return [row for some in lists for row in some]


def agreed(yes: bool) -> bool:
    """Whether all processes say so; all of them call it."""
    return all(gathered([yes]))


def replicate(model: nn.Module, free_energy: nn.Module | None) -> nn.Module:
    """What to call for a loss, by whose ``backward()`` the gradients are means over the processes.

    free_energy is that of the model, or None for backpropagation. Its order "incremental" learns by as many backward
    passes as it has steps: there its model is what is replicated, within it.
    """
    whole = model if free_energy is None else free_energy
    if not together():
        return whole
    if free_energy is not None and getattr(free_energy, "order", None) == "incremental":
        free_energy.model = DistributedDataParallel(free_energy.model)  # type: ignore[arg-type]
        return free_energy
    tracker = getattr(free_energy, "tracker", None)
    if tracker is not None:
        tracker.shared = True
    return DistributedDataParallel(whole)


def unsent(replica: nn.Module) -> AbstractContextManager[None]:
    """Within it the gradients of what `replicate` made add up in each process, until a backward pass outside it."""
    return replica.no_sync() if isinstance(replica, DistributedDataParallel) else contextlib.nullcontext()
