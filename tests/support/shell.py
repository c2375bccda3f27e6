"""Runs commands as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from click.testing import CliRunner, Result

from ckptconv.cli import main


def run(*args: object, code: int = 0) -> Result:
    """Runs a command in this process and checks its exit code."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    # anything but an exit is what a user would see as a traceback
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def process(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ckptconv`."""
    return subprocess.run(  # noqa: S603  (no shell)
        [sys.executable, "-m", "ckptconv", *map(str, args)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        **options,
    )


def on_a_terminal(*args: object, **environment: str) -> str:
    """Runs `python -m ckptconv` on a terminal, and returns what the user sees there."""
    ours, theirs = os.openpty()
    known = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    with subprocess.Popen(  # noqa: S603  (no shell)
        [sys.executable, "-m", "ckptconv", *map(str, args)],
        stdout=theirs,
        stderr=theirs,
        env={**known, "TERM": "xterm", **environment},
    ) as running:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # Linux ends a terminal so
            pass
    os.close(ours)
    assert running.returncode == 0, shown
    return shown.decode().replace("\r\n", "\n")
