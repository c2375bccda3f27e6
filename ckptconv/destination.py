"""May a file or folder be written here? And the one way to put it in place: whole, or not at all.

Whatever is made is built beside its destination, under a hidden name, and renamed at the end. An
exception removes it again; a run that is killed leaves only the hidden name.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .errors import OutputError

__all__ = [
    "append_text",
    "check_appendable",
    "check_destination",
    "check_room",
    "new_file",
    "new_folder",
]

NAME = 50
"""Characters of the destination's name in the hidden name, which must not become too long."""


def check_destination(
    path: Path,
    *,
    overwrite: bool,
    inputs: Iterable[str | Path] = (),
    kind: str = "a regular file",
    is_kind: Callable[[Path], bool] = Path.is_file,
) -> None:
    """Checks that a file or folder may be put in place, before the work that makes it.

    Args:
        path: of the file or folder.
        overwrite: whatever is there may be replaced if it is of the right kind. A link never is.
        inputs: files that are read. Neither they nor a folder that holds one are replaced.
        kind: what may be replaced, in words.
        is_kind: tells whether something that exists is that.

    Raises:
        OutputError: its folder is missing, it exists and may not be replaced, or it has a name that
            nothing can have.
    """
    with _looking_at(path):
        if not _exists(path):
            return
        if not overwrite:
            raise OutputError(
                f"{path}: exists", hint="--overwrite replaces it; or choose another name"
            )
        if path.is_symlink() or not is_kind(path):
            raise OutputError(
                f"{path}: exists and is {_found(path)}; it is not {kind}, so --overwrite does not "
                "remove it",
                hint="remove it yourself, or choose another name",
            )
        _refuse_inputs(path, inputs)


def check_appendable(path: Path, inputs: Iterable[str | Path]) -> None:
    """Checks that text may be appended to a file, which need not exist; a link is followed.

    Raises:
        OutputError: its folder is missing, it is a folder, or it is one of the inputs.
    """
    with _looking_at(path):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder", hint="give the name of a file")
        _refuse_inputs(path, inputs)


def append_text(path: Path, text: str) -> None:
    """Appends text to a file.

    Raises:
        OutputError: the system cannot write it.
    """
    with _writing(path, hint="choose another place"), path.open("a", encoding="utf-8") as file:
        file.write(text)


def check_room(path: Path, need: int, what: str) -> None:
    """Checks that the disk has room for what is to be made (`what`, in words) at `path`.

    Raises:
        OutputError: it has not.
    """
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise OutputError(
            f"{path}: the disk has {free:,} bytes free, and {what} needs {need:,}",
            hint=f"free {need - free:,} bytes, or choose another disk",
        )


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a hidden name to write a file to, and renames it to `path` at the end.

    Raises:
        OutputError: the system cannot write it, or `path` came into being meanwhile.
    """
    hidden = _hidden(path, "partial")
    with _writing(path):
        was_there = _exists(path)
        try:
            yield hidden
            if not was_there and _exists(path):
                raise FileExistsError(errno.EEXIST, "another program made it meanwhile")
            if was_there and hidden.is_dir():
                _swap(hidden, path)
            else:
                hidden.replace(path)
        finally:
            if hidden.is_dir():
                shutil.rmtree(hidden, ignore_errors=True)
            else:
                hidden.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives an empty hidden folder to write to, and renames it to `path` at the end.

    Raises:
        OutputError: as `new_file`.
    """
    with new_file(path) as hidden:
        hidden.mkdir()
        yield hidden


def _swap(new: Path, path: Path) -> None:
    """Puts a folder in the place of another, which comes back if that fails."""
    old = _hidden(path, "old")
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:
        if not _exists(path):
            old.rename(path)
        raise
    finally:
        if _exists(path):
            shutil.rmtree(old, ignore_errors=True)


def _hidden(path: Path, end: str) -> Path:
    return path.parent / f".{path.name[:NAME]}.{secrets.token_hex(4)}.{end}"


def _exists(path: Path) -> bool:
    """Whether anything is there, a link to nowhere included."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _found(path: Path) -> str:
    tests = {"a link": Path.is_symlink, "a folder": Path.is_dir, "a file": Path.is_file}
    return next((what for what, test in tests.items() if test(path)), "a device or a pipe")


def _refuse_inputs(path: Path, inputs: Iterable[str | Path]) -> None:
    resolved = path.resolve()
    for one in (Path(one) for one in inputs):
        if one.resolve() == resolved:
            raise OutputError(f"{path}: is one of the files to read", hint="choose another name")
        if one.resolve().is_relative_to(resolved):
            raise OutputError(
                f"{path}: holds the input {one}, so --overwrite does not remove it",
                hint="choose another name",
            )


@contextlib.contextmanager
def _looking_at(path: Path) -> Iterator[None]:
    """Requires the folder that `path` lies in, and says so if something cannot be looked at."""
    try:
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent}: no such folder", hint="make it first, with mkdir -p")
        yield
    except (OSError, ValueError) as error:  # ValueError: the path holds a null character
        why = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{path}: cannot be looked at: {why}", hint="choose another place"
        ) from error


@contextlib.contextmanager
def _writing(
    path: Path, hint: str = "nothing was left behind; choose another place"
) -> Iterator[None]:
    """Says that a file or folder could not be written."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
        raise OutputError(f"{path}: cannot be written: {why}", hint=hint) from error
