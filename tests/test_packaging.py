"""The package as it is installed: a wheel with the kernels in it, and no need of triton or a GPU."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, pc_triton as pc
model = torch.nn.Sequential(pc.Linear(4, 8), torch.nn.Tanh(), pc.Linear(8, 3))
pc.FreeEnergy(model)(torch.randn(2, 4), torch.tensor([0, 2])).backward()
assert all(p.grad is not None for p in model.parameters())
try:
    with pc.use_backend("triton"):
        pc.FreeEnergy(model)(torch.randn(2, 4), torch.tensor([0, 2]))
except ImportError as error:
    assert "pip install" in str(error)
else:
    raise AssertionError("the kernels ran without triton")
"""

IMPORT = """
import sys, torch, pc_triton
assert not torch.cuda.is_initialized()
assert "triton" not in sys.modules and "pc_triton.compiled" not in sys.modules
"""


def python(code: str) -> None:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_without_triton():
    python(WITHOUT_TRITON)


def test_import_touches_no_driver():
    python(IMPORT)


def test_wheel(tmp_path):
    """It holds every module of the package and every kernel, once."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    wanted = {f"pc_triton/{p.name}" for p in (ROOT / "pc_triton").glob("*.py")}
    wanted |= {f"pc_triton/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert held == wanted
