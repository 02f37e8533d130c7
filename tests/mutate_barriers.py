"""Whether the emulator reports a barrier that is missing: each ``bar.sync`` of each kernel removed in turn.

    PYTHONPATH=.:tests python tests/mutate_barriers.py [80]    # of each kernel: barriers, and how many were missed

What is not reported is listed with its line of the source: the emulator missed it, or nothing needs the barrier.
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
removed: Counter[str] = Counter()
reported: Counter[str] = Counter()
missed: dict[str, Counter[str]] = defaultdict(Counter)


class Mutated(Kernel):
    """A kernel that first runs without each of its barriers, and leaves its tensors as it found them."""

    seen: set[str] = set()  # noqa: RUF012

    def __init__(self, ptx: str, name: str, warps: int = 4, shared: int = 0):
        super().__init__(ptx, name, warps, shared)
        self.ptx = ptx

    def __call__(self, grid, arguments) -> None:
        if self.ptx not in self.seen:
            self.seen.add(self.ptx)
            for barrier in BARRIER.finditer(self.ptx):
                self.try_without(barrier, grid, arguments)
        STATS.reports.clear()
        super().__call__(grid, arguments)
        assert not STATS.reports, STATS.reports

    def try_without(self, barrier: re.Match[str], grid, arguments) -> None:
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
        removed[self.name] += 1
        reported[self.name] += found
        if not found:
            loc = re.findall(r"\.loc\s+\d+\s+(\d+)", self.ptx[: barrier.start()])
            missed[self.name][loc[-1] if loc else "?"] += 1


def launches() -> list[Callable[[], object]]:
    """Every kernel with barriers, at shapes that take all of its loops."""
    import test_attention_kernels as attention
    import test_chain as chain
    import test_kernels as nodes
    import test_linear_kernels as linear

    spot = "cpu", torch.float16
    calls: list[Callable[[], object]] = []
    for family in nodes.MODULES:
        for columns in (41, 5000):
            mu, state, grad, c, extra = nodes.problem(family, (2, columns), 2, spot, "error")
            calls.append(lambda a=(family, mu, state, c, extra): nodes.check_forward(*a, "error"))
            calls.append(lambda a=(family, mu, state, grad, c, extra): nodes.check_step(*a, "error", True))
    calls.append(lambda: linear.check_all(65, 17, 40, 13, spot))
    q, k, v, grad_out, state, c = attention.problem(spot, 2, 1, 65, 70, 16)
    padding = attention.hide(70)
    calls.append(lambda: attention.check(q, k, v, grad_out, state, c, causal=True, padding=padding))
    torch.manual_seed(0)
    x, y = chain.batch(16, 64, 10)
    calls.append(lambda: chain.compare(chain.network((64, 70, 64, 10)), x, y, spot))
    return calls


def main() -> None:
    arch = int(sys.argv[1]) if len(sys.argv) > 1 else 80
    driver.Kernel = Mutated
    ptx_emulator.activate(arch)
    for call in launches():
        call()
    for name, count in removed.items():
        print(f"sm_{arch} {name}: {reported[name]} of {count} reported; lines of the others {dict(missed[name])}")
    print(f"sm_{arch}: {sum(reported.values())} of {sum(removed.values())}")


if __name__ == "__main__":
    main()
