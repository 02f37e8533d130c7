"""Compile every kernel ahead of time for one target, through the real launchers and with no GPU; print what each needs.

    python tests/aot.py cuda:90        # or cuda:80, cuda:100, hip:gfx942

Prints one JSON line per compiled kernel: its name and configuration, registers, spilled bytes, bytes of shared memory,
and how many of its pointers have 32-bit offsets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class StubDriver:
    """As much of a driver as a compilation asks for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


def resources(kernel, target: GPUTarget) -> dict[str, int]:
    """Registers a thread, spilled bytes a thread and shared bytes a program of a compiled kernel."""
    shared = kernel.metadata.shared
    if target.backend == "hip":
        number = {
            key: int(re.search(rf"\.{key}:?\s+(\d+)", kernel.asm["amdgcn"]).group(1))
            for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        }
        spills = 4 * (number["vgpr_spill_count"] + number["sgpr_spill_count"])
        return {
            "registers": number["vgpr_count"],
            "spills": max(spills, number["private_segment_fixed_size"]),
            "shared": shared,
        }
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {"registers": int(found[1]), "spills": int(found[2]), "shared": shared}


def launches():
    """Each main configuration of each launcher, as (name, call)."""
    from pc_triton.kernels import bernoulli, categorical, gaussian, gaussian_logvar

    def tensor(*shape: int, dtype: torch.dtype = torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    steps = [("error", True, True, False), ("error", False, True, False), ("error", True, False, False)]
    steps += [("state", True, True, False), ("state", True, True, True), ("state", True, False, False)]

    def node(name, forward, step, mu, samples, cut=1, extra=(), **options):
        pi, state, g = tensor(samples), tensor(*mu.shape), tensor(*mu.shape[:-1], mu.shape[-1] // cut, dtype=mu.dtype)
        for form in ("error", "state"):
            yield f"{name} forward {form}", partial(forward, mu, state, pi, *extra, form=form, **options)
        for form, has_state, move, moved in steps:
            words = f"{name} step {form}{'' if has_state else ' fresh'}{'' if move else ' learn'}{' moved' * moved}"
            c, s = pi if move else None, state if has_state else None
            yield words, partial(step, mu, s, g, pi, c, c, *extra, form=form, moved=moved, **options)

    half = torch.bfloat16
    for module in (gaussian, bernoulli):
        kind = module.__name__.rsplit(".", 1)[1]
        functions = getattr(module, f"{kind}_forward"), getattr(module, f"{kind}_step")
        yield from node(f"{kind} 512x16384 bf16", *functions, tensor(512, 16384, dtype=half), 512)
        yield from node(f"{kind} 64x41 fp32", *functions, tensor(64, 41), 64)
    functions = gaussian_logvar.gaussian_logvar_forward, gaussian_logvar.gaussian_logvar_step
    for shape, dtype in (((512, 2048), half), ((64, 64), torch.float32)):
        noise = tensor(shape[0], shape[1] // 2, dtype=dtype)
        label = f"gaussian_logvar {shape[0]}x{shape[1]} {str(dtype)[6:]}"
        yield from node(label, *functions, tensor(*shape, dtype=dtype), 64, 2, (noise,))
    yield "gaussian 1x1", lambda: gaussian.gaussian_forward(tensor(1, 1), tensor(1, 1), tensor(1), form="error")
    functions = categorical.categorical_forward, categorical.categorical_step
    for columns, dtype in ((10, torch.float32), (1271, half), (4096, half), (131072, half)):
        label = f"categorical {columns} {str(dtype)[6:]}"
        yield from node(label, *functions, tensor(64, columns, dtype=dtype), 64)
    padding = tensor(2, 1024, dtype=torch.bool)
    for keys, options in ((1024, {"causal": True, "padding": padding}), (16384, {"causal": True})):
        label = f"attention {keys} {' '.join(options)}"
        yield from node(label, *functions, tensor(2, 8, 512, keys, dtype=half), 2, **options)
    for columns in (10, 8001, 131072):
        mu, labels, row = tensor(64, columns, dtype=half), tensor(64, dtype=torch.int64), tensor(64)
        yield f"clamped {columns} forward", partial(categorical.clamped_categorical_forward, mu, labels, -100)
        yield (
            f"clamped {columns} backward",
            partial(categorical.clamped_categorical_backward, mu, labels, row, row, -100),
        )


def main() -> None:
    backend, arch = sys.argv[1].split(":")
    target = GPUTarget(backend, arch if backend == "hip" else int(arch), 64 if backend == "hip" else 32)
    driver.set_active(StubDriver(target))
    compiled, run = [], JITFunction.run

    def warm_up(self, *args, grid, warmup, **options):
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = warm_up
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    for name, call in launches():
        if only in name:
            compiled.clear()
            call()
            for kernel in compiled:
                narrow = len(re.findall(r"tt\.addptr .*tensor<[0-9x]*i32>", kernel.asm["ttir"]))
                print(json.dumps({"kernel": name, **resources(kernel, target), "narrow": narrow}), flush=True)


if __name__ == "__main__":
    main()
