"""Whether the emulator reports a barrier that is missing: each ``bar.sync`` of each kernel removed in turn.

    PYTHONPATH=.:tests python tests/mutate_barriers.py [80 [chain]]    # of each kernel: how many of its barriers

A barrier that is not reported is tried again in the kernel's next launch, of other sizes. What is left is listed with
its line of the source: no launch needs that barrier, or the emulator missed it.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
import triton

triton.knobs.runtime.interpret = False
os.environ |= {"TRITON_INTERPRET": "1", "PTX_EMULATED": "1"}

import ptx_emulator  # noqa: E402
from ptx_emulator import STATS, Fault, Kernel, driver  # noqa: E402

BARRIER = re.compile(r"^\s*bar(?:rier)?\.sync\b[^\n]*\n", re.M)


class Mutated(Kernel):
    """A kernel that first runs without each of its barriers, and leaves its tensors as it found them."""

    left: dict[tuple[str, str], list[re.Match[str]]] = {}  # by name and text, what was not reported yet  # noqa: RUF012

    def __init__(self, ptx: str, name: str, warps: int = 4, shared: int = 0):
        super().__init__(ptx, name, warps, shared)
        self.ptx = ptx

    def __call__(self, grid, arguments) -> None:
        left = self.left.setdefault((self.name, self.ptx), list(BARRIER.finditer(self.ptx)))
        left[:] = [barrier for barrier in left if not self.reports(barrier, grid, arguments)]
        STATS.reports.clear()
        super().__call__(grid, arguments)
        assert not STATS.reports, STATS.reports

    def reports(self, barrier: re.Match[str], grid, arguments) -> bool:
        """Whether the emulator has something to report of this launch without the barrier."""
        tensors = [value for _, value in arguments if isinstance(value, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        STATS.reports.clear()
        try:
            mutant = self.ptx[: barrier.start()] + self.ptx[barrier.end() :]
            Kernel(mutant, self.name, self.warps, self.shared)(grid, arguments)
            found = bool(STATS.reports)
        except Fault:
            found = True
        for tensor, old in zip(tensors, before):
            tensor.copy_(old)
        return found


def place(ptx: str, barrier: re.Match[str]) -> str:
    """Where a barrier is in the source."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', ptx))
    file, line = (re.findall(r"\.loc\s+(\d+)\s+(\d+)", ptx[: barrier.start()]) or [("", "?")])[-1]
    return f"{files.get(file, '?')}:{line}"


def launches() -> dict[str, list[Callable[[], object]]]:
    """Every kernel with barriers, at shapes that take all of its loops, by where it is."""
    import test_attention_kernels as attention
    import test_chain as chain
    import test_kernels as nodes
    import test_linear_kernels as linear

    spot = "cpu", torch.float16
    calls: dict[str, list[Callable[[], object]]] = {"nodes": []}
    for family in nodes.MODULES:
        for columns in (41, 5000):
            mu, state, grad, c, extra = nodes.problem(family, (2, columns), 2, spot, "error")
            calls["nodes"].append(lambda a=(family, mu, state, c, extra): nodes.check_forward(*a, "error"))
            calls["nodes"].append(lambda a=(family, mu, state, grad, c, extra): nodes.check_step(*a, "error", True))
    sizes = ((65, 17, 40, 13), (65, 150, 170, 13), (150, 70, 90, 2))
    calls["linear"] = [lambda s=size: linear.check_all(*s, spot) for size in sizes]
    calls["attention"] = []
    for heads, queries, keys in ((2, 65, 70), (3, 40, 130)):
        q, k, v, grad_out, state, c = attention.problem(spot, heads, 1, queries, keys, 16)
        options = {"causal": True, "padding": attention.hide(keys)}
        calls["attention"].append(lambda a=(q, k, v, grad_out, state, c), o=options: attention.check(*a, **o))
    torch.manual_seed(0)
    calls["chain"] = []
    for samples, widths in ((16, (64, 70, 64, 10)), (35, (70, 130, 70, 80))):
        problem = chain.network(widths), *chain.batch(samples, widths[0], widths[-1]), spot
        calls["chain"].append(lambda a=problem: chain.compare(*a, steps=4, precision=0.05))
    return calls


def main() -> None:
    arch = int(sys.argv[1]) if len(sys.argv) > 1 else 80
    driver.Kernel = Mutated
    ptx_emulator.activate(arch)
    for where, calls in launches().items():
        for call in calls if where in (sys.argv[2:] or [where]) else []:
            call()
    total: Counter[str] = Counter()
    missed: dict[str, Counter[str]] = defaultdict(Counter)
    for (name, ptx), left in Mutated.left.items():
        total[name] += len(BARRIER.findall(ptx))
        missed[name].update(place(ptx, barrier) for barrier in left)
    for name, count in total.items():
        others = missed[name]
        print(f"sm_{arch} {name}: {count - others.total()} of {count} reported; the others {dict(others)}")
    found = total.total() - sum(others.total() for others in missed.values())
    print(f"Triton {triton.__version__}, sm_{arch}: {found} of {total.total()}")


if __name__ == "__main__":
    main()
