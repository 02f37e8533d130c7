"""The package as it is distributed: the kernels are in it, it needs no triton and no GPU, and its version is one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
import venv
import zipfile
from pathlib import Path

import pytest

import pc_triton
from pc_triton import dispatch

ROOT = Path(__file__).resolve().parents[1]
DATA = {"pc_triton/py.typed", "pc_triton/tuned.json"}

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


def python(code: str, *arguments: Path) -> None:
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def pip(*arguments: str | Path) -> None:
    run = subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_without_triton():
    python(WITHOUT_TRITON)


def test_a_folder_of_that_name_is_no_triton(monkeypatch):
    """Such as a clone of its repository, which Python takes for a package without a file."""
    monkeypatch.setattr(dispatch, "_triton", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    folder = types.ModuleType("triton")
    folder.__path__ = []
    monkeypatch.setitem(sys.modules, "triton", folder)
    with pytest.raises(ImportError, match="the Triton kernels need triton: pip install"):
        dispatch.triton_kernels()
    assert not dispatch._has_triton()


def test_an_old_triton_is_refused(monkeypatch):
    """By name and with the remedy; a GPU is then served by plain torch, as without triton."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "_triton", None)
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(ImportError, match=r"this is 3\.5\.1, and they need 3\.6: torch 2\.10"):
        dispatch.triton_kernels()
    assert not dispatch._has_triton()
    monkeypatch.setattr(triton, "__version__", "3.10.0+git1")
    assert dispatch._has_triton()


def test_import_touches_no_driver():
    python(IMPORT)


def test_the_version_is_one():
    """In the package, at the top of the changes and in the citation, with its date."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version, date = re.findall(r"^## \[(\d.*)\]: (\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)[0]
    assert version == pc_triton.__version__
    assert re.findall(r"^(?:version|date-released): (.+)$", citation, re.MULTILINE) == [version, date]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("dist")
    python("import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])", folder)
    (sdist,) = folder.glob("*.tar.gz")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_distributions(built):
    """The source distribution is what the wheel is made of, without tests; the wheel every module and kernel, once."""
    modules = {f"pc_triton/{p.name}" for p in (ROOT / "pc_triton").glob("*.py")}
    kernels = {f"kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    sdist, wheel = built
    assert sdist.name == f"pc_triton-{pc_triton.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if name.endswith(".py")} == {"setup.py", *modules, *kernels}
    assert names >= {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", *DATA}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {*modules, *DATA, *(f"pc_triton/{kernel}" for kernel in kernels)}


def test_types_from_outside(built, tmp_path):
    """mypy infers the types of a user's program from the wheel, installed, and sees what is wrong in it."""
    pytest.importorskip("mypy")
    venv.create(tmp_path / "venv")
    (site,) = tmp_path.glob("venv/lib/*/site-packages")
    pip("install", "--no-deps", "--target", site, built[1])
    (site / "torch.pth").write_text("\n".join(sysconfig.get_paths()[name] for name in ("purelib", "platlib")))
    found = shutil.copy(ROOT / "tests" / "typing" / "user_program.py", tmp_path)
    options = ["--strict", "--python-executable", tmp_path / "venv" / "bin" / "python", "--cache-dir", tmp_path]
    command = [sys.executable, "-m", "mypy", *options, found]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
