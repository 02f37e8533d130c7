"""Which kernel: a model of the card decides from shapes, and where times were measured, they decide. Launches nothing.

Two kernels take the place of several: a linear layer with its node (``kernels/linear.py``), and a whole training step
of a chain (``kernels/chain.py``). ``dispatch.py`` asks here which of the two ways it is, and gets the reason with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .cards import Card

COPY, PRODUCT = 0.9, 0.65
"""Of the bandwidth and of the product rate, what a large copy and cuBLAS reach: see ``bench/cost.py``."""
TRITON = {"float32": 0.5, "tf32": 0.78, "float16": 0.78, "bfloat16": 0.78}
"""Of cuBLAS's rate, what the kernel's product is taken to reach. Assumed: products written for one card in Triton have
0.9 to 1 of it on tensor cores, and this one uses neither TMA nor warp specialisation. With it an H100 breaks even in
bfloat16 near K = 1,500."""
LAUNCH = 1.3e-6
"""Seconds a launch takes in a CUDA graph, the least that one fewer saves."""
TILES = {"float32": 64, "tf32": 128, "float16": 128, "bfloat16": 128}
"""Rows, and columns, of a program of the fused layer."""
CHAIN_SAMPLES = 16
"""Samples of a program of the chain."""
CHAIN_WIDTH = 256
"""The widest chain: each program reads all weights in every pass, which a wider one does by large products better."""


class Choice(NamedTuple):
    """Whether the one kernel is taken, and why."""

    taken: bool
    reason: str


def fused(card: Card, rows: int, n: int, k: int, kind: str, measured: Sequence[Sequence[float]] = ()) -> Choice:
    """Whether the product [rows, k] [k, n] and its Gaussian node are one kernel.

    Fused, mu is neither written nor read: 2 rows n elements, and a launch. But the kernel's product is slower than
    cuBLAS's, by rows n k FLOPs twice over, and its tiles may leave multiprocessors idle. So small K gain.

    kind: the dtype's name, or "tf32" for float32 whose products may be. measured: rows [rows, n, k, ratio], how many
    times as long both took apart; the nearest then decides.
    """
    itemsize = 4 if kind in ("float32", "tf32") else 2
    if not rows or any(not size or size * itemsize % 16 for size in (n, k)):
        return Choice(False, f"N={n}, K={k} are no rows of whole 16 bytes")
    if measured:
        return _by_time(nearest(measured, rows, n, k))
    if not card.bandwidth:
        return Choice(False, f"{card.name} is not listed, and nothing was measured on it")
    tile = TILES[kind]
    programs = math.ceil(rows / tile) * math.ceil(n / tile)
    busy = programs / (math.ceil(programs / card.multiprocessors) * card.multiprocessors)
    product = 2.0 * rows * n * k / (PRODUCT * card.rate(kind))
    costs = product * (1 / (TRITON[kind] * busy) - 1)
    saves = 2.0 * rows * n * itemsize / (COPY * card.bandwidth) + LAUNCH
    return Choice(
        saves > costs, f"it saves {1e6 * saves:.1f} us of memory and a launch for {1e6 * costs:.1f} of product"
    )


def chained(
    card: Card, samples: int, width: int, layers: int, kind: str, measured: Sequence[Sequence[float]] = ()
) -> Choice:
    """Whether a training step of so many linear layers, of that mean width, is one launch.

    Each program takes its samples through all passes, and so the launch is as long as one program where all run at
    once. kind as in `fused`; it is for the table. measured: rows [samples, width, layers, ratio], how many times as
    long the same step took by its layers: the nearest decides, and beyond all of them it is the layers.
    """
    sizes = (samples, width, layers)
    if not samples:
        return Choice(False, "no samples")
    if measured:
        if any(size > max(column) for size, column in zip(sizes, zip(*measured))):
            return Choice(False, "larger than all that was measured")
        return _by_time(nearest(measured, *sizes))
    programs = math.ceil(samples / CHAIN_SAMPLES)
    if programs > card.multiprocessors:
        return Choice(False, f"{programs} programs are more than {card.multiprocessors} multiprocessors run at once")
    if width > CHAIN_WIDTH:
        return Choice(False, f"width {width} is over {CHAIN_WIDTH}")
    return Choice(True, f"{programs} programs run at once on {card.multiprocessors} multiprocessors")


def nearest(rows: Sequence[Sequence[float]], *sizes: int) -> float:
    """The ratio at the nearest sizes measured, in logarithms."""
    return min(rows, key=lambda row: sum(math.log(a / b) ** 2 for a, b in zip(row, sizes)))[-1]


def _by_time(ratio: float) -> Choice:
    return Choice(ratio > 1, f"measured: apart takes {ratio} times as long")
