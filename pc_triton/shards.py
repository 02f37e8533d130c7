"""A model that FSDP2 shards: its checkpoint, which each process writes its part of, and any number of them can read."""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import parallel
from .text import InputError

NAME = re.compile(r"shards-(\d+)")


def shard(model: nn.Module, place: torch.device) -> None:
    """Split the parameters among the processes: those of each of ``model.blocks``, then what is left.

    Blocks stay gathered from pass to pass of inference (``docs/large_runs.md``).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(place.type, (parallel.processes(),))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def save(folder: Path, before: str | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Write the model and its optimiser to a new folder in ``folder``; the new one's name. All processes call it.

    before: the name of the last one, which stays as it is. Raises InputError if it cannot be written.
    """
    import torch.distributed.checkpoint as dcp  # brings in much of torch that nothing else needs
    from torch.distributed.checkpoint.state_dict import get_state_dict

    number = NAME.fullmatch(before or "shards-0")
    assert number is not None
    name = f"shards-{int(number[1]) + 1}"
    if parallel.rank() == 0:
        shutil.rmtree(folder / name, ignore_errors=True)  # what a killed run left
    parallel.wait()
    states, moments = get_state_dict(model, optimizer)
    with _faults(f"cannot write {folder / name}", "free space or choose another --out"):
        dcp.save({"model": states, "optimizer": moments}, checkpoint_id=folder / name)
    return name


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put back what `save` wrote, into a model that is sharded or whole. In a group of processes all call it.

    Raises InputError if it is missing, damaged, or of another model.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_state_dict,
        set_model_state_dict,
        set_state_dict,
    )

    with _faults(f"{folder} is damaged or of another run", "restore it from a copy, or train again"):
        if optimizer is None:
            state: dict[str, Any] = {"model": get_model_state_dict(model)}
            dcp.load(state, checkpoint_id=folder)
            set_model_state_dict(model, state["model"])
        else:
            states, moments = get_state_dict(model, optimizer)
            dcp.load({"model": states, "optimizer": moments}, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=states, optim_state_dict=moments)


def remove_others(folder: Path, kept: str | None) -> None:
    """Remove all but one of what `save` wrote to a folder."""
    for path in folder.glob("shards-*"):
        if NAME.fullmatch(path.name) and path.name != kept:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _faults(problem: str, remedy: str) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
            yield
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, torch.distributed.DistError):
            raise
        raise InputError(f"{problem}: {remedy}") from None
