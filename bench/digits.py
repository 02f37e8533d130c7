"""A training step of a small network: predictive coding against backpropagation and other PC libraries.

    python bench/digits.py                                  # this project and torch
    python bench/digits.py --pcx PYTHON --fabricpc PYTHON   # and the rivals, each with its own environment's python

The network is 64-128-128-10, tanh, on scikit-learn's digits, batch 128, plain SGD. Every method runs in a process of
its own, on one processor or with ``--device cuda`` on the GPU, and the processes take turns, a few steps each, so that
all see the same machine; printed are each method's times as ratios to backpropagation's (median over the turns, and the
quartiles). PCX and FabricPC need different versions of JAX: make two environments (``pip install pcx==0.6.3
scikit-learn``, ``pip install fabricpc==0.6.0 scikit-learn``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "cpu": {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"},
    "cuda": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "backpropagation": ("torch", {}),
    "backpropagation, torch.compile": ("torch", {"compile": True}),
    "PC, simultaneous T=8": ("pc", {"steps": 8, "order": "simultaneous", "precision": 1.0, "step": 0.1}),
    "PC, simultaneous T=8, eager": (
        "pc",
        {"steps": 8, "order": "simultaneous", "precision": 1.0, "step": 0.1, "eager": True},
    ),
    "PCX, simultaneous T=8": ("pcx", {"steps": 8}),
    "FabricPC, simultaneous T=8": ("fabricpc", {"steps": 8}),
    "PC, error T=1": ("pc", {"steps": 1}),
    "PC, error T=1, eager": ("pc", {"steps": 1, "eager": True}),
    "FabricPC, error T=1": ("fabricpc", {"steps": 1, "error_order": True}),
    "PC, error T=2 (default)": ("pc", {"steps": 2}),
    "PC, error T=3": ("pc", {"steps": 3}),
    "PC, error T=2, one launch": ("launch", {"eager": True}),  # kernels/chain.py, on a GPU
}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's 1,797 digits: x float32 ``[1797, 64]`` in [0, 1] and y int64 ``[1797]``.

    Without scikit-learn as many points of ten clusters.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print("scikit-learn is not installed: ten clusters in place of the digits", file=sys.stderr)
        random = np.random.default_rng(0)
        y = random.integers(0, 10, 1797)
        return (random.random((10, 64))[y] + 0.3 * random.standard_normal((1797, 64))).astype(np.float32), y
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y.astype(np.int64)


def torch_method(
    batches: Any,
    device: str,
    compile: bool = False,
    pc: bool = False,
    eager: bool = False,
    launch: bool = False,
    **options: Any,
) -> Any:
    """The network in torch: backpropagation, or predictive coding by `FreeEnergy` with these options."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    import pc_triton
    from pc_triton.dispatch import use_chain

    torch.manual_seed(0)
    torch.set_num_threads(1)
    linear = pc_triton.Linear if pc else nn.Linear
    model = nn.Sequential(linear(64, 128), nn.Tanh(), linear(128, 128), nn.Tanh(), linear(128, 10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)) for x, y in batches]
    if pc:
        loss = pc_triton.FreeEnergy(model, **options)
        if not eager:
            loss.compile()
    else:

        def loss(x, y):
            return F.cross_entropy(model(x), y)

        if compile:
            loss = torch.compile(loss)

    def step(number: int) -> None:
        optimizer.zero_grad()
        with use_chain(launch):
            loss(*data[number % len(data)]).backward()
        optimizer.step()

    def accuracy(x: np.ndarray, y: np.ndarray) -> float:
        return float((model(torch.from_numpy(x).to(device)).argmax(-1).cpu().numpy() == y).mean())

    return step, torch.cuda.synchronize if device == "cuda" else lambda: None, accuracy


def worker(name: str, device: str) -> None:
    """Train by one method: for each line with a number of steps on stdin, write the seconds they took to stdout."""
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one processor, the same for all
    kind, options = METHODS[name]
    x, y = digits()
    batches = [(x[i : i + 128], y[i : i + 128]) for i in range(0, len(x) - 127, 128)]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to stderr
    if kind in ("torch", "pc", "launch"):
        step, wait, accuracy = torch_method(batches, device, pc=kind != "torch", launch=kind == "launch", **options)
    else:
        import rivals

        step, wait, accuracy, _ = getattr(rivals, kind)(batches, **options)
    done = 0
    for _ in range(3):
        step(done)
    wait()
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        if line == "accuracy\n":
            print(accuracy(x, y), file=out, flush=True)
            continue
        start = time.perf_counter()
        for _ in range(int(line)):
            step(done)
            done += 1
        wait()
        print(time.perf_counter() - start, file=out, flush=True)


class Worker:
    """A worker's process."""

    def __init__(self, name: str, python: str, device: str) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--worker", name, "--device", device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT[device], "PYTHONPATH": str(HERE.parent)},
        )

    def read(self) -> str:
        """The next line it writes. Raises RuntimeError if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self.process.wait()}; what it said stands above")
        return line

    def ask(self, line: str) -> float:
        """Send a line and return the number it answers."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return float(self.read())


def measure(
    pythons: dict[str, str], device: str, turns: int, steps: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each method whose python is given: its ratio to backpropagation (median, quartiles), its accuracy."""
    from tqdm import tqdm as progress  # a rival's python may have none

    workers: dict[str, Worker] = {}
    try:
        for name, (kind, _) in METHODS.items():
            if kind in pythons:
                say(f"starting {name}")
                workers[name] = Worker(name, pythons[kind], device)
                workers[name].read()  # one after the other: compiling takes both processors
        ratios: dict[str, list[float]] = {name: [] for name in workers}
        for _ in progress(range(turns), "turns", unit="turn", disable=None):
            seconds = {name: w.ask(str(steps)) for name, w in workers.items()}
            for name, s in seconds.items():
                ratios[name].append(s / seconds["backpropagation"])
        rows = []
        for name, w in workers.items():
            low, _, high = quantiles(ratios[name], n=4)
            accuracy = w.ask("accuracy")
            rows.append({"method": name, "ratio": median(ratios[name]), "low": low, "high": high, "accuracy": accuracy})
        return rows
    finally:
        for w in workers.values():
            w.process.kill()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown."""
    lines = ["| training step | time / backpropagation | quartiles | training accuracy |", "|---|---|---|---|"]
    for row in rows:
        spread = f"{row['low']:.2f} to {row['high']:.2f}"
        lines.append(f"| {row['method']} | **{row['ratio']:.2f}** | {spread} | {row['accuracy']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pcx", help="python of an environment with pcx")
    parser.add_argument("--fabricpc", help="python of an environment with fabricpc")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all train (default cpu)")
    parser.add_argument("--turns", type=int, default=60, help="turns of each method (default 60)")
    parser.add_argument("--steps", type=int, default=20, help="training steps a turn (default 20)")
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.device)
        return
    pythons = {"torch": sys.executable, "pc": sys.executable}
    if given.device == "cuda":
        pythons["launch"] = sys.executable
    pythons |= {kind: python for kind in ("pcx", "fabricpc") if (python := getattr(given, kind))}
    rows = measure(pythons, given.device, max(given.turns, 2), given.steps, lambda line: print(line, file=sys.stderr))
    if given.out:
        import torch
        from runs import commit

        processor = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
        machine = {"python": platform.python_version(), "torch": torch.__version__, "processor": processor}
        machine["commit"] = commit()
        given.out.parent.mkdir(parents=True, exist_ok=True)
        record = {**machine, "turns": given.turns, "steps": given.steps, "rows": rows}
        given.out.write_text(json.dumps(record, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
