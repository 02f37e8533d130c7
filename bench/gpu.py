"""The one command for a machine with a GPU: its tests first, and only if they pass the speed of kernels and training.

    python bench/gpu.py [--commit SHA] [--out DIR] [--minutes 8]

It needs torch, triton, numpy, matplotlib, pytest and pytest-benchmark, and no installed package; liger-kernel,
cut-cross-entropy, pcx and fabricpc are measured as rivals where they are installed. It writes DIR/<device>.json and a
roofline DIR/<device>.png, and prints the tables. Exit status 1: a test failed, and no speed is printed; 2: no GPU, or
no kernels.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def missing() -> str | None:
    """What keeps this machine from measuring, in one line."""
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False; run this where there is one"
    try:
        importlib.import_module("pc_triton.kernels.gaussian")
    except ImportError as error:
        return f"no kernels ({error}): where the link pc_triton/kernels was lost, ln -sfn ../kernels pc_triton/kernels"
    return None


def tests_pass(timeout: float) -> bool:
    """``pytest -m gpu``, on several processes where pytest-xdist is there: most of its time is compilation."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=timeout).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"pytest -m gpu did not end within {timeout:.0f} s")
        return False


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it."""
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return sha.strip() + "+" * bool(changed)


def measure_all(deadline: float) -> Iterator[dict]:
    """A row for every kernel that is begun before the deadline."""
    from bench_kernels import cases, measure

    with torch.no_grad():
        for case in cases("cuda"):
            if time.monotonic() > deadline:
                print(f"out of time before {case.name}")
                return
            torch.compiler.reset()  # a function compiled for eight shapes is not compiled again
            print(case.name, flush=True)
            yield measure(case, case.build())


def measure_training(deadline: float) -> Iterator[dict]:
    """Rows of ``training.py``: each size, without a state of the attention weights and with one."""
    import training

    for size in training.SIZES["cuda"]:
        for state in (False, True):
            if time.monotonic() > deadline:
                print(f"out of time before training {size}, attention state {state}")
                return
            print(size, "with" if state else "without", "a state of the attention weights", flush=True)
            rows = training.measure(size, "cuda", [1, 2, 3, 4], state, turns=5)
            print(training.table(rows), flush=True)
            yield from rows


def measure_small(deadline: float) -> list[dict]:
    """Rows of ``digits.py``: a small network on the GPU."""
    import digits

    if time.monotonic() > deadline:
        print("out of time before the small network")
        return []
    kinds = ["torch", "pc", "launch", *(rival for rival in ("pcx", "fabricpc") if importlib.util.find_spec(rival))]
    try:
        rows = digits.measure(dict.fromkeys(kinds, sys.executable), "cuda", turns=20, steps=20, say=print)
    except RuntimeError as error:  # a rival's process that ended
        print(f"the small network: {error}")
        return []
    print(digits.table(rows), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as markdown; a rival's column says how many times as long as ours it took."""
    names = list(dict.fromkeys(name for row in rows for name in row["rivals"]))
    lines = [
        "| kernel | bytes an element | of the floor | us | peak MiB | " + " | ".join(names) + " |",
        "|---" * (5 + len(names)) + "|",
    ]
    for row in rows:
        cells = [f"{row['bytes_each']:g}", f"{row['of_floor']:.0%}", f"{row['seconds'] * 1e6:.0f}"]
        cells.append(f"{row['peak_bytes'] / 2**20:.0f}")
        for name in names:
            rival = row["rivals"].get(name, {})
            cells.append(f"{rival['seconds'] / row['seconds']:.2f}" if "seconds" in rival else "-")
        lines.append(f"| {row['kernel']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def roofline(machine: dict, rows: list[dict], path: Path) -> None:
    """A PNG: what each kernel computes a second over its FLOPs a byte, under the measured copy and product."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    intensity = [2.0**e for e in range(-3, 13)]
    roof = [min(x * machine["copy_bytes_per_second"], machine["product_flops_per_second"]) for x in intensity]
    axes.loglog(intensity, roof, color="gray", label="measured copy, measured product")
    for row in rows:
        x, y = row["flops_each"] / row["bytes_each"], row["elements"] * row["flops_each"] / row["seconds"]
        axes.plot(x, y, marker="o", linestyle="", label=row["kernel"])
    axes.set(title=machine["device"], xlabel="FLOPs a byte", ylabel="FLOPs a second")
    axes.legend(fontsize=5, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def write(out: Path, machine: dict, rows: list[dict], small: list[dict], training: list[dict]) -> Path:
    """``out/<device>.json``: the machine, a row a kernel and a row a training step; beside it the roofline."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{machine['device'].replace(' ', '_').replace('/', '_')}.json"
    path.write_text(
        json.dumps({**machine, "rows": rows, "small": small, "training": training}, indent=1) + "\n", encoding="utf-8"
    )
    roofline(machine, rows, path.with_suffix(".png"))
    return path


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description="Run the GPU's tests, then measure every kernel.")
    parser.add_argument("--commit", help="the commit, where this is no git checkout")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no measurement after this (default 8)")
    options = parser.parse_args(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    problem = missing()
    if problem:
        print(problem, file=sys.stderr)
        return 2
    if not tests_pass(60 * options.minutes):
        print("the GPU's tests do not pass: nothing is measured", file=sys.stderr)
        return 1
    import triton
    from bench_kernels import copy_speed, product_speed

    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": options.commit or commit(),
        "copy_bytes_per_second": copy_speed("cuda", 2**32),
        "product_flops_per_second": product_speed("cuda"),
    }
    rows: list[dict] = []
    small: list[dict] = []
    training: list[dict] = []
    try:
        for row in measure_all(start + 60 * options.minutes):
            rows.append(row)
        small += measure_small(start + 60 * options.minutes)
        for row in measure_training(start + 60 * options.minutes):
            training.append(row)
    finally:  # what was measured is kept
        path = write(options.out, machine, rows, small, training)
        print(f"{', '.join(f'{key} {value}' for key, value in machine.items())}\n\n{table(rows)}\n\nin {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
