"""What every kernel needs on each target: compiled ahead of time, through the real launchers and with no GPU.

    python tests/aot.py [cuda:90 ...]    # registers a thread, bytes spilled a thread, bytes of shared memory a program
    python tests/aot.py --record         # the same, kept in resources.json for this version of Triton
    python tests/aot.py --pairs          # attention's machine instructions a pair of query and key, on sm_90

A stub driver tells Triton which GPU it has; the launchers then compile for it and launch nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FEW = ("cuda:86", "cuda:89", "cuda:120")
"""Targets of 99 KiB of shared memory a program, such as A10 and RTX 3090, L4 and RTX 4090, RTX 5090. For them only what
is in LARGEST is compiled: of each kernel the largest tiles."""
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942", *FEW)
LARGEST = (
    "categorical 64x131072 step error",
    "attention 64 bfloat16 (forward|step)",
    "attention 128 bfloat16 (forward|step)( segments)?",
    "attention (64|128) float32 step tf32",
    "linear 16384x4096x4096( float32 tf32)?",
    "linear 16384x4096x4100",
    "chain .* labels( tf32)?",
    "float8_.*",
)
NO_FLOAT8 = ("cuda:80", "cuda:86", "hip:gfx942")
"""Targets without the conversions that ``kernels/float8.py`` makes; its launchers are not called there."""
TF32 = (
    "attention (64|128) float32 (fall|first step|forward|step)",
    "linear 16384x4096x4096 float32",
    "chain .* float32 labels",
)
RECORD = Path(__file__).with_name("resources.json")


class StubDriver:
    """As much of a driver as a compilation asks for. Each target has a number of its own, by which Triton caches."""

    def __init__(self, target: str):
        backend, arch = target.split(":")
        self.device = TARGETS.index(target)
        self.target = GPUTarget(backend, *((int(arch), 32) if backend == "cuda" else (arch, 64)))

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


def cuobjdump(kernel, option: str) -> str:
    """What NVIDIA's tool says of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        return subprocess.run([tool, option, cubin.name], capture_output=True, text=True, check=True).stdout


def resources(kernel) -> list[int]:
    """Registers, spilled bytes and shared bytes of a compiled kernel, whose offsets must have 64 bits.

    On sm_90 its products of half precision, of 64 rows or more, must be wgmma's, with no wait that Triton did not ask
    for.
    """
    narrow = re.findall(r"tt\.addptr .*tensor<[0-9x]*i32>", kernel.asm["ttir"])
    assert not narrow, f"{kernel.name}: 32-bit offsets overflow past 2^31 elements: {narrow}"
    if "amdgcn" in kernel.asm:
        number = {
            key: int(re.search(rf"\.{key}:?\s+(\d+)", kernel.asm["amdgcn"]).group(1))
            for key in ("vgpr_count", "private_segment_fixed_size")  # scalar registers spill into vector registers
        }
        return [number["vgpr_count"], number["private_segment_fixed_size"], kernel.metadata.shared]
    usage = cuobjdump(kernel, "-res-usage")
    halves = re.findall(r"tt\.dot .*: tensor<(\d+)x[0-9]+xb?f16>", kernel.asm["ttir"])
    if halves and min(map(int, halves)) >= 64 and kernel.metadata.target.arch == 90:
        sass, waits = cuobjdump(kernel, "-sass"), len(re.findall(r"wgmma\.wait_group", kernel.asm["ptx"]))
        old = triton.__version__.startswith("3.6.")  # whose ptxas serialises those of a split or masked linear layer
        assert "HGMMA" in sass, f"{kernel.name}: no wgmma"
        assert old or len(re.findall(r"WARPGROUP\.DEPBAR", sass)) <= waits, (
            f"{kernel.name}: ptxas serialises its wgmma's"
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return [int(found[1]), int(found[2]), kernel.metadata.shared]


# Form, whether there is a state, whether it moves, whether the gradient is that of the moved state: every branch.
STEPS = {
    "step error": ("error", True, True, False),
    "step error fresh": ("error", False, True, False),
    "step state moved": ("state", True, True, True),
    "step state learn": ("state", True, False, False),
}
HEAVIEST = ("forward error", "step error", "step state moved")
ERRORS = ("forward error", "step error")
HALF = {"label": " bfloat16 state", "only": ERRORS, "state_dtype": torch.bfloat16}


def launches():
    """Every kernel at every branch, and the heaviest branches at each shape of tile, as (name, call)."""
    from pc_triton.kernels import (
        attention,
        attention_first,
        bernoulli,
        categorical,
        chain,
        clamped,
        fall,
        float8,
        gaussian,
        gaussian_logvar,
        guard,
        laplace,
        linear,
        student_t,
    )

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    def node(
        module,
        *shape: int,
        label="",
        only=None,
        samples=None,
        dtype=torch.bfloat16,
        state_dtype=torch.float32,
        **options,
    ):
        family = module.__name__.rpartition(".")[2]
        forward, step = getattr(module, f"{family}_forward"), getattr(module, f"{family}_step")
        mu, state = tensor(*shape, dtype=dtype), tensor(*shape, dtype=state_dtype)
        pi, grad, extra = tensor(samples or shape[0], dtype=torch.float32), mu, ()
        units = (options.pop("unit"),) if "unit" in options else ()
        if module is gaussian_logvar:
            grad = tensor(*shape[:-1], shape[-1] // 2, dtype=dtype)
            extra = (grad,)
        calls = {
            f"forward {form}": partial(forward, mu, state, pi, *units, *extra, form=form, **options)
            for form in ("error", "state")
        }
        for name, (form, has_state, moves, moved) in STEPS.items():
            c, s = pi if moves else None, state if has_state else None
            calls[name] = partial(step, mu, s, grad, pi, *units, c, c, *extra, form=form, moved=moved, **options)
        for name in only or calls:
            yield f"{family} {'x'.join(map(str, shape))}{label} {name}", calls[name]

    def layer(n: int, k: int, dtype=torch.bfloat16, state_dtype=torch.float32):
        rows = 64 if n == 64 else 16384
        x, weight, bias = (tensor(*size, dtype=dtype) for size in ((rows, k), (n, k), (n,)))
        state, pi = tensor(rows, n, dtype=state_dtype), tensor(rows, dtype=torch.float32)
        kind = " float32" if dtype == torch.float32 else ""
        kind += " bfloat16 state" if state_dtype == torch.bfloat16 else ""
        yield f"linear {rows}x{n}x{k}{kind}", partial(linear.linear_forward, x, weight, bias, state, pi)

    def network(samples: int, *widths: int, labels=True, dtype=torch.bfloat16):
        last, kind = widths[-1], str(dtype).removeprefix("torch.")
        call = partial(
            chain.chain_gradient,
            tensor(samples, widths[0], dtype=dtype),
            tensor(samples, dtype=torch.int64) if labels else tensor(samples, last, dtype=dtype),
            tensor(dtype=torch.float32),
            [tensor(n, k, dtype=dtype) for k, n in pairwise(widths)],
            [tensor(n, dtype=dtype) for n in widths[1:]],
            ("gelu", *["tanh"] * (len(widths) - 3)),
            steps=4,
            step=0.25,
            guards=True,
            precision=None,
            displacement=0.003,
            trust=0.3,
            least=1e-3,
            ignore_index=-100,
        )
        name = f"chain {samples}: {'-'.join(map(str, widths))} {kind}"
        yield f"{name} {'labels' if labels else 'values'}", call

    yield from node(gaussian, 512, 16384)
    yield from node(bernoulli, 512, 16384)
    unit = tensor(512, dtype=torch.float32)
    yield from node(laplace, 512, 16384, unit=unit)
    yield from node(student_t, 512, 16384, unit=unit, nu=4.0)
    yield from node(gaussian_logvar, 512, 2048, samples=64)
    yield from node(categorical, 64, 131072, only=HEAVIEST)
    yield from node(categorical, 64, 4096, only=HEAVIEST)
    yield from node(categorical, 64, 10, only=HEAVIEST, dtype=torch.float32)
    for module in (gaussian, bernoulli):
        yield from node(module, 512, 16384, **HALF)
    yield from node(gaussian_logvar, 512, 2048, samples=64, **HALF)
    yield from node(categorical, 64, 4096, **HALF)
    masks = {"causal": True, "padding": tensor(2, 1024, dtype=torch.bool)}
    yield from node(categorical, 2, 8, 512, 1024, label=" causal padding", **masks)
    documents = {"causal": True, "segments": tensor(2, 1024, dtype=torch.int64)}
    yield from node(categorical, 2, 8, 1024, 1024, label=" causal segments", only=HEAVIEST[1:2], **documents)
    for head, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32), (128, torch.float32)):
        q, keys = tensor(2, 8, 1024, head, dtype=dtype), tensor(2, 4, 1024, head, dtype=dtype)
        state, pi = tensor(2, 8, 1024, 1024, dtype=torch.float32), tensor(2, dtype=torch.float32)
        facts, options = tensor(3, 2, 8, 1024, dtype=torch.float32), {"scale": 0.125, **masks}
        label = f"attention {head} {str(dtype).removeprefix('torch.')}"
        first = (q, keys, keys, q, q)
        yield f"{label} fall", partial(attention_first.attention_fall, *first, 2, **options)
        yield f"{label} first step", partial(attention_first.attention_first_step, *first, pi, pi, **masks)
        states = {"": state, " fresh": None}
        if dtype == torch.bfloat16:
            states[" bfloat16 state"] = state.bfloat16()
        for name, e in states.items():
            forward = partial(attention.attention_forward, q, keys, keys, e, pi, **options)
            step = partial(attention.attention_step, q, keys, keys, q, q, e, pi, pi, pi, facts, **options)
            yield f"{label} forward{name}", forward
            yield f"{label} step{name}", step
            if e is not None and dtype == torch.bfloat16:
                yield f"{label} forward segments", partial(forward, padding=None, **documents)
                yield f"{label} step segments", partial(step, padding=None, **documents)
    for module in (gaussian, categorical):
        yield from node(module, 1, 1, only=HEAVIEST[:1])
    wide = tensor(512, 16384)
    yield "fall 512x16384 location", partial(fall.location_fall, wide, wide, 512)
    yield "fall 512x16384 bernoulli", partial(fall.bernoulli_fall, wide, wide, 512)
    pi = tensor(512, dtype=torch.float32)
    only_move = partial(gaussian.gaussian_forward, wide, wide, pi, form="error", move=pi)
    yield "gaussian 512x16384 forward after its only move", only_move
    rose, states = tensor(512, dtype=torch.bool), tensor(512, 16384, dtype=torch.float32)
    yield "guard 512x16384", partial(guard.guard_step, states, states, rose)
    for dtype in float8.FLOAT8:
        kind = str(dtype).removeprefix("torch.")
        for shape in ((16384, 768), (16384, 8192), (64, 131072)):
            yield f"{kind} {'x'.join(map(str, shape))}", partial(float8.rows_rounded, tensor(*shape), dtype)
    logits, classes = tensor(64, 131072), tensor(64, dtype=torch.int64)
    yield "float8_e5m2 clamped 64x131072", partial(clamped.clamped_categorical_rounded, logits, classes, -100)
    yield "float8_e4m3fn weight 8192x2048", partial(float8.weight_rounded, tensor(8192, 2048), float8.FLOAT8[0])
    for columns in (10, 131072):
        mu, labels, row = tensor(64, columns), tensor(64, dtype=torch.int64), tensor(64, dtype=torch.float32)
        backward = partial(clamped.clamped_categorical_backward, mu, labels, row, row, -100)
        yield f"clamped 64x{columns} forward", partial(clamped.clamped_categorical_forward, mu, labels, -100)
        yield f"clamped 64x{columns} backward", backward
        yield f"clamped 64x{columns} in place", partial(clamped.clamped_categorical_gradient_, mu, labels, -100)
    for n, k in ((4096, 4096), (1024, 1024), (4096, 4100)):
        yield from layer(n, k)
    yield from layer(4096, 4096, dtype=torch.float32)
    yield from layer(64, 64)
    yield from layer(4096, 4096, state_dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        yield from network(128, 64, 128, 128, 10, dtype=dtype)
        yield from network(16384, 256, 256, 256, labels=False, dtype=dtype)


def in_tf32(call) -> None:
    """Call it where float32's products may be TF32."""
    torch.set_float32_matmul_precision("high")
    try:
        call()
    finally:
        torch.set_float32_matmul_precision("highest")


def of_target(target: str):
    """The launches that are compiled for a target, some of float32 with products in TF32 too; AMD's stay exact."""
    for name, call in launches():
        if target in NO_FLOAT8 and name.startswith("float8_"):
            continue
        calls = {name: call}
        if any(re.fullmatch(like, name) for like in TF32) and not target.startswith("hip"):
            calls[f"{name} tf32"] = partial(in_tf32, call)
        for label, each in calls.items():
            if target not in FEW or any(re.fullmatch(like, label) for like in LARGEST):
                yield label, each


def watch() -> list[tuple]:
    """From here on kernels are compiled and not launched; they are listed here, each with its launch options."""
    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append((run(self, *args, grid=grid, warmup=True, **options), options))

    JITFunction.run = compile_only
    return compiled


def loop_length(kernel) -> int:
    """How many machine instructions a kernel's longest loop has. It ends with a branch back to its first address."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", cuobjdump(kernel, "-sass"))
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    branches = ((i, re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) for i, (_, text) in enumerate(lines))
    return max((i - place[int(to[1], 16)] + 1 for i, to in branches if to), default=0)


def pairs() -> dict[str, float]:
    """Instructions of a thread in the loop of each of attention's kernels, times threads, a pair of query and key.

    In bfloat16 at head dimension 64, causal, with a float32 state, on sm_90. A warp that computes what another one
    has, or loads element by element, shows here; how long an instruction takes does not.
    """
    from pc_triton.kernels import attention

    compiled = watch()
    driver.set_active(StubDriver("cuda:90"))
    q = torch.empty(2, 8, 1024, 64, dtype=torch.bfloat16, device="meta")
    state, pi, facts = (torch.empty(size, device="meta") for size in ((2, 8, 1024, 1024), (2,), (3, 2, 8, 1024)))
    attention.attention_forward(q, q, q, state, pi, scale=0.125, causal=True)
    attention.attention_step(q, q, q, q, q, state, pi, pi, pi, facts, scale=0.125, causal=True)
    return {
        kernel.name.strip("_"): loop_length(kernel) * 32 * kernel.metadata.num_warps / options["ROWS"] / options["COLS"]
        for kernel, options in compiled
    }


def measure(targets) -> dict[str, dict[str, list[int]]]:
    """[registers, spills, shared] of every kernel on each of these targets."""
    compiled = watch()
    found: dict[str, dict[str, list[int]]] = {}
    for target in targets:
        driver.set_active(StubDriver(target))
        torch.version.hip = "stub" if target.startswith("hip") else None
        for name, call in of_target(target):
            compiled.clear()
            call()
            for kernel, _ in compiled:
                assert ("tf32" in kernel.asm.get("ptx", "")) == ("tf32" in name), f"{name}: other products"
                label = name if len(compiled) == 1 else f"{name}, {kernel.name.strip('_')}"
                found.setdefault(label, {})[target] = resources(kernel)
    return found


def keep(found: dict[str, dict[str, list[int]]]) -> None:
    """Put these numbers into resources.json, a line a kernel, in place of this Triton version's."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[".".join(triton.__version__.split(".")[:2])] = found
    versions = [
        f'"{version}": {{\n' + ",\n".join(f"{json.dumps(name)}: {json.dumps(need)}" for name, need in kernels.items())
        for version, kernels in sorted(record.items())
    ]
    RECORD.write_text("{\n" + "\n},\n".join(versions) + "\n}\n}\n")


def main() -> None:
    if "--pairs" in sys.argv:
        print(json.dumps(pairs()))
        return
    record = "--record" in sys.argv
    found = measure(TARGETS if record else sys.argv[1:] or TARGETS)
    if record:
        keep(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
