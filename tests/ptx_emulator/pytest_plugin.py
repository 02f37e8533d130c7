"""pytest -p ptx_emulator.pytest_plugin --ptx=90: the tests of the kernels, compiled for that GPU and run here.

Tests that skip a CPU where Triton does not interpret look at TRITON_INTERPRET: they are told 1, and Triton that it
does not. A test in which the emulator has something to report fails, unless its faults are ``planted``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

if "PTX_EMULATED" in os.environ:  # a process of pytest-xdist inherits both, and Triton looks when it is imported
    os.environ.pop("TRITON_INTERPRET", None)
import triton

from . import OPTIONS, STATS, activate

# What Triton emits by itself, whatever a kernel says, and ptxas makes good or hardware has borne so far: listed in the
# summary, and no failure. By the versions of Triton that do so.
COMPILERS = {
    "wgmma reads what was copied by cp.async with no fence.proxy.async since": ("3.6.",),
    "a wgmma uses registers that are written after the last wgmma.fence": ("3.6.", "3.9."),
}
FOUND: dict[str, list[str]] = {}  # a report, and the tests that it comes from
TOTAL: Counter[str] = Counter()  # launches and instructions, in all processes


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
    if given.ptx:
        late, check = int(not given.ptx_early), int(not given.ptx_unchecked)
        os.environ["PTX_EMULATED"] = f"{given.ptx} {given.ptx_order} {given.ptx_seed} {late} {check}"
        begin()


def begin() -> None:
    arch, OPTIONS.order, seed, late, check = os.environ["PTX_EMULATED"].split()
    OPTIONS.seed, OPTIONS.late, OPTIONS.check = int(seed), late == "1", check == "1"
    triton.knobs.runtime.interpret = False
    os.environ["TRITON_INTERPRET"] = "1"
    activate(int(arch))


if "PTX_EMULATED" in os.environ:  # a process of pytest-xdist, which imports its plugins after the hook
    begin()


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


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist sends what it counted to the first one."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["ptx"] = {"launches": STATS.launches, "instructions": STATS.instructions}, FOUND


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    counts, found = getattr(node, "workeroutput", {}).get("ptx", ({}, {}))
    TOTAL.update(counts)
    for report, tests in found.items():
        FOUND.setdefault(report, []).extend(tests)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    arch = config.getoption("--ptx")
    if not arch:
        return
    TOTAL.update(launches=STATS.launches, instructions=STATS.instructions)
    write = terminalreporter.write_line
    terminalreporter.section(f"compiled for sm_{arch} by Triton {triton.__version__}, warps in order {OPTIONS.order!r}")
    write(f"{TOTAL['launches']} launches, {TOTAL['instructions']:.2e} instructions of warps, {len(FOUND)} reports")
    for report, tests in FOUND.items():
        write(f"  {report}\n    in {len(tests)} tests, first {tests[0]}")
