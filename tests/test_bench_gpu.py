"""What a CPU can show of ``bench/gpu.py``: it refuses without a GPU and on a red gate, and its table and file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"
ROW = {
    "kernel": "gaussian step",
    "elements": 1024,
    "bytes_each": 10.0,
    "flops_each": 5,
    "seconds": 2e-4,
    "peak_bytes": 3 * 2**20,
    "of_floor": 0.914,
    "rivals": {"eager": {"seconds": 8e-4, "peak_bytes": 1}, "compiled": {"failed": "RuntimeError: no compiler"}},
}


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


def test_red_gate(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # no test there: pytest fails
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu, "measure_all", lambda deadline: pytest.fail("measured on a red gate"))
    assert gpu.main(["--out", str(tmp_path / "results")]) == 1
    assert capsys.readouterr().err == "the GPU's tests do not pass: nothing is measured\n"
    assert not (tmp_path / "results").exists()


def test_table_and_file(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "tests_pass", lambda timeout: True)
    monkeypatch.setattr(gpu, "measure_all", lambda deadline: [ROW])
    monkeypatch.setattr(gpu, "measure_small", lambda deadline: [{"method": "PCX", "ratio": 9.0}])
    monkeypatch.setattr(gpu, "measure_training", lambda deadline: [{"method": "PC, T=3", "ratio": 2.0}])
    monkeypatch.setitem(
        sys.modules, "bench_kernels", SimpleNamespace(copy_speed=lambda *_: 3e12, product_speed=lambda _: 8e14)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert gpu.main(["--commit", "abc", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "NVIDIA_H200.json").read_text())
    assert written["rows"] == [ROW]
    assert written["small"] == [{"method": "PCX", "ratio": 9.0}]
    assert written["training"] == [{"method": "PC, T=3", "ratio": 2.0}]
    assert (tmp_path / "NVIDIA_H200.png").read_bytes().startswith(b"\x89PNG")
    assert written["commit"] == "abc"
    assert written["torch"] == torch.__version__
    assert "| gaussian step | 10 | 91% | 200 | 3 | 4.00 | - |" in capsys.readouterr().out
