"""pytest -p ptx_emulator.pytest_plugin --ptx=90: the tests of the kernels, compiled for that GPU and run here.

Tests that skip a CPU where Triton does not interpret look at TRITON_INTERPRET: they are told 1, and Triton that it
does not. A test in which the emulator has something to report fails, unless its faults are ``planted``.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import triton

from . import OPTIONS, STATS, activate

# What Triton emits by itself, whatever a kernel says: listed in the summary, and no failure. Whether hardware minds was
# not tried. By the versions of Triton that do so.
COMPILERS = {
    "wgmma reads what was copied by cp.async with no fence.proxy.async since": ("3.6.",),
    "a wgmma uses registers that are written after the last wgmma.fence": ("3.6.", "3.9."),
}
FOUND: dict[str, list[str]] = {}  # a report, and the tests that it comes from


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


def of_the_compiler(report: str) -> bool:
    return any(what in report and triton.__version__.startswith(versions) for what, versions in COMPILERS.items())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test for what the emulator reports."""
    if not item.config.getoption("--ptx") or item.get_closest_marker("planted"):
        return (yield)
    STATS.reports.clear()
    try:
        result = yield
    finally:
        for report in STATS.reports:
            FOUND.setdefault(report, []).append(item.nodeid)
    faults = [report for report in STATS.reports if not of_the_compiler(report)]
    if faults and not item.config.getoption("--ptx-lenient"):
        pytest.fail("\n".join(faults), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    arch = config.getoption("--ptx")
    if not arch:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"compiled for sm_{arch} by Triton {triton.__version__}, warps in order {OPTIONS.order!r}")
    write(f"{STATS.launches} launches, {STATS.instructions:.2e} instructions of warps, {len(FOUND)} reports")
    for report, tests in FOUND.items():
        write(f"  {report}\n    in {len(tests)} tests, first {tests[0]}")
