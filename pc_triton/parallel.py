"""One run in several processes, as torchrun starts them. Each takes its part of every batch.

In a single process all of this changes nothing.
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
    """Within it the processes that torchrun started are a group: nccl for GPU tensors, gloo for others.

    Raises InputError if another of the processes has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise InputError(
                "another process of this run has ended: see what it said, and --resume if the run was saved"
            ) from None
        raise
    dist.destroy_process_group()  # not after an error: the other processes may never get here


def choose_device(name: str) -> torch.device:
    """The device called ``"auto"`` (a GPU if there is one), ``"cpu"`` or ``"cuda"``. Each process has its own GPU.

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
    """This process's number, from 0. Process 0 writes the files and prints."""
    return dist.get_rank() if together() else 0


def processes() -> int:
    """The number of processes."""
    return dist.get_world_size() if together() else 1


def part(rows: Tensor) -> Tensor:
    """This process's consecutive rows of a tensor ``[R, ...]`` that all processes have, split as evenly as R allows."""
    return rows.tensor_split(processes())[rank()]


def total(t: Tensor) -> Tensor:
    """The sum of t over the processes. All of them must call it."""
    if together():
        t = t.clone()
        dist.all_reduce(t)
    return t


def mean(t: Tensor) -> Tensor:
    """The mean of t over the processes. All of them must call it."""
    return total(t) / processes()


def gathered(rows: list[Any]) -> list[Any]:
    """The rows of all processes, in their order. All of them must call it."""
    if not together():
        return rows
    lists: list[Any] = [None] * processes()
    dist.all_gather_object(lists, rows)
    return [row for some in lists for row in some]


def agreed(yes: bool) -> bool:
    """Whether all processes say yes. All of them must call it."""
    return all(gathered([yes]))


def wait() -> None:
    """Wait for all processes to be here. All of them must call it."""
    agreed(True)


def replicate(model: nn.Module, free_energy: nn.Module | None) -> nn.Module:
    """The module to call for a loss. Its ``backward()`` leaves gradients that are means over the processes.

    free_energy: that of the model, or None for backpropagation. Order "incremental" learns by one backward pass a step,
    so there the model inside the free energy is replicated, and not the free energy itself.
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
    """Within it gradients add up in each process unsent; the next backward pass outside it sends them.

    replica: what `replicate` returned.
    """
    return replica.no_sync() if isinstance(replica, DistributedDataParallel) else contextlib.nullcontext()
