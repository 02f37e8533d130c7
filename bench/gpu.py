"""The one command for a machine with a GPU, in stages: are the kernels right, then how fast are they.

    python bench/gpu.py [--stage tests training kernels tuning small] [--budget 240] [--out DIR] [--commit SHA]

Each stage takes --budget seconds at most and keeps what it has: DIR/<device>.json is written anew after every case,
with the card, the versions and the commit of each stage. A case that fails is a row with the error's text, and loses
no other. --resume goes on with a stage where it stopped, on the same card, versions and commit.

tests: the kernels against the float64 oracle on small shapes; --all-tests adds all others that need a GPU.
training: a transformer's training step against backpropagation under torch.compile, one model in memory at a time.
kernels: each against its floor and its rivals, and a roofline DIR/<device>.png.
tuning: the rows of pc_triton/tuned.json, by tune_linear.py and tune_chain.py, in DIR/tuned.json.
small: the digits network, beside pcx and fabricpc where they are installed.

It needs torch, triton, numpy, pytest and, for the roofline, matplotlib; no installed package. Exit status 1: a test or
another case failed, and speeds are to be read as those of kernels that may be wrong; 2: no GPU, or no kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
LONGEST = {"tests": 200, "training": 150, "kernels": 60, "tuning": 60, "small": 200}
"""Seconds after which a case is taken to hang, by stage."""
TAIL = 4000
"""Characters that are kept of an error's text."""
BROKEN = 3
"""The exit status of a worker whose GPU no longer answers: the next case needs a new process."""
SMALL_TESTS = {
    "nodes": " ".join(f"tests/test_kernels.py::test_{name}" for name in ("dtypes", "attention", "clamped")),
    "laplace and student-t": "tests/test_elementwise.py::test_against_autograd",
    "attention": "tests/test_attention_kernels.py::test_against_the_oracle",
    "linear": "tests/test_linear_kernels.py::test_against_the_oracle",
    "chain and head": "tests/test_chain.py::test_every_dtype tests/test_head.py",
    "training": "tests/test_inference.py::test_the_kernels_give_the_same_gradients "
    "tests/test_free_energy.py::test_training_lowers_the_loss",
}
UNMARKED = {"laplace and student-t"}  # they take a GPU where one is there
FILES = ("kernels", "attention_kernels", "linear_kernels", "chain", "head", "inference", "free_energy", "compiled")
ALL_TESTS = {f"all of test_{name}.py": f"tests/test_{name}.py" for name in (*FILES, "state_dtype", "grid")}


class Case(NamedTuple):
    """A row to come: its name in the stage, and what makes it."""

    name: str
    run: Callable[[], dict[str, Any]]


# The stages.


def test_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Groups of tests, each in a process of pytest's own."""

    def run(name: str, tests: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "--tb=short", "-rf", *tests.split()]
        if options.device == "cuda" and name not in UNMARKED:
            command += ["-m", "gpu"]
        if importlib.util.find_spec("xdist") and not options.quick:  # most of the time is compilation
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout[-300:])}
        good = done.returncode == 0 and counts.get("passed", 0) > 0
        return counts if good else {**counts, "failed": (done.stdout + done.stderr)[-TAIL:]}

    groups = SMALL_TESTS | (ALL_TESTS if options.all_tests else {})
    if options.quick:
        groups = {"nodes": "tests/test_kernels.py::test_empty"}
    for name, tests in groups.items():
        yield Case(name, partial(run, name, tests))


def training_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Training steps, the most telling first: of each size backpropagation's and the default's, then the others."""
    import training

    sizes = [training.Size(32, 2, 1, 64, 16, 2)] if options.quick else training.SIZES[options.device]
    default, base = "PC, T=2", "BP, eager" if options.quick else "BP, torch.compile"
    first = [(base, False), (default, False), (default, True)]
    others = [("BP, eager", False), *((f"{default}, {how}", False) for how in ("torch.compile", "compile()"))]
    others += [(f"{default}, inference in 8 bits", False), ("PC, T=1", False), ("PC, T=3", False)]
    others += [("PC by plain autograd, T=2", False), ("PC, T=1", True)]
    todo = [(size, *case) for size in sizes for case in first]
    if not options.quick:
        todo += [(size, *case) for size in sizes for case in others]
    for size, method, state in todo:
        name = f"{size.blocks} blocks, d = {size.width}, {size.batch} x {size.context}: {method}"
        name += ", attention with a state" if state else ""
        turns = 2 if options.quick else 10
        yield Case(name, partial(training.alone, method, size, options.device, [1, 2, 3], state, turns))


def kernel_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every kernel; its rivals under torch.compile, whose compilation takes most of the time, after all others."""
    from bench_kernels import cases, copy_speed, measure, product_speed

    def machine() -> dict[str, Any]:
        copy = copy_speed(options.device, 2**32 if options.device == "cuda" else 2**20)
        return {"copy_bytes_per_second": copy, "product_flops_per_second": product_speed(options.device)}

    def run(case: Any, compiled: bool) -> dict[str, Any]:
        torch.compiler.reset()  # a function compiled for eight shapes is not compiled again
        with torch.no_grad():
            calls = case.build()
            if compiled and "compiled" not in calls:
                return {"skipped": "no rival under torch.compile"}
            wanted = {name: call for name, call in calls.items() if (name == "compiled") == compiled}
            return measure(case, {"pc_triton": calls["pc_triton"], **wanted})

    yield Case("copy and product", machine)
    all_cases = list(cases(options.device))
    for compiled in (False, True):
        for case in all_cases[:2] if options.quick else all_cases:
            name = f"{case.name}, against torch.compile" if compiled else case.name
            if not compiled or options.device == "cuda":
                yield Case(name, partial(run, case, compiled))


def tuning_cases(options: argparse.Namespace) -> Iterator[Case]:
    """The sizes of the tuners, each with its row of the table."""
    import tune_chain
    import tune_linear

    def linear(size: tuple[int, int, int], dtype: str) -> dict[str, Any]:
        with torch.no_grad():
            took = tune_linear.measure(*size, getattr(torch, dtype))
        row = [*size, round(took["apart"] / took["fused"], 3)]
        return {"what": "linear", "dtype": dtype, "row": row, "seconds": took}

    def chain(size: tuple[int, int, int], dtype: str) -> dict[str, Any]:
        took = tune_chain.measure(*size, getattr(torch, dtype))
        row = [*size, round(min(took["layers"], took["graph"]) / took["launch"], 3)]
        return {"what": "chain", "dtype": dtype, "row": row, "seconds": took}

    if options.device != "cuda":
        return
    for size in tune_linear.SHAPES:
        yield Case(f"linear {size}", partial(linear, size, "bfloat16"))
    for size in tune_chain.SIZES:
        yield Case(f"chain {size}", partial(chain, size, "float32"))


def small_cases(options: argparse.Namespace) -> Iterator[Case]:
    """The network of ``digits.py``."""
    import digits

    kinds = ["torch", "pc", *(rival for rival in ("pcx", "fabricpc") if importlib.util.find_spec(rival))]
    kinds += ["launch"] if options.device == "cuda" else []
    turns, steps = (2, 1) if options.quick else (20, 20)
    pythons = dict.fromkeys(kinds[:1] if options.quick else kinds, sys.executable)
    run = lambda: {"rows": digits.measure(pythons, options.device, turns, steps, say=print)}  # noqa: E731
    yield Case("digits", run)


STAGES = {
    "tests": test_cases,
    "training": training_cases,
    "kernels": kernel_cases,
    "tuning": tuning_cases,
    "small": small_cases,
}


# The results file: a record for each stage, and in it a row for each case.


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(path: Path, results: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def failures(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Stage, case and text of all that failed."""
    found = [
        (stage, row["name"], row["failed"])
        for stage, record in results.items()
        for row in record["rows"]
        if isinstance(row.get("failed"), str)
    ]
    return found + [(stage, "the stage itself", r["failed"]) for stage, r in results.items() if "failed" in r]


# The worker: a stage's cases one after the other, in a process that may be lost.


def work(stage: str, path: Path, seconds: float, options: argparse.Namespace) -> int:
    """Run the cases that have no row yet. A row is in the file before the next case begins."""
    deadline = time.monotonic() + seconds
    results = load(path)
    record = results[stage]
    done = {row["name"] for row in record["rows"]}
    for case in STAGES[stage](options):
        if case.name in done:
            continue
        if time.monotonic() > deadline:
            return 0
        print(f"{stage}: {case.name}", flush=True)
        record["begun"] = case.name
        save(path, results)
        faulthandler.dump_traceback_later(LONGEST[stage], exit=True)  # also where the GPU never answers
        try:
            row = case.run()
        except Exception:
            row = {"failed": traceback.format_exc()[-TAIL:]}
        faulthandler.cancel_dump_traceback_later()
        del record["begun"]
        record["rows"].append({"name": case.name, **row})
        save(path, results)
        if "failed" in row:
            print(str(row["failed"]).rstrip().splitlines()[-1][:200], flush=True)
            gc.collect()
            if not answers(options.device):
                return BROKEN
    record["finished"] = True
    save(path, results)
    return 0


def answers(device: str) -> bool:
    """Whether the GPU still does what this process asks of it: after an illegal access it does not."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True


# The parent.


def run_stage(stage: str, path: Path, options: argparse.Namespace) -> None:
    """Workers, until every case has its row or the budget is spent."""
    deadline = time.monotonic() + options.budget
    while (left := deadline - time.monotonic()) > 0:
        known = len(load(path)[stage]["rows"])
        said, status = run_worker(stage, path, left, options)
        results = load(path)
        record = results[stage]
        begun = record.pop("begun", None)
        if status is None and begun is not None:
            record["unfinished"] = begun
        elif begun is not None:
            record["rows"].append({"name": begun, "failed": f"its process ended with status {status}\n{said}"})
        elif status not in (0, None, BROKEN):
            record["failed"] = f"its process ended with status {status}\n{said}"
        save(path, results)
        if status in (0, None) or len(record["rows"]) == known:
            return


def run_worker(stage: str, path: Path, seconds: float, options: argparse.Namespace) -> tuple[str, int | None]:
    """The end of what a worker said on stderr, and its status; None where its time was up."""
    command = [sys.executable, __file__, "--worker", stage, "--budget", str(seconds), "--device", options.device]
    command += ["--results", str(path), *(f"--{name}" for name in ("quick", "all-tests") if flag(options, name))]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it began
            process.wait()
        errors.seek(0)
        return errors.read()[-TAIL:], status


def flag(options: argparse.Namespace, name: str) -> bool:
    return getattr(options, name.replace("-", "_"))


def missing(device: str = "cuda") -> str | None:
    """What keeps this machine from measuring, in one line."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False; run this where there is one, or try it with --device cpu"
    try:
        importlib.import_module("pc_triton.kernels.gaussian")
    except ImportError as error:
        return f"no kernels ({error}): where the link pc_triton/kernels was lost, ln -sfn ../kernels pc_triton/kernels"
    return None


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it."""
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return sha.strip() + "+" * bool(changed)


def machine(options: argparse.Namespace) -> dict[str, str]:
    """The card, the versions and the commit."""
    import triton

    card = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU {platform.machine()}"
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return {"device": card, **versions, "commit": options.commit or commit()}


# What is printed.


def test_table(rows: list[dict]) -> str:
    lines = ["| tests | passed | result |", "|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['name']} | {row.get('passed', 0)} | {'FAILED' if 'failed' in row else 'passed'} |")
    return "\n".join(lines)


def training_table(rows: list[dict]) -> str:
    """The rows as markdown, as ratios to the first row of backpropagation of their size: that under torch.compile."""
    base: dict[str, float] = {}
    for row in rows:
        if row.get("method", "").startswith("BP") and "seconds" in row:
            base.setdefault(json.dumps(row["size"]), row["seconds"])
    lines = ["| training step | ms | time / BP's | products / BP's | peak MiB |", "|---" * 5 + "|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | FAILED | | | |")
            continue
        of = base.get(json.dumps(row["size"]))
        ratio = f"**{row['seconds'] / of:.2f}**" if of else "-"
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "-"
        cells = [row["name"], f"{1e3 * row['seconds']:.2f}", ratio, f"{row['products']:.2f}", peak]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """The kernels as markdown; a rival's column says how many times as long as ours it took in the same case."""
    kernels: dict[str, dict] = {}
    for row in rows:
        if "kernel" in row:
            times = {name: r["seconds"] / row["seconds"] for name, r in row["rivals"].items() if "seconds" in r}
            kernels.setdefault(row["kernel"], {**row, "times": {}})["times"].update(times)
    names = list(dict.fromkeys(name for row in rows for name in row.get("rivals", {})))
    lines = [
        "| " + " | ".join(["kernel", "bytes an element", "of the floor", "us", "peak MiB", *names]) + " |",
        "|---" * (5 + len(names)) + "|",
    ]
    for name, row in kernels.items():
        cells = [f"{row['bytes_each']:g}", f"{row['of_floor']:.0%}", f"{row['seconds'] * 1e6:.0f}"]
        cells.append(f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "-")
        cells += [f"{row['times'][rival]:.2f}" if rival in row["times"] else "-" for rival in names]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def roofline(rows: list[dict], title: str, path: Path) -> None:
    """A PNG: what each kernel computes a second over its FLOPs a byte, under the measured copy and product."""
    from matplotlib.figure import Figure

    copy, product = (
        next((r[k] for r in rows if k in r), None) for k in ("copy_bytes_per_second", "product_flops_per_second")
    )
    if copy is None or product is None:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    intensity = [2.0**e for e in range(-3, 13)]
    axes.loglog(intensity, [min(x * copy, product) for x in intensity], color="gray", label="measured copy, product")
    for name, row in {row["kernel"]: row for row in rows if "kernel" in row}.items():
        x, y = row["flops_each"] / row["bytes_each"], row["elements"] * row["flops_each"] / row["seconds"]
        axes.plot(x, y, marker="o", linestyle="", label=name)
    axes.set(title=title, xlabel="FLOPs a byte", ylabel="FLOPs a second")
    axes.legend(fontsize=5, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def show(stage: str, record: dict[str, Any], path: Path) -> None:
    """Print a stage's table, and write what is made of its rows."""
    rows = record["rows"]
    if stage == "tests":
        print(test_table(rows))
    elif stage == "training":
        print(training_table(rows))
    elif stage == "kernels":
        print(table(rows))
        if importlib.util.find_spec("matplotlib"):
            roofline(rows, record["device"], path.with_suffix(".png"))
    elif stage == "tuning":
        keep_tuned(rows, record["device"], path.with_name("tuned.json"))
    else:
        import digits

        print("\n".join(digits.table(row["rows"]) for row in rows if "rows" in row))
    if not record.get("finished"):
        print(f"{stage} is not finished; --resume goes on. Its time was up in: {record.get('unfinished', '-')}")


def keep_tuned(rows: list[dict], device: str, path: Path) -> None:
    """Put the tuned rows into a copy of the package's table."""
    from tune_linear import write

    tuned: dict[tuple[str, str], list] = {}
    for row in rows:
        if "row" in row:
            tuned.setdefault((row["what"], row["dtype"]), []).append(row["row"])
    if tuned:
        path.write_text((ROOT / "pc_triton" / "tuned.json").read_text(encoding="utf-8"), encoding="utf-8")
        for (what, dtype), found in tuned.items():
            write(path, what, device, dtype, found)
        print(f"{path}: the table as tuned so far, to copy to pc_triton/tuned.json")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="default: all, in this order")
    parser.add_argument("--budget", type=float, default=240.0, metavar="SECONDS", help="of each stage (default 240)")
    parser.add_argument("--all-tests", action="store_true", help="also the tests of other shapes, and of the rest")
    parser.add_argument("--resume", action="store_true", help="keep the rows that a stage has, and go on")
    parser.add_argument("--commit", help="the commit, where this is no git checkout")
    parser.add_argument("--out", type=Path, help="default bench/results; on a CPU it must be given")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script out")
    parser.add_argument("--quick", action="store_true", help="one or two small cases a stage, to try this script out")
    parser.add_argument("--worker", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    if options.worker:
        return work(options.worker, options.results, options.budget, options)
    if options.device == "cpu" and options.out is None:
        parser.error("--device cpu: say --out, as its times are none to keep in bench/results")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    problem = missing(options.device)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    here = machine(options)
    path = (options.out or ROOT / "bench" / "results") / f"{re.sub('[ /]', '_', here['device'])}.json"
    for stage in options.stage:
        results = load(path)
        kept = results.get(stage, {})
        same = options.resume and all(kept.get(key) == value for key, value in here.items())
        results[stage] = {**here, "rows": kept["rows"] if same else []}
        save(path, results)
        run_stage(stage, path, options)
        print(f"\n{stage}: {', '.join(f'{key} {value}' for key, value in here.items())}\n")
        show(stage, load(path)[stage], path)
        print(f"in {path}\n", flush=True)
    failed = failures({stage: load(path)[stage] for stage in options.stage})
    for stage, name, text in failed:
        print(f"\nFAILED, {stage}: {name}\n{text}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
