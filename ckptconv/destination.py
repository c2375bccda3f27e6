"""May a file or folder be written here? And the one way to put it in place: whole, or not at all.

Whatever is made is built beside its destination, under a hidden name, and renamed at the end. An
exception removes it again; a run that is killed leaves hidden names only.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .errors import OutputError, option

Kind = tuple[str, Callable[[Path], bool]]
"""What may be replaced, in words, and whether something that exists is that."""

FILE: Kind = ("a regular file", Path.is_file)

NAME = 50
"""Characters of the destination's name in the hidden name, which must not become too long."""


def check_destination(
    path: Path,
    *,
    overwrite: bool = False,
    append: bool = False,
    kind: Kind = FILE,
    inputs: Iterable[str | Path] = (),
) -> None:
    """Checks that a file or folder may be put in place, before the work that makes it.

    Args:
        path: of the file or folder.
        overwrite: whatever is there may be replaced if it is of the right kind. A link never is.
        append: text is to be added to a file, which need not exist; a link is followed.
        kind: what may be replaced.
        inputs: files that are read. Neither they nor a folder that holds one may be changed.

    Raises:
        OutputError: its folder is missing, it exists and may not be replaced, or it has a name that
            nothing can have.
    """
    replacing = option("overwrite", True)
    try:
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent}: no such folder", hint="make it first, with mkdir -p")
        if not _exists(path):
            return
        if append:
            if path.is_dir():
                raise OutputError(f"{path}: is a folder", hint="give the name of a file")
        elif not overwrite:
            raise OutputError(
                f"{path}: exists", hint=f"{replacing} replaces it; or choose another name"
            )
        elif path.is_symlink() or not kind[1](path):
            raise OutputError(
                f"{path}: exists and is {_found(path)}; it is not {kind[0]}, so {replacing} does "
                "not remove it",
                hint="remove it yourself, or choose another name",
            )
        for one in inputs:
            resolved = Path(one).resolve()
            if any(_same(path, each) for each in (resolved, *resolved.parents)):
                what = f"holds the input {one}, so {replacing} does not remove it"
                what = what if path.is_dir() else "is one of the files to read"
                raise OutputError(f"{path}: {what}", hint="choose another name")
    except (OSError, ValueError) as error:  # ValueError: the path holds a null character
        why = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{path}: cannot be looked at: {why}", hint="choose another place"
        ) from error


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
def writing(
    path: Path, hint: str = "nothing was left behind; choose another place"
) -> Iterator[None]:
    """Turns an error of the system into an OutputError for `path`."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
        raise OutputError(f"{path}: cannot be written: {why}", hint=hint) from error


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a hidden name to write a file to, and renames it to `path` at the end.

    Raises:
        OutputError: the system cannot write it, or `path` came into being meanwhile.
    """
    hidden = _hidden(path, "partial")
    with writing(path):
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
                with contextlib.suppress(OSError):
                    hidden.unlink()


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


def _same(path: Path, other: Path) -> bool:
    """Whether two names lead to one file or folder, in other letters or by a hard link as well."""
    return path.exists() and other.exists() and path.samefile(other)


def _found(path: Path) -> str:
    tests = {"a link": Path.is_symlink, "a folder": Path.is_dir, "a file": Path.is_file}
    return next((what for what, test in tests.items() if test(path)), "a device or a pipe")
