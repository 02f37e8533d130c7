"""What the compiled kernels need, on each target and with no GPU: see aot.py, and resources.json for its record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

AOT = Path(__file__).with_name("aot.py")
SHARED = {"cuda:80": 166_912, "cuda:90": 232_448, "cuda:100": 232_448, "hip:gfx942": 65_536}
SHARED |= dict.fromkeys(("cuda:86", "cuda:89", "cuda:120"), 101_376)
REGISTERS = {"cuda": 254, "hip": 512}  # at 255 ptxas has run out of them
SPILLS = 32  # bytes a thread: below the registers' limit ptxas trades a few for occupancy, differently in each version
SLACK = (8, 8, 0)  # what a kernel may grow beyond its record: registers, spilled bytes, shared bytes

PAIRS = {"forward": 86, "grad_queries": 45, "step_keys": 75}  # attention's instructions a pair of query and key


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, list[int]]]:
    """[registers, spills, shared] by kernel and target, compiled in a process where Triton does not interpret."""
    return compiled()


def compiled(*arguments: str) -> dict:
    """What aot.py prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, AOT, *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("target", SHARED)
def test_within_the_limits(target, kernels):
    """No kernel runs out of registers or of shared memory."""
    limits = REGISTERS[target.split(":")[0]], SPILLS, SHARED[target]
    needs = {name: by_target[target] for name, by_target in kernels.items() if target in by_target}
    assert needs
    over = {name: need for name, need in needs.items() if any(map(int.__gt__, need, limits))}
    assert not over, f"{over} over {limits}"


def test_no_more_than_the_record(kernels):
    """No kernel grew under this version of Triton; where that was meant, ``python tests/aot.py --record``."""
    record = json.loads(AOT.with_name("resources.json").read_text()).get(".".join(triton.__version__.split(".")[:2]))
    if record is None:
        pytest.skip(f"resources.json has no record for Triton {triton.__version__}")
    assert record.keys() == kernels.keys(), "other kernels than in resources.json: python tests/aot.py --record"
    grown = [
        (name, target, need, record[name][target])
        for name, by_target in kernels.items()
        for target, need in by_target.items()
        if any(new > old + slack for new, old, slack in zip(need, record[name][target], SLACK))
    ]
    assert not grown, f"kernel, target, [registers, spills, shared] now and on record: {grown}"


def test_attention_computes_no_pair_twice():
    """On sm_90 at head dimension 64. With warps that compute the same it was 158, 87 and 75."""
    found = compiled("--pairs")
    assert found.keys() == PAIRS.keys()
    assert all(found[name] <= most for name, most in PAIRS.items()), f"{found} over {PAIRS}"
