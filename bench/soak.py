"""A long run of ``pc-triton train`` in one process: does its resident memory grow?

    python bench/soak.py [--steps 30000] [--out bench/results/soak.json]

A small model on the default text, in micro-batches, evaluated and saved every 100 steps. Resident memory (``VmRSS`` of
/proc, Linux) is read every 10 steps. Printed is its growth per 1,000 steps, the slope of a least-squares line after
the first tenth of the run, and the least and the greatest slope over five equal parts of what follows. The losses
and evaluations that ``train`` returns grow by 0.03 and 0.02 MB per 1,000 steps, and the checkpoints that hold them grow
too. Ctrl-C ends the run and keeps what was read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from runs import commit
from tqdm import tqdm

from pc_triton import train as training

EVERY = 10
"""Steps from one reading to the next."""
PARTS = 5


def resident() -> float:
    """This process's resident memory in MB."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6  # type: ignore


def slopes(samples: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """Growth in MB per 1,000 steps after the first tenth of the samples (step, MB): of all, least and greatest part."""
    kept = np.array(samples[len(samples) // 10 :])
    slope, *parts = (1000 * float(np.polyfit(*part.T, 1)[0]) for part in (kept, *np.array_split(kept, PARTS)))
    return slope, min(parts), max(parts)


def soak(settings: training.Settings) -> dict[str, Any]:
    """Train, or until Ctrl-C; the record: settings, environment, samples (step, MB) and their `slopes`."""
    samples: list[tuple[int, float]] = []
    backward, counter = training.backward, itertools.count()

    def watched(*arguments: Any) -> Any:
        step = next(counter)
        bar.update(step - bar.n)
        if step % EVERY == 0:
            samples.append((step, round(resident(), 3)))
        return backward(*arguments)

    bar = tqdm(total=settings.steps, unit="step", disable=None)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(training, "backward", watched), bar:
        try:
            training.train(settings, folder, device="cpu", quiet=True)
        except KeyboardInterrupt as stopped:
            print(stopped)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    given = {name: value for name, value in vars(settings).items() if value is not None}
    growth = dict(zip(("all", "least", "greatest"), slopes(samples)))
    return {
        "environment": versions | {"device": "CPU only, one thread"},
        "commit": commit(),
        "settings": given,
        "growth_MB_per_1000_steps": growth,
        "samples": samples,
    }


def plot(record: dict[str, Any], png: Path) -> None:
    """The memory over the steps, and the line through it."""
    steps, memory = np.array(record["samples"]).T
    kept = slice(len(steps) // 10, None)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, memory, linewidth=0.8, label="resident memory")
    line = np.polyval(np.polyfit(steps[kept], memory[kept], 1), steps[kept])
    axes.plot(
        steps[kept], line, linestyle="--", label=f"{record['growth_MB_per_1000_steps']['all']:+.3f} MB per 1,000 steps"
    )
    axes.set(xlabel="training step", ylabel="MB", ylim=(0, 1.25 * memory.max()))
    axes.legend(loc="lower right")
    figure.savefig(png, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "soak.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = training.Settings(
        width=32, heads=2, blocks=1, context=32, vocabulary=512, batch=8, micro_batch=4, steps=arguments.steps, lr=1e-3
    )
    record = soak(settings)
    arguments.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    plot(record, arguments.out.with_suffix(".png"))
    growth = record["growth_MB_per_1000_steps"]
    step, memory = record["samples"][-1]
    print(
        f"{step:,} steps, {memory:.0f} MB: {growth['all']:+.3f} MB per 1,000 steps "
        f"({growth['least']:+.3f} to {growth['greatest']:+.3f} in {PARTS} parts)"
    )


if __name__ == "__main__":
    main()
