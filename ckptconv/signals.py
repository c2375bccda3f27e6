"""Signals that end a run are raised, so that what was begun is removed."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterable, Iterator

ENDING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
    if hasattr(signal, name)
]
PATIENCE = 10.0
"""Seconds for cleaning up, in which further signals are ignored."""

_raised = -PATIENCE


def raise_signals() -> None:
    """Lets every signal that ends a run raise SystemExit, unless it is ignored already."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)


def ignore_signals(numbers: Iterable[int] = ENDING) -> None:
    """Ignores signals from now on."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def blocked(numbers: Iterable[int]) -> Iterator[None]:
    """Holds signals back, also from a process that is started meanwhile. Windows cannot."""
    if sys.platform == "win32" or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _raise(number: int, _frame: object) -> None:
    global _raised
    if time.monotonic() - _raised > PATIENCE:
        _raised = time.monotonic()
        sys.exit(128 + number)
