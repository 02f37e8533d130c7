"""The one command for a machine with a GPU: its tests first, and only if they pass the speed of every kernel.

    python bench/gpu.py [--commit SHA] [--out DIR] [--minutes 8]

It needs torch, triton, numpy, pytest and pytest-benchmark, and no installed package. It writes DIR/<device>.json and
prints the table. Exit status 1: a test failed, and no speed is printed; 2: no GPU, or no kernels.
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


def table(rows: list[dict]) -> str:
    """The rows as markdown; a rival's column says how many times as long as ours it took."""
    names = ("eager", "compiled", "torch")
    lines = [
        "| kernel | bytes an element | of the copy's speed | us | peak MiB | " + " | ".join(names) + " |",
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


def write(out: Path, machine: dict, rows: list[dict]) -> Path:
    """``out/<device>.json``: the machine, then a row a kernel."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{machine['device'].replace(' ', '_').replace('/', '_')}.json"
    path.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
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

    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": options.commit or commit(),
    }
    rows: list[dict] = []
    try:
        for row in measure_all(start + 60 * options.minutes):
            rows.append(row)
    finally:  # what was measured is kept
        path = write(options.out, machine, rows)
        print(f"{', '.join(f'{key} {value}' for key, value in machine.items())}\n\n{table(rows)}\n\nin {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
