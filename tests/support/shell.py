"""Runs commands as a user would."""

from __future__ import annotations

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
