"""Every exception that ckptconv raises on purpose.

An error lists all problems that were found, not only the first, and carries a hint: the next
thing to do. `str(error)` is the text that the command line prints. Its `code` is for programs: a
word that does not change between releases. docs/ci.md lists the codes.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, Self

SHOWN = 20
"""Problems that the message of an error lists; the others are only counted."""


class CkptconvError(Exception):
    """The root of the tree: a sentence, the problems found, and what to do next.

    A class sets the `code` of its errors, which one error may replace by a more specific one, and
    the exit code of a command that they end.
    """

    code = "failed"
    exit_code: ClassVar[int] = 3

    def __init__(
        self, message: str, *, problems: Iterable[str] = (), hint: str = "", code: str = ""
    ) -> None:
        self.message = message
        self.problems = tuple(problems)
        self.hint = hint
        if code:
            self.code = code
        super().__init__(message)

    def as_data(self) -> dict[str, Any]:
        """Returns plain data, for JSON."""
        problems = list(self.problems)
        named = {"code": self.code, "message": self.message}
        return {**named, "problems": problems, "hint": self.hint}

    def reworded(self, reword: Callable[[str], str]) -> Self:
        """Returns the same error with a function applied to its message and its problems."""
        problems = map(reword, self.problems)
        return type(self)(reword(self.message), problems=problems, hint=self.hint, code=self.code)

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

    code = "refused"


class HeaderError(FileRefused):
    """The file is not a well-formed safetensors file or PyTorch checkpoint."""

    code = "not-well-formed"


class UnsafePickle(FileRefused):
    """The file is a PyTorch checkpoint that names code; none of it was run."""

    code = "unsafe-pickle"


class NotACheckpoint(FileRefused):
    """The file is well-formed, but it is not a checkpoint of a known architecture."""

    code = "not-a-checkpoint"


class Ambiguous(FileRefused):
    """Several architectures match: their conditions overlap, which is a fault of the key maps."""

    code = "ambiguous"


class Incomplete(FileRefused):
    """Keys of the file are missing, unknown, or do not have the shape that the maps need."""

    code = "incomplete"


class MapError(CkptconvError):
    """A key map or an architecture file breaks a law of the format."""

    code = "bad-key-map"


class UsageError(CkptconvError):
    """The options contradict each other or the file."""

    code = "usage"
    exit_code = 2


class OutputError(CkptconvError):
    """The destination cannot be written, or must not be."""

    code = "output"


class DeviceError(CkptconvError):
    """The device is not there, its memory is too small, or it cannot compute in the dtype."""

    code = "device"


class CheckFailed(CkptconvError):
    """A check found problems; commands end with it, and no function of the API raises it."""

    code = "check-failed"
    exit_code = 1
