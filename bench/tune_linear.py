"""Measure where a linear layer and its node in one kernel beat cuBLAS and the node's own, for the rule of dispatch.

    python bench/tune_linear.py [--dtype bfloat16] [--out pc_triton/tuned.json]

For each shape it times what a layer takes in a training step by default (the forward of inference and of learning, the
backward that moves the state, the weight gradient), fused and apart, once both gave the same results; it prints the
times beside cuBLAS's products alone, and puts the ratio apart / fused into the table, in place of this device's and
dtype's rows. Exit status 1: a result differs, and nothing is written; 2: no GPU.
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
COUNTS = {"forward": 2, "backward": 1, "weight gradient": 1}
Call = Callable[[], tuple[torch.Tensor, ...]]


def parts(
    rows: int, n: int, k: int, dtype: torch.dtype, device: str = "cuda"
) -> tuple[dict[str, dict[str, Call]], torch.Tensor]:
    """The calls of a step by their names, fused, apart, and the products of cuBLAS alone; and the state they move."""
    from pc_triton.dispatch import backend

    x, weight, bias = (torch.randn(size, dtype=dtype, device=device) for size in ((rows, k), (n, k), (n,)))
    weight /= k**0.5
    grad, state = torch.randn(rows, n, dtype=dtype, device=device), torch.randn(rows, n, device=device)
    pi = torch.rand(rows, device=device) + 0.5
    keep, ops = pi / 3, backend(x)

    def backward_apart():
        new, _ = ops.gaussian_step(grad, state, grad, pi, keep, keep, form="error")
        return new, grad @ weight

    calls: dict[str, dict[str, Call]] = {
        "forward": {
            "fused": lambda: ops.linear_forward(x, weight, bias, state, pi, form="error"),
            "apart": lambda: ops.gaussian_forward(F.linear(x, weight, bias), state, pi, form="error"),
            "product": lambda: (F.linear(x, weight, bias),),
        },
        "backward": {
            "fused": lambda: ops.linear_backward(grad, weight, state, pi, keep, keep),
            "apart": backward_apart,
            "product": lambda: (grad @ weight,),
        },
        "weight gradient": {
            "fused": lambda: ops.linear_weight_gradient(grad, x),
            "apart": lambda: (grad.t() @ x, grad.sum(0)),
            "product": lambda: (grad.t() @ x,),
        },
    }
    return calls, state


def differs(calls: dict[str, dict[str, Call]], state: torch.Tensor) -> str | None:
    """The first part whose fused result is not the one apart, beyond the rounding of both."""
    start = state.clone()
    for name in COUNTS:
        results = []
        for way in ("fused", "apart"):
            state.copy_(start)
            results.append([t.clone() for t in calls[name][way]()])
        for a, b in zip(*results):
            allowed = 8 * torch.finfo(a.dtype).eps if a.dtype != torch.float32 else 1e-4
            if not (a.float() - b.float()).abs().max() <= allowed * b.float().abs().max():
                return name
    return None


def measure(rows: int, n: int, k: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a step each way. Raises RuntimeError if the ways differ."""
    from bench_kernels import seconds

    calls, state = parts(rows, n, k, dtype)
    wrong = differs(calls, state)
    if wrong:
        raise RuntimeError(f"{rows} rows, N={n}, K={k}: the fused {wrong} differs from cuBLAS and the node's kernel")
    return {
        way: sum(count * seconds(calls[name][way], "cuda") for name, count in COUNTS.items())
        for way in ("fused", "apart", "product")
    }


def write(table: Path, what: str, device: str, dtype: str, rows: list[list[float]]) -> None:
    """Put these rows [*sizes, ratio] in place of those of "linear" or "chain", device and dtype; a row a line."""
    known = json.loads(table.read_text()) if table.exists() else {}
    known.setdefault(what, {}).setdefault(device, {})[dtype] = rows
    text = json.dumps(known, indent=1, sort_keys=True)
    text = re.sub(r"\[\s+([-0-9.,\s]+?)\s+\]", lambda row: "[" + " ".join(row[1].split()) + "]", text)
    table.write_text(text + "\n", encoding="utf-8")


def begin(description: str, dtype: str, arguments: list[str] | None) -> argparse.Namespace | None:
    """The options of a tuner, dtype its default; None where there is no GPU, which it says on stderr."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=dtype)
    parser.add_argument("--out", type=Path, default=ROOT / "pc_triton" / "tuned.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; run this where there is one", file=sys.stderr)
        return None
    sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = begin("Measure where the fused linear layer wins, and keep it in the table.", "bfloat16", arguments)
    if options is None:
        return 2
    found: list[list[float]] = []
    print("| rows | N | K | fused ms | apart / fused | fused / cuBLAS's products |\n|---|---|---|---|---|---|")
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
    write(options.out, "linear", torch.cuda.get_device_name(), options.dtype, found)
    print(f"in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
