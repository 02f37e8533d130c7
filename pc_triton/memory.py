"""What a training step of `pc-triton train` will need of memory, from its settings alone.

A step's peak is at one of a few moments. The values that a block holds then were counted on small models, on both
backends (``docs/large_runs.md``; ``tests/test_memory.py`` measures them again).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .head import CHUNKS, LEAST
from .models import Transformer
from .settings import STATE_DTYPES, Settings

VALUE = 4
"""Bytes of every value but the states': the command line trains in float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step in one process."""

    parameters: float
    """Parameters, such gradients as there are, AdamW's state."""
    blocks: float
    """Activations and states of the blocks, and what the one at work needs beside them."""
    head: float
    """The head at work: logits, and the gradients made of them."""

    @property
    def total(self) -> float:
        """All of it."""
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


def step_memory(settings: Settings, processes: int = 1, *, triton: bool = False) -> Memory:
    """The `Memory` of a training step; not that of evaluations, of Python and its libraries, or lost to fragmentation.

    processes: how many share a batch. triton: whether Triton's kernels compute, as on a GPU, or plain torch.
    """
    s = settings
    with torch.device("meta"):
        sizes = [p.numel() for p in Transformer(s.vocabulary, s.width, s.heads, s.blocks, s.context).parameters()]
    p, sequences, state_bytes = sum(sizes), s.at_once(processes), STATE_DTYPES[s.state_dtype].itemsize
    held = 3 * p + (p if processes > 1 else 0)  # DistributedDataParallel keeps what it sends
    summed = p if sequences * processes < s.batch else 0  # the gradients of the micro-batches before
    roots = p if triton else 2 * max(sizes)  # AdamW's: of all parameters at once, or of one after another

    moments = [Memory(VALUE * (held + p + roots), 0, 0)]
    for activations, states, work, head in _moments(s, sequences * s.context, triton):
        blocks = VALUE * (activations * s.blocks + work) + state_bytes * states * s.blocks
        moments.append(Memory(VALUE * (held + summed), sequences * s.context * blocks, VALUE * head))
        learned = sequences * s.context * s.blocks * state_bytes * states  # the activations have gone, states have not
        moments.append(Memory(VALUE * (held + p), learned, 0))
    return max(moments, key=lambda memory: memory.total)


def _moments(s: Settings, tokens: int, triton: bool) -> Iterator[tuple[float, float, float, float]]:
    """The moments at which a step may be at its peak: what is held then beside the parameters.

    Values of a token in each block, activations and states, and in the one that is at work; and values of the head.
    """
    d, pairs = s.width, s.heads * s.context
    masks = 0 if s.stream is None else s.context  # of documents, which all heads share
    if s.method == "bp":
        yield 16 * d + s.heads + 4 + masks, 0, 0, 3 * tokens * s.vocabulary + 2 * tokens * d
        return

    gaussian = s.method == "gaussian-pc"
    logits = min(tokens, max(LEAST, -(-tokens // CHUNKS))) * s.vocabulary  # made at once
    weight = s.vocabulary * d
    head: float = max((1 if triton else 2) * logits + weight, logits + 2 * weight) + 3 * tokens * d
    if gaussian:
        head = 7 * tokens * s.vocabulary + 3 * tokens * d

    # The first pass, by autograd, and all there is where T = 1.
    learns = s.order == "error" and s.inference_steps == 1
    plain, work = 18 * d + 3 * pairs, 0.0
    yield plain, 0, 0, head
    if learns or gaussian:
        work = 1.2 * pairs + 3 * d
    else:
        work = 4 * pairs if triton else 10.25 * pairs - 2 * d
    yield plain, 0, work + masks / 2, 0
    if learns:
        return

    # The passes under the states. A node holds its emission until the model has returned, which is when the head works.
    visits_attention = triton and s.order == "error" and not gaussian  # its logits and weights never reach memory
    keeps_accepted = s.order in ("sweep", "simultaneous") or (s.order == "error" and s.inference_steps > 3)
    activations = (16 if s.order == "error" else 22) * d + (3 * s.heads if visits_attention else 2 * pairs) + 4
    states = (2 if keeps_accepted else 1) * (6 * d + pairs)
    emissions = 2 * d
    if triton or gaussian:
        work = 9 * d + 2 * pairs if keeps_accepted else 6 * d + (pairs if gaussian else 0)
    else:
        mlp = {"error": 9, "incremental": 21}.get(s.order, 14) * d
        work = max(mlp, 9.25 * pairs - 17 * d)
        if s.order != "error":  # the emission of a Gaussian node is its state
            emissions = -3 * d
        if s.order == "incremental":
            activations, emissions = activations - 4 * d, 0
    yield activations, states, work, 0
    yield activations + emissions, states, 0, head


def free_memory(place: torch.device) -> int | None:
    """Bytes that this process may have on a device, with those that it has; None where that is not known."""
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0] + torch.cuda.memory_allocated(place)
    try:
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
