"""pytest -p ptx_emulator.pytest_plugin --ptx=90: a project's tests of its kernels, compiled for that GPU and run here.

Tests that skip a CPU where Triton does not interpret look at TRITON_INTERPRET: they are told 1, and Triton is told 0.
A test in which the emulator has something to report fails (with --ptx-lenient it is listed only).
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Generator

import pytest
import triton

from . import OPTIONS, STATS, activate

FOUND: dict[str, list[str]] = defaultdict(list)  # a report, and the tests that it comes from
SECONDS: dict[str, float] = defaultdict(float)  # of each test file: in all, and emulated
EMULATED: dict[str, float] = defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptx", "kernels emulated from their PTX")
    group.addoption("--ptx", type=int, metavar="ARCH", help="compute capability, as 80 or 90")
    group.addoption("--ptx-order", default="step", choices=("step", "forward", "reverse", "random"), help="of warps")
    group.addoption("--ptx-seed", type=int, default=0, help="of the random order")
    group.addoption("--ptx-early", action="store_true", help="cp.async lands at once")
    group.addoption("--ptx-unchecked", action="store_true", help="no races: bounds only, faster")
    group.addoption("--ptx-lenient", action="store_true", help="list reports, but fail no test for them")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any conftest.py, which may import kernels."""
    given = early_config.known_args_namespace
    if not given.ptx:
        return
    OPTIONS.order, OPTIONS.seed = given.ptx_order, given.ptx_seed
    OPTIONS.late, OPTIONS.check = not given.ptx_early, not given.ptx_unchecked
    triton.knobs.runtime.interpret = False
    os.environ |= {"TRITON_INTERPRET": "1", "PTX_EMULATED": "1"}
    activate(given.ptx)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    if not item.config.getoption("--ptx"):
        return (yield)
    STATS.reports.clear()
    started, before = time.perf_counter(), STATS.seconds
    try:
        result = yield
    finally:
        file = item.nodeid.partition("::")[0]
        SECONDS[file] += time.perf_counter() - started
        EMULATED[file] += STATS.seconds - before
        for report in STATS.reports:
            FOUND[report].append(item.nodeid)
    planted = item.get_closest_marker("planted") is not None
    if STATS.reports and not planted and not item.config.getoption("--ptx-lenient"):
        pytest.fail("\n".join(STATS.reports), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    arch = config.getoption("--ptx")
    if not arch:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"kernels emulated from sm_{arch} PTX, warps in order {OPTIONS.order!r}")
    write(f"{STATS.launches} launches, {STATS.instructions:.2e} instructions of warps, {STATS.seconds:.0f} s")
    for file in sorted(SECONDS):
        write(f"  {file}: {SECONDS[file]:.0f} s, {EMULATED[file]:.0f} s of it in launches")
    for report, tests in FOUND.items():
        write(f"  {report}\n    in {len(tests)} tests, first {tests[0]}")
