"""Measure where a linear layer and its node in one kernel beat cuBLAS and the node's own, for the rule of dispatch.

    python bench/tune_linear.py [--dtype bfloat16] [--tf32] [--out pc_triton/tuned.json]

For each shape it times the forward pass, which is what the kernel takes, fused and apart, once both gave the same
results; it prints the times beside cuBLAS's product alone, and puts the ratio apart / fused into the table, in place of
this device's and dtype's rows. ``--tf32``: float32 whose products may be TF32. Exit status 1: a result differs, and
nothing is written; 2: no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [  # rows, N, K: a transformer's layers at several widths and batches
    (rows, n * width, k * width)
    for rows in (1024, 4096, 16384, 65536)
    for width in (256, 512, 1024, 2048, 4096)
    for n, k in ((1, 1), (4, 1), (1, 4))
    if rows * width <= 2**27
]
Call = Callable[[], tuple[torch.Tensor, ...]]


def ways(rows: int, n: int, k: int, dtype: torch.dtype, device: str = "cuda") -> dict[str, Call]:
    """The forward pass fused and apart, and the product of cuBLAS alone."""
    from pc_triton.dispatch import backend

    x, weight, bias = (torch.randn(size, dtype=dtype, device=device) for size in ((rows, k), (n, k), (n,)))
    weight /= k**0.5
    state, pi = torch.randn(rows, n, device=device), torch.rand(rows, device=device) + 0.5
    ops = backend(x)
    return {
        "fused": lambda: ops.linear_forward(x, weight, bias, state, pi),
        "apart": lambda: ops.gaussian_forward(F.linear(x, weight, bias), state, pi, form="error"),
        "product": lambda: (F.linear(x, weight, bias),),
    }


def differs(found: dict[str, Call]) -> bool:
    """Whether the fused result is not the one apart, beyond the rounding of both."""
    from pc_triton.kernels.common import product_precision

    for a, b in zip(found["fused"](), found["apart"]()):
        eps = torch.finfo(a.dtype).eps
        if a.dtype == torch.float32:
            eps = 1e-3 if product_precision(a.dtype) == "tf32" else 1.25e-5
        if not (a.float() - b.float()).abs().max() <= 8 * eps * b.float().abs().max():
            return True
    return False


def measure(rows: int, n: int, k: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds each way. Raises RuntimeError if the ways differ."""
    from bench_kernels import seconds

    calls = ways(rows, n, k, dtype)
    if differs(calls):
        raise RuntimeError(f"{rows} rows, N={n}, K={k}: the fused forward differs from cuBLAS and the node's kernel")
    return {way: seconds(call, "cuda") for way, call in calls.items()}


def write(table: Path, what: str, device: str, kind: str, rows: list[list[float]]) -> None:
    """Put these rows [*sizes, ratio] in place of those of "linear" or "chain", device and kind; a row a line."""
    known = json.loads(table.read_text()) if table.exists() else {}
    known.setdefault(what, {}).setdefault(device, {})[kind] = rows
    text = json.dumps(known, indent=1, sort_keys=True)
    text = re.sub(r"\[\s+([-0-9.,\s]+?)\s+\]", lambda row: "[" + " ".join(row[1].split()) + "]", text)
    table.write_text(text + "\n", encoding="utf-8")


def begin(description: str, dtype: str, arguments: list[str] | None) -> argparse.Namespace | None:
    """The options of a tuner, dtype its default; None where there is no GPU, which it says on stderr.

    ``kind`` is the table's word for the dtype.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=dtype)
    parser.add_argument("--tf32", action="store_true", help="float32 whose products may be TF32")
    parser.add_argument("--out", type=Path, default=ROOT / "pc_triton" / "tuned.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; run this where there is one", file=sys.stderr)
        return None
    if options.tf32:
        options.dtype = "float32"
        torch.set_float32_matmul_precision("high")
    options.kind = "tf32" if options.tf32 else options.dtype
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = begin("Measure where the fused linear layer wins, and keep it in the table.", "bfloat16", arguments)
    if options is None:
        return 2
    found: list[list[float]] = []
    print("| rows | N | K | fused ms | apart / fused | fused / cuBLAS's product |\n|---|---|---|---|---|---|")
    with torch.no_grad():
        for rows, n, k in SHAPES:
            try:
                time = measure(rows, n, k, getattr(torch, options.dtype))
            except RuntimeError as error:
                print(f"{error}: nothing is written", file=sys.stderr)
                return 1
            ratio = time["apart"] / time["fused"]
            cells = rows, n, k, f"{1e3 * time['fused']:.3f}", f"{ratio:.3f}", f"{time['fused'] / time['product']:.3f}"
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            found.append([rows, n, k, round(ratio, 3)])
    write(options.out, "linear", torch.cuda.get_device_name(), options.kind, found)
    print(f"in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
