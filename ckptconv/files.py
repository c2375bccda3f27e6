"""Opens the files that a reader of weights is given, and says why one cannot be read."""

from __future__ import annotations

import contextlib
import stat
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from .errors import HeaderError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["opened", "refuse_unreadable"]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a file for reading, and gives it with its size in bytes.

    Raises:
        HeaderError: it is no regular file, or the system cannot read it, now or in the `with`.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise HeaderError(f"{path}: this is {what}", hint="give one .safetensors file")
        file = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: the path holds a null character
        refuse_unreadable(path, error)
    with file:
        try:
            yield file, found.st_size
        except OSError as error:
            refuse_unreadable(path, error)


def refuse_unreadable(path: Path, error: OSError | ValueError) -> NoReturn:
    """Turns an error of the system into ours.

    Raises:
        HeaderError: always.
    """
    reason = getattr(error, "strerror", None) or error
    hint = "check the spelling of the path, and that you may read the file"
    raise HeaderError(f"{path}: the file cannot be read: {reason}", hint=hint) from error
