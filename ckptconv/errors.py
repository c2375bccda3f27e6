"""Every exception that ckptconv raises on purpose.

An error lists all problems that were found, not only the first, and carries a hint: the next
thing to do. `str(error)` is the text that the command line prints.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

SHOWN = 20
"""Problems that the message of an error lists; the others are only counted."""


class CkptconvError(Exception):
    """The root of the tree: a sentence, the problems found, and what to do next."""

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str = "") -> None:
        self.message = message
        self.problems = tuple(problems)
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {problem}" for problem in self.problems[:SHOWN])]
        if len(self.problems) > SHOWN:
            lines.append(f"  ... and {len(self.problems) - SHOWN} more")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(map(printable, lines))


def reason(error: OSError | ValueError) -> str:
    """Returns why the system refused, in words; a path with a null character is a ValueError."""
    if getattr(error, "errno", None) == errno.ENOSPC:
        return "the disk is full"
    return getattr(error, "strerror", None) or str(error)


def printable(text: str) -> str:
    r"""Escapes what cannot be printed, so that names and metadata cannot command the terminal.

    Bytes of file names that are not UTF-8 stay.

    >>> printable("weight\x1b[2J")
    'weight\\x1b[2J'
    """
    return "".join(
        c if c.isprintable() or "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode()
        for c in text
    )


_command_line = ContextVar("_command_line", default=False)


@contextlib.contextmanager
def on_the_command_line() -> Iterator[None]:
    """Makes messages spell options as a shell does (`--dtype fp16`), not as Python does."""
    token = _command_line.set(True)
    try:
        yield
    finally:
        _command_line.reset(token)


def option(name: str, value: object = None) -> str:
    """Spells an option for whoever reads the message, on the command line or in Python.

    The value is True for a switch; a word in capitals stands for something to fill in.

    >>> option("overwrite", True), option("dtype", "fp32"), option("vae", "FILE"), option("ema")
    ('overwrite=True', "dtype='fp32'", 'vae=FILE', 'ema')
    >>> with on_the_command_line():
    ...     option("overwrite", True), option("dtype", "fp32"), option("vae", "FILE")
    ('--overwrite', '--dtype fp32', '--vae FILE')
    """
    if _command_line.get():
        switch = f"--{name.replace('_', '-')}"
        return switch if value is None or value is True else f"{switch} {value}"
    if value is None:
        return name
    return f"{name}={value if str(value).isupper() or value is True else repr(value)}"


class FileRefused(CkptconvError):
    """The input file cannot be used."""


class HeaderError(FileRefused):
    """The file is not a well-formed safetensors file or PyTorch checkpoint."""


class UnsafePickle(FileRefused):
    """The file is a PyTorch checkpoint that names code; none of it was run."""


class NotACheckpoint(FileRefused):
    """The file is well-formed, but it is not a checkpoint of a known architecture."""


class Ambiguous(FileRefused):
    """Several architectures match: their conditions overlap, which is a fault of the key maps."""


class Incomplete(FileRefused):
    """Keys of the file are missing, unknown, or do not have the shape that the maps need."""


class MapError(CkptconvError):
    """A key map or an architecture file breaks a law of the format."""


class UsageError(CkptconvError):
    """The options contradict each other or the file."""


class OutputError(CkptconvError):
    """The destination cannot be written, or must not be."""


class DeviceError(CkptconvError):
    """The device is not there, its memory is too small, or it cannot compute in the dtype."""
