"""Ctrl-C while Python still imports torch for the command line: one line and status 130, as later on.

The package imports this first. In any other program it does nothing.
"""

import contextlib
import os
import signal
import sys
from typing import Any


def _end(number: int, frame: Any) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"pc-triton: stopped\n")
    os._exit(130)


def catch() -> None:
    """Have Ctrl-C end the process, if that is the command line."""
    program = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
    ours = program.startswith("pc-triton") or "pc_triton.cli" in sys.orig_argv[:6]
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def release() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, after `catch`."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


catch()
