"""What the compiled kernels need, on each target and with no GPU: see aot.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {"cuda:80": 166_912, "cuda:90": 232_448, "cuda:100": 232_448, "hip:gfx942": 65_536}
REGISTERS = {"cuda": 254, "hip": 512}  # at 255 ptxas has run out of them
SPILLS = 32  # bytes a thread: below the registers' limit ptxas trades a few for occupancy, differently in each version


@pytest.mark.parametrize("target", SHARED)
def test_resources(target, capsys):
    """No kernel runs out of registers or shared memory, and every offset has 64 bits."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot.py")
    run = subprocess.run([sys.executable, script, target], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) > 90
    over = [
        k
        for k in kernels
        if k["spills"] > SPILLS
        or k["registers"] > REGISTERS[target.split(":")[0]]
        or k["shared"] > SHARED[target]
        or k["narrow"]
    ]
    assert not over, over
    most = {key: max(k[key] for k in kernels) for key in ("registers", "spills", "shared")}
    with capsys.disabled():
        print(f"\n{target}: {len(kernels)} kernels, at most {most}")
