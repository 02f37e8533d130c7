"""How much memory a training step of `pc-triton train` will need, from its settings alone.

A step is at its peak at one of a few moments. How many values a block holds then was counted on small models, on both
backends. See ``docs/large_runs.md``; ``tests/test_memory.py`` measures them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .head import rows_at_once
from .models import Transformer
from .settings import STATE_DTYPES, Settings

VALUE = 4
"""Bytes of a value, except in states and in what autocast makes in bfloat16."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step in one process."""

    parameters: float
    """Parameters, the gradients that exist at that moment, and AdamW's state."""
    blocks: float
    """Activations and states of the blocks, and what the block at work needs beside them."""
    head: float
    """The head at work: logits, and the gradients made from them."""

    @property
    def total(self) -> float:
        """The sum of the three parts."""
        return self.parameters + self.blocks + self.head

    def __str__(self) -> str:
        parts = {
            "parameters, gradients and AdamW": self.parameters,
            "activations and states": self.blocks,
            "head": self.head,
        }
        told = ", ".join(f"{_gigabytes(size)} {name}" for name, size in parts.items() if size > 0)
        return f"about {_gigabytes(self.total)} GB at its peak in each process: {told}"


def _gigabytes(size: float) -> str:
    return f"{float(f'{size / 1e9:.2g}'):g}"


def step_memory(settings: Settings, processes: int = 1, *, triton: bool = False, shard: bool = False) -> Memory:
    """The `Memory` of a training step, without evaluations, Python and its libraries, and fragmentation.

    processes: how many share a batch. triton: True for Triton's kernels, as on a GPU; False for plain torch. shard:
    whether the processes share the parameters, by FSDP2.
    """
    s = settings
    with torch.device("meta"):
        sizes = [p.numel() for p in Transformer(s.vocabulary, s.width, s.heads, s.blocks, s.context).parameters()]
    p, sequences, state_bytes = sum(sizes), s.at_once(processes), STATE_DTYPES[s.state_dtype].itemsize
    narrow = 9 / 16 if s.dtype == "bfloat16" else 1.0  # norms, the residual stream and the losses stay float32
    casts = p / 2 if s.dtype == "bfloat16" else 0.0  # of the weights, which autocast keeps through a step
    own = p / processes if shard else p
    held = 3 * own + (
        p if processes > 1 else 0
    )  # what FSDP2 gathers, or DistributedDataParallel's copy of what it sends
    summed = own if sequences * processes < s.batch else 0  # the gradients of earlier micro-batches
    roots = 0 if triton else 2 * max(sizes)  # AdamW's square roots, one by one; on a GPU its kernel needs none

    moments = [Memory(VALUE * (held + own + roots), 0, 0)]
    for activations, states, work, head in _moments(s, sequences * s.context, triton):
        blocks = VALUE * (narrow * activations * s.blocks + work) + state_bytes * states * s.blocks
        moments.append(Memory(VALUE * (held + summed + casts), sequences * s.context * blocks, VALUE * head))
        learned = sequences * s.context * s.blocks * state_bytes * states  # activations are freed, states are not yet
        moments.append(Memory(VALUE * (held + own), learned, 0))
    return max(moments, key=lambda memory: memory.total)


def _moments(s: Settings, tokens: int, triton: bool) -> Iterator[tuple[float, float, float, float]]:
    """The moments at which a step may be at its peak, and how many values are held then beside the parameters.

    Each is (activations, states, work, head). The first two are values a token in every block, work is what the block
    at work needs a token on top, and head is the values of the head for all tokens.
    """
    half = s.dtype == "bfloat16"
    d, pairs = s.width, s.heads * s.context
    masks = 0 if s.stream is None else s.context  # document masks, shared by all heads
    if s.method == "bp" and s.checkpointing:
        yield d + masks, 0, 0, 3 * tokens * s.vocabulary + 2 * tokens * d
        yield d + masks, 0, (14 if half else 20) * d, 0  # the block at work is computed again
        return
    if s.method == "bp":
        yield 16 * d + s.heads + 4 + masks, 0, 0, 3 * tokens * s.vocabulary + 2 * tokens * d
        return

    gaussian = s.method == "gaussian-pc"
    logits = rows_at_once(tokens) * s.vocabulary  # those that `Head` makes at once
    weight = s.vocabulary * d
    head: float = max((1 if triton else 2) * logits + weight, logits + 2 * weight) + 3 * tokens * d
    if half:
        head += (logits + weight) / 2
    if gaussian:
        head = (4 if half else 7) * tokens * s.vocabulary + 3 * tokens * d

    if s.checkpointing:
        yield from _checkpointed(s, head)
        return

    # The first pass, by autograd. With T = 1 it is the only one.
    learns = s.order == "error" and s.inference_steps == 1
    visits_attention = triton and s.order == "error" and not gaussian  # the kernels keep no logits or weights in memory
    plain, work = 18 * d + (4 if visits_attention else 3 * pairs), 0.0
    yield plain, 0, 0, head
    if visits_attention:  # torch's attention keeps no weights on a GPU; where it does, its backward pass has two
        work = pairs if learns else 2 * pairs + 6.5 * d
    elif learns or gaussian:
        work = 1.2 * pairs + 3 * d
    else:
        work = 4 * pairs if triton else 10.25 * pairs - 2 * d
    upcast = 0.6 * pairs if half else 0.0  # attention's own softmax is made in float32
    yield plain, 0, work + masks / 2 + upcast, 0
    if learns:
        return

    # The later passes, with states. A node holds its emission until the model has returned: also while the head works.
    keeps_accepted = s.order in ("sweep", "simultaneous") or (s.order == "error" and s.inference_steps > 3)
    activations = (16 if s.order == "error" else 22) * d + (3 * s.heads if visits_attention else 2 * pairs) + 4
    states = (2 if keeps_accepted else 1) * (6 * d + pairs)
    emissions = 2 * d
    if gaussian and s.order == "error" and s.inference_steps == 2:
        emissions -= pairs  # learning's is the only pass under states, and keeps no gradient of them
    if triton or gaussian:
        work = 6 * d + (2 * pairs if keeps_accepted and not triton else pairs if gaussian else 0)
    else:
        mlp = {"error": 9, "incremental": 21}.get(s.order, 14) * d
        work = max(mlp, 9.25 * pairs - 17 * d)
        if s.order != "error":  # a Gaussian node emits its state, which is counted already
            emissions = -3 * d
        if s.order == "incremental":
            activations, emissions = activations - 4 * d, 0
    if half:
        upcast = (2.3 if keeps_accepted else 1.0) * pairs
    yield activations, states, work + upcast, 0
    yield activations + emissions, states, 0, head


def _checkpointed(s: Settings, head: float) -> Iterator[tuple[float, float, float, float]]:
    """The `_moments` of predictive coding where blocks are computed again: their inputs, states and emissions stay.

    In plain torch; with the kernels it is an upper bound, since they keep no logits.
    """
    d, pairs, half = s.width, s.heads * s.context, s.dtype == "bfloat16"
    if s.order == "error" and s.inference_steps == 1:
        yield 4 * d + 3 * pairs, 0, 0, head
        yield 4 * d + 3 * pairs, 0, 10 * d + 0.6 * pairs if half else 14 * d, 0
        return
    keeps_accepted = s.order in ("sweep", "simultaneous") or (s.order == "error" and s.inference_steps > 3)
    states = (2 if keeps_accepted else 1) * (6 * d + pairs)
    work = {"error": 15, "incremental": 29}.get(s.order, 22) * d  # states are moved in float32
    if half and s.order == "error" and not keeps_accepted:
        work = 9 * d
    gaussian = s.method == "gaussian-pc"
    yield 6 * d + (1 if gaussian else 2) * pairs, states, 0, head
    if gaussian:
        most = work + (2.5 if half else 1.3) * pairs
    else:
        most = max(work + 1.3 * pairs, 4 * d + 10.25 * pairs)
    yield 6 * d + 2 * pairs, states, most, 0


def free_memory(place: torch.device) -> int | None:
    """Bytes that this process may use on a device, including those it uses already; None if that is not known."""
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0] + torch.cuda.memory_allocated(place)
    try:
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def warning(needs: Memory, settings: Settings, place: torch.device, processes: int) -> str | None:
    """A line that says what to do if a step needs more memory than is free; None if it does not, or that is unknown."""
    free = free_memory(place)
    if free is None or free >= needs.total:
        return None
    whole = settings.order == "incremental" or settings.at_once(processes) == 1
    remedy = "--batch, --context, --width or --blocks" if whole else "--micro-batch"
    return f"warning: that is more than the {free / 1e9:.2g} GB free on {place.type}: give a smaller {remedy}"
