"""Signals that end a run are raised, so that what was begun is removed."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable

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


def _raise(number: int, _frame: object) -> None:
    global _raised
    if time.monotonic() - _raised > PATIENCE:
        _raised = time.monotonic()
        sys.exit(128 + number)
