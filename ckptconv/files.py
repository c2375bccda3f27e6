"""Opens the files that are read, and puts in place those that are written, or says why not."""

from __future__ import annotations

import contextlib
import json
import secrets
import stat
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from .errors import FileRefused, HeaderError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["opened", "read_json", "refuse_unreadable", "whole"]


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


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write to; what is there at the end becomes `path`.

    Raises:
        OutputError: the system cannot write the file; nothing is left behind.
    """
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}", hint="choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the name can be too long for a file to be there
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file that holds an object.

    Raises:
        FileRefused: it cannot be read, or is something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FileRefused(
            f"{path}: cannot be read as JSON: {error}", hint="check the file"
        ) from error
    if not isinstance(values, dict):
        raise FileRefused(f"{path}: holds no JSON object", hint="check the file")
    return values
