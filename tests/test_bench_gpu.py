"""What a CPU can show of ``bench/gpu.py``: it refuses without a GPU, loses no row to a failure, its tables and file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"
SIZE = {"width": 8, "context": 4}
HERE = {"device": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "python": "3.12", "commit": "abc"}
KERNEL = {
    "name": "gaussian step",
    "kernel": "gaussian step",
    "elements": 1024,
    "bytes_each": 10.0,
    "flops_each": 5,
    "seconds": 2e-4,
    "peak_bytes": 3 * 2**20,
    "of_floor": 0.914,
    "rivals": {"eager": {"seconds": 8e-4, "peak_bytes": 1}},
}
COMPILED = {**KERNEL, "seconds": 1e-4, "rivals": {"compiled": {"seconds": 3e-4}, "other": {"failed": "no compiler"}}}


@pytest.fixture
def gpu(monkeypatch):
    pytest.importorskip("triton")  # as interpreted as the other tests need it: main() would import it to compile
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options() -> argparse.Namespace:
    return argparse.Namespace(device="cpu", quick=True, all_tests=False, budget=60.0)


def begin(gpu, path: Path, stage: str) -> Path:
    gpu.save(path, {stage: {**HERE, "rows": []}})
    return path


def test_no_gpu():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("no GPU: ")
    assert run.stderr.count("\n") == 1


def test_kernels_lost_on_the_way(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "pc_triton.kernels.gaussian", None)
    assert gpu.main([]) == 2
    assert "ln -sfn ../kernels pc_triton/kernels" in capsys.readouterr().err


def test_times_of_a_cpu_are_kept_nowhere_unasked(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "say --out" in capsys.readouterr().err


def test_two_stages_on_a_cpu(tmp_path):
    """From end to end: workers, the file with the versions of each stage, tables."""
    command = [
        sys.executable,
        SCRIPT,
        "--device",
        "cpu",
        "--quick",
        "--stage",
        "training",
        "kernels",
        "--commit",
        "abc",
    ]
    run = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert list(results) == ["training", "kernels"]
    for record in results.values():
        assert record["finished"]
        assert record["commit"] == "abc"
        assert record["torch"] == torch.__version__
        assert {"device", "triton", "python"} <= record.keys()
        assert "begun" not in record
    assert [(row["method"], row["attention_state"]) for row in results["training"]["rows"]] == [
        ("BP, eager", False), ("PC, T=2", False), ("PC, T=2", True),
    ]  # fmt: skip
    assert results["kernels"]["rows"][0]["copy_bytes_per_second"] > 0
    assert "| gaussian forward, error form | 12 |" in run.stdout


def test_a_failing_case_loses_no_other(gpu, monkeypatch, options, tmp_path):
    path = begin(gpu, tmp_path / "card.json", "kernels")
    seen = []

    def good():
        seen.append(json.loads(path.read_text())["kernels"])  # what is kept while a case runs
        return {"value": len(seen)}

    def bad():
        raise RuntimeError("an illegal memory access")

    cases = [gpu.Case("first", good), gpu.Case("second", bad), gpu.Case("third", good)]
    monkeypatch.setitem(gpu.STAGES, "kernels", lambda options: iter(cases))
    assert gpu.work("kernels", path, 60, options) == 0
    record = json.loads(path.read_text())["kernels"]
    assert [row["name"] for row in record["rows"]] == ["first", "second", "third"]
    assert "an illegal memory access" in record["rows"][1]["failed"]
    assert record["finished"]
    assert seen[1]["begun"] == "third"
    assert [row["name"] for row in seen[1]["rows"]] == ["first", "second"]
    assert [found[:2] for found in gpu.failures({"kernels": record})] == [("kernels", "second")]


def test_a_gpu_that_no_longer_answers_gets_a_new_process(gpu, monkeypatch, options, tmp_path):
    path = begin(gpu, tmp_path / "card.json", "kernels")
    cases = [gpu.Case("first", lambda: {"failed": "text"}), gpu.Case("second", lambda: {"value": 1})]
    monkeypatch.setitem(gpu.STAGES, "kernels", lambda options: iter(cases))
    monkeypatch.setattr(gpu, "answers", lambda device: False)
    monkeypatch.setattr(
        gpu, "run_worker", lambda stage, path, left, options: ("", gpu.work(stage, path, left, options))
    )
    gpu.run_stage("kernels", path, options)
    record = json.loads(path.read_text())["kernels"]
    assert [row["name"] for row in record["rows"]] == ["first", "second"]
    assert record["finished"]


def test_a_process_that_dies_loses_its_case_alone(gpu, monkeypatch, options, tmp_path):
    path = begin(gpu, tmp_path / "card.json", "kernels")
    runs = []

    def worker(stage, path, seconds, options):
        results = gpu.load(path)
        runs.append(seconds)
        if len(runs) == 1:
            results[stage]["rows"].append({"name": "first"})
            results[stage]["begun"] = "second"
        else:
            results[stage]["rows"].append({"name": "third"})
        gpu.save(path, results)
        return ("a segmentation fault", -11) if len(runs) == 1 else ("", 0)

    monkeypatch.setattr(gpu, "run_worker", worker)
    gpu.run_stage("kernels", path, options)
    rows = json.loads(path.read_text())["kernels"]["rows"]
    assert [row["name"] for row in rows] == ["first", "second", "third"]
    assert rows[1]["failed"] == "its process ended with status -11\na segmentation fault"
    assert runs[1] < runs[0] <= 60


def test_a_stage_that_cannot_begin_says_why(gpu, monkeypatch, options, tmp_path):
    path = begin(gpu, tmp_path / "card.json", "kernels")
    monkeypatch.setattr(gpu, "run_worker", lambda *_: ("ImportError: no pytest", 1))
    gpu.run_stage("kernels", path, options)
    ((stage, name, text),) = gpu.failures(gpu.load(path))
    assert (stage, name) == ("kernels", "the stage itself")
    assert text.endswith("ImportError: no pytest")


def test_a_worker_is_ended_with_what_it_began(gpu, monkeypatch, options, tmp_path):
    script, pid = tmp_path / "worker.py", tmp_path / "pid"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "print('on its way', file=sys.stderr, flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    said, status = gpu.run_worker("kernels", tmp_path / "card.json", 2.0, options)
    assert (said, status) == ("on its way\n", None)
    for _ in range(100):
        stat = Path(f"/proc/{pid.read_text()}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("its child lives on")


def test_what_takes_too_long_is_said_and_made_again(gpu, monkeypatch, options, tmp_path):
    path = begin(gpu, tmp_path / "card.json", "kernels")

    def worker(stage, path, seconds, options):
        results = gpu.load(path)
        results[stage]["begun"] = "first"
        gpu.save(path, results)
        return "", None

    monkeypatch.setattr(gpu, "run_worker", worker)
    gpu.run_stage("kernels", path, options)
    record = gpu.load(path)["kernels"]
    assert record["unfinished"] == "first"
    assert record["rows"] == []


@pytest.mark.parametrize(("resume", "commit", "kept"), [(True, "abc", 1), (False, "abc", 0), (True, "def", 0)])
def test_resume(gpu, monkeypatch, tmp_path, resume, commit, kept):
    """Rows are kept of the same card, versions and commit alone."""
    monkeypatch.setattr(gpu, "missing", lambda device: None)
    monkeypatch.setattr(gpu, "machine", lambda options: HERE)
    gpu.save(
        tmp_path / "NVIDIA_H200.json", {"kernels": {**HERE, "commit": commit, "rows": [KERNEL]}, "small": "as it is"}
    )
    found = []
    monkeypatch.setattr(gpu, "run_stage", lambda stage, path, options: found.append(gpu.load(path)[stage]["rows"]))
    assert gpu.main(["--stage", "kernels", "--out", str(tmp_path), *["--resume"] * resume]) == 0
    assert len(found[0]) == kept
    assert gpu.load(tmp_path / "NVIDIA_H200.json")["small"] == "as it is"


def test_status_and_text_of_a_failure(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "missing", lambda device: None)
    monkeypatch.setattr(gpu, "machine", lambda options: HERE)

    def run_stage(stage, path, options):
        rows = {"tests": [{"name": "nodes", "failed": "E assert 1 == 2"}], "kernels": [KERNEL]}[stage]
        gpu.save(path, gpu.load(path) | {stage: {**HERE, "rows": rows, "finished": True}})

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    assert gpu.main(["--stage", "tests", "kernels", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "| nodes | 0 | FAILED |" in out
    assert "| gaussian step | 10 | 91% | 200 | 3 | 4.00 |" in out, "what is measured is printed all the same"
    assert "FAILED, tests: nodes\nE assert 1 == 2" in err


def test_a_failed_group_of_tests_keeps_its_text(gpu, monkeypatch, options, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # no test there: pytest fails
    (case,) = gpu.test_cases(options)
    assert "test_kernels.py" in case.run()["failed"]


def test_tables(gpu, tmp_path):
    text = gpu.table([{"name": "copy and product"}, KERNEL, COMPILED, {"name": "third", "failed": "why"}])
    assert "| gaussian step | 10 | 91% | 200 | 3 | 4.00 | 3.00 | - |" in text
    bp, pc = (
        {"name": n, "method": n, "size": SIZE, "seconds": s, "products": 1.0} for n, s in (("BP", 0.5), ("PC", 1.0))
    )
    text = gpu.training_table([bp, pc, {"name": "PC, T=9", "failed": "out of memory"}])
    assert "| PC | 1000.00 | **2.00** | 1.00 | - |" in text
    assert "| PC, T=9 | FAILED | | | |" in text
    speeds = {"name": "copy and product", "copy_bytes_per_second": 3e12, "product_flops_per_second": 8e14}
    gpu.roofline([speeds, KERNEL], "NVIDIA H200", tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


def test_tuned_rows_become_a_table(gpu, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    rows = [{"name": "linear", "what": "linear", "dtype": "bfloat16", "row": [1024, 256, 256, 1.5]}, {"name": "chain"}]
    gpu.keep_tuned(rows, "NVIDIA H200", tmp_path / "tuned.json")
    table = json.loads((tmp_path / "tuned.json").read_text())
    assert table["linear"]["NVIDIA H200"]["bfloat16"] == [[1024, 256, 256, 1.5]]


def test_every_test_of_the_small_shapes_is_there(gpu):
    for tests in (gpu.SMALL_TESTS | gpu.ALL_TESTS).values():
        for test in tests.split():
            file, _, name = test.partition("::")
            text = (SCRIPT.parents[1] / file).read_text(encoding="utf-8")
            assert f"def {name}" in text
