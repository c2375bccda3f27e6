"""`python -m ckptconv`, and the script `ckptconv`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from .signals import ENDING, ignore_signals, raise_signals


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. A signal may end it at any time, such as during imports."""
    try:
        raise_signals()
        from .cli import main

        main(arguments, prog_name="ckptconv")
    except SystemExit as end:
        if end.code in [128 + number for number in ENDING]:
            ignore_signals()  # all is removed, and the end of Python takes a moment
            with contextlib.suppress(OSError):  # the terminal may be gone
                print("interrupted", file=sys.stderr)  # noqa: T201  (click may not be there yet)
        raise


if __name__ == "__main__":
    run()
