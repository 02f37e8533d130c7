"""A training step of a transformer by predictive coding, against backpropagation and plain autograd.

    python bench/training.py [--device cuda] [--steps 1 2 3 4] [--width 768 ...]

All methods train one model (one copy of its weights each) on one batch, AdamW included, and take turns within the run;
printed are the ratios of their times to backpropagation's under ``torch.compile`` (median over the turns, and the
quartiles), peak memory, and the products that the order of inference implies. The attention weights have no state here;
``--attention-state`` gives them one.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import pc_triton as pc
from pc_triton.models import Transformer


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    width: int
    heads: int
    blocks: int
    vocabulary: int
    context: int
    batch: int


SIZES = {
    "cpu": [Size(128, 4, 2, 1024, 64, 8)],
    "cuda": [Size(768, 12, 12, 32768, 1024, 16), Size(2048, 16, 12, 50304, 1024, 8)],
}


class Autograd:
    """The same predictive coding in eager torch as one would write it: errors are leaf tensors, F goes to autograd.

    Error order with fixed precision: T steps of gradient descent of F in the errors, then F's gradient in the weights.
    """

    def __init__(self, model: nn.Module, steps: int, precision: float = 100.0) -> None:
        self.model, self.steps, self.precision = model, steps, precision
        self.nodes = [m for m in model.modules() if isinstance(m, pc.Gaussian)]

    def free_energy(self, x: Tensor, y: Tensor, errors: dict[nn.Module, Tensor]) -> Tensor:
        """F, with the error of each node added to its prediction; an error that is not there yet is 0."""

        def add(node, inputs, mu):
            e = errors.setdefault(node, torch.zeros_like(mu, dtype=torch.float32).requires_grad_())
            return mu + e.to(mu.dtype)

        hooks = [node.register_forward_hook(add) for node in self.nodes]
        energy = F.cross_entropy(self.model(x).flatten(0, -2), y.flatten(), reduction="sum")
        for hook in hooks:
            hook.remove()
        return energy + 0.5 * self.precision * sum((e * e).sum() for e in errors.values())

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        errors: dict[nn.Module, Tensor] = {}
        for _ in range(self.steps - 1):
            energy = self.free_energy(x, y, errors)
            for e, grad in zip(errors.values(), torch.autograd.grad(energy, list(errors.values()))):
                e.data -= 0.5 / self.precision * grad
        return self.free_energy(x, y, {node: e.detach() for node, e in errors.items()}) / y.numel()


def methods(size: Size, device: str, steps: list[int], state: bool) -> dict[str, tuple[float, Callable[[], Any]]]:
    """For each method the products of its step, in units of a forward pass, and what sets it up as a function to time.

    The set-up returns a function that trains on the batch once.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def train(make: Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]) -> Callable[[], Any]:
        def build() -> Callable[[], None]:
            torch.manual_seed(0)
            sizes = asdict(size)
            del sizes["batch"]
            model = Transformer(attention=state, **sizes).to(device, dtype)
            loss, optimizer = make(model), torch.optim.AdamW(model.parameters(), 1e-4, fused=device == "cuda")
            x, y = torch.randint(size.vocabulary, (2, size.batch, size.context), device=device)

            def step() -> None:
                optimizer.zero_grad()
                loss(x, y).backward()
                optimizer.step()

            return step

        return build

    def bp(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    def free_energy(
        t: int, how: str = "", inference_dtype: torch.dtype | None = None
    ) -> Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]:
        def make(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
            whole = torch.compile(model) if how == "torch.compile" else model
            loss = pc.FreeEnergy(whole, steps=t, inference_dtype=inference_dtype)
            if how == "compile()":
                loss.compile()
            return loss

        return make

    found = {
        "BP, torch.compile": (3.0, train(lambda model: torch.compile(bp(model)))),
        "BP, eager": (3.0, train(bp)),
    }
    for t in steps:
        products = 2.0 * t + 1
        found[f"PC, T={t}"] = (products, train(free_energy(t)))
        for how in ("torch.compile", *(["compile()"] if device == "cuda" else [])):
            found[f"PC, T={t}, {how}"] = (products, train(free_energy(t, how)))
        if device == "cuda" and t > 1:
            for how in ("", "compile()"):
                name = f"PC, T={t}, inference in 8 bits" + (f", {how}" if how else "")
                found[name] = (products, train(free_energy(t, how, torch.float8_e4m3fn)))
        if not state:
            found[f"PC by plain autograd, T={t}"] = (products, train(lambda model, t=t: Autograd(model, t)))
    return found


def measure(size: Size, device: str, steps: list[int], state: bool, turns: int) -> list[dict[str, Any]]:
    """A row for each method; one that fails (for want of memory, say) has its reason."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch._dynamo.reset()  # models of other sizes count against the limit of recompilations
    ready: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    given = methods(size, device, steps, state).items()
    for name, (products, build) in tqdm(given, "building", leave=False, disable=None):
        rows[name] = {"method": name, "size": asdict(size), "attention_state": state, "products": products / 3}
        try:
            if device == "cuda":
                gc.collect()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            step = build()
            step()
            step()
            sync()
            if device == "cuda":
                rows[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            ready[name] = step
        except (RuntimeError, ValueError) as error:
            rows[name]["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in tqdm(range(turns), "turns", unit="turn", leave=False, disable=None):
        for name, step in ready.items():
            sync()
            start = time.perf_counter()
            step()
            sync()
            seconds[name].append(time.perf_counter() - start)
    base = seconds.get("BP, torch.compile") or seconds["BP, eager"]
    for name, times in seconds.items():
        ratios = [t / b for t, b in zip(times, base)]
        rows[name] |= {"seconds": median(times), "ratio": median(ratios), "quartiles": quantiles(ratios, n=4)[::2]}
    return list(rows.values())


def alone(method: str, size: Size, device: str, steps: list[int], state: bool, turns: int) -> dict[str, Any]:
    """A row for one of `methods`, with no other model in memory: its seconds a step, median and quartiles."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch._dynamo.reset()
    gc.collect()
    products, build = methods(size, device, steps, state)[method]
    row: dict[str, Any] = {"method": method, "size": asdict(size), "attention_state": state, "products": products / 3}
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    step = build()
    times = []
    for turn in range(2 + turns):  # the first two compile, and fill the optimiser's state
        sync()
        start = time.perf_counter()
        step()
        sync()
        if turn >= 2:
            times.append(time.perf_counter() - start)
    if device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return {**row, "seconds": median(times), "seconds_quartiles": quantiles(times, n=4)[::2]}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = ["| training step | time / compiled BP | quartiles | products / BP | peak MiB |", "|---" * 5 + "|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['method']} | {row['failed']} | | {row['products']:.2f} | |")
            continue
        low, high = row["quartiles"]
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "-"
        cells = [f"**{row['ratio']:.2f}**", f"{low:.2f} to {high:.2f}", f"{row['products']:.2f}", peak]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], metavar="T", help="default 1 2 4")
    parser.add_argument("--attention-state", action="store_true", help="give the attention weights a state")
    parser.add_argument("--turns", type=int, default=10, help="turns of each method, at least 2 (default 10)")
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    for name in Size.__dataclass_fields__:
        parser.add_argument(f"--{name}", type=int, help="default: " + ", ".join(
            f"{getattr(s, name)}" for sizes in SIZES.values() for s in sizes))  # fmt: skip
    given = parser.parse_args()
    own = {name: value for name in Size.__dataclass_fields__ if (value := getattr(given, name)) is not None}
    rows: list[dict[str, Any]] = []
    for size in dict.fromkeys(Size(**{**asdict(size), **own}) for size in SIZES[given.device]):
        measured = measure(size, given.device, given.steps, given.attention_state, max(2, given.turns))
        rows += measured
        print(f"\n{size} on {given.device}\n\n{table(measured)}", flush=True)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
