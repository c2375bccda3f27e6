"""Checks where files and folders may be written, and puts them in place whole or not at all.

Everything is built beside its destination under a hidden name and renamed at the end. Missing
parent folders are made. An exception removes it all again; a run that is killed leaves nothing but
hidden names, and parents that it made.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .errors import OutputError, option, reason

Kind = tuple[str, Callable[[Path], bool]]
"""What may be replaced: its name in messages, and a test of whether a path is that."""

FILE: Kind = ("a regular file", Path.is_file)

INDEX_SUFFIX = ".safetensors.index.json"
"""How the name of the index of a sharded checkpoint ends."""

NAME = 50
"""Characters of the destination's name that a hidden name keeps, so as not to become too long."""


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
        overwrite: whatever exists there may be replaced if it is of the right kind, except a link.
        append: text is to be added to a file, which need not exist; a link is followed.
        kind: what may be replaced.
        inputs: files that are read; neither they nor a folder that holds one may be changed.

    Raises:
        OutputError: it exists and may not be replaced, what should be its folder is a file, or its
            name is one that no file can have.
    """
    stays = f"so {option('overwrite', True)} does not remove it"
    try:
        above = path.parent if append else next(filter(_exists, path.parents), path)
        if not above.is_dir():
            raise OutputError(f"{above}: is not a folder", hint="choose another place")
        if not _exists(path):
            return
        if append:
            if path.is_dir():
                raise OutputError(f"{path}: is a folder", hint="give the name of a file")
        elif not overwrite:
            hint = f"{option('overwrite', True)} replaces it; or choose another name"
            raise OutputError(f"{path}: exists", hint=hint, code="exists")
        elif path.is_symlink() or not kind[1](path):
            raise OutputError(
                f"{path}: exists and is {_found(path)}; it is not {kind[0]}, {stays}",
                hint="remove it yourself, or choose another name",
            )
        for one in inputs:
            resolved = Path(one).resolve()
            if any(_same(path, each) for each in (resolved, *resolved.parents)):
                holds = f"holds the input {one}, {stays}"
                what = holds if path.is_dir() else "is one of the files to read"
                raise OutputError(f"{path}: {what}", hint="choose another name")
    except (OSError, ValueError) as error:
        what = f"{path}: cannot be looked at: {reason(error)}"
        raise OutputError(what, hint="choose another place") from error


def check_room(path: Path, need: int, what: str) -> None:
    """Raises OutputError unless the disk of `path` has room for `need` bytes of `what`."""
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise OutputError(
            f"{path}: the disk has {free:,} bytes free, and {what} needs {need:,}",
            hint=f"free {need - free:,} bytes, or choose another disk",
            code="disk-full",
        )


@contextlib.contextmanager
def writing(
    path: Path, hint: str = "nothing was left behind; choose another place"
) -> Iterator[None]:
    """Turns an error of the system into an OutputError for `path`."""
    try:
        yield
    except OSError as error:
        what = f"{path}: cannot be written: {reason(error)}"
        code = "disk-full" if error.errno == errno.ENOSPC else ""
        raise OutputError(what, hint=hint, code=code) from error


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a hidden name for a file to write, and renames it to `path` at the end.

    OutputError if the system cannot write it, or another program made `path` meanwhile.
    """
    hidden = _hidden(path, "partial")
    with writing(path), _parents(path):
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
            with contextlib.suppress(OSError):
                hidden.unlink()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty hidden folder to fill, and renames it to `path` at the end, as `new_file`."""
    with new_file(path) as hidden:
        hidden.mkdir(parents=True)  # a run that failed beside this one may have removed its parent
        yield hidden


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Makes the missing folders above a path; after an exception, removes those that are empty."""
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), path.parents))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


def _swap(new: Path, path: Path) -> None:
    """Replaces a folder by another; if that fails, the old one comes back."""
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


def without_suffix(place: str) -> str:
    """Returns the path or URL of a checkpoint without its suffix: where its folder goes by default.

    >>> without_suffix("models/v1.5.ckpt"), without_suffix("s3://b/x.safetensors.index.json")
    ('models/v1.5', 's3://b/x')
    """
    index = place.endswith(INDEX_SUFFIX)
    return place.removesuffix(INDEX_SUFFIX if index else Path(place).suffix)


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
