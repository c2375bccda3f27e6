"""Renames that never replace, and the hidden folder in which something is made before it appears.

    .NAME.1a2b3c4d.partial/     beside the destination NAME
        lock                    locked by the run that made the folder; holds NAME
        new                     what is being made, or what may be removed
        swap                    what changes places with NAME: finished, or what stood there
        old                     what stood at NAME, where the system cannot exchange two names

The system frees the lock of a run that is killed, so a later run can tell what was left behind.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import printable

log = logging.getLogger(__name__)

NEW, SWAP, OLD, _LOCK = "new", "swap", "old", "lock"
_NAME = 50
"""Characters of the destination's name that a hidden name keeps, so as not to become too long."""

_CALLS = {"linux": ("renameat2", -100, 1, 2), "darwin": ("renameatx_np", -2, 4, 2)}
"""By platform: a function of the C library, what stands for the current folder, and the flags for
not replacing and for exchanging."""
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
"""What a kernel or a file system answers that does not know a flag."""


def move(source: Path, target: Path) -> None:
    """Renames a file or folder. FileExistsError if anything is at the target, which then stays."""
    if _renamed(source, target, exchanged=False):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if not source.is_dir():
        try:
            target.hardlink_to(source)
        except OSError as error:
            if isinstance(error, FileExistsError):
                raise
        else:
            source.unlink()
            return
    source.rename(target)  # no system replaces a folder that has anything in it


def exchange(one: Path, other: Path) -> bool:
    """Lets two names change places in one step; False where the system cannot do that."""
    return _renamed(one, other, exchanged=True)


def _renamed(source: Path, target: Path, *, exchanged: bool) -> bool:
    call = _call()
    if call is None:
        return False
    _, here, *flags = _CALLS[sys.platform]
    names = (here, os.fsencode(source), here, os.fsencode(target))
    number = call(*names, flags[exchanged])
    if number in _UNSUPPORTED:
        return False
    if number:
        raise OSError(number, os.strerror(number), str(source), None, str(target))
    return True


@functools.cache
def _call() -> Callable[..., int] | None:
    """Returns the system's own rename, which answers 0 or an error number, where there is one."""
    import ctypes

    if sys.platform not in _CALLS:
        return None
    function: Any = getattr(ctypes.CDLL(None, use_errno=True), _CALLS[sys.platform][0], None)
    return (lambda *names: ctypes.get_errno() if function(*names) else 0) if function else None


@contextlib.contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """Makes a hidden folder beside a path, yields it while its lock is held, and removes it.

    What it has under the names SWAP and OLD stays.
    """
    while True:
        folder = path.with_name(f".{path.name[:_NAME]}.{secrets.token_hex(4)}.partial")
        lock = -1
        try:
            folder.mkdir(mode=0o700, parents=True)  # a run that failed may have removed the parent
            try:
                flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
                lock = os.open(folder / _LOCK, flags | getattr(os, "O_BINARY", 0), 0o600)
            except FileNotFoundError:
                continue  # another run took the empty folder for abandoned
            with contextlib.suppress(OSError):  # this file system has no locks
                _lock(lock, wait=True)
            if not _is_at(lock, folder / _LOCK):
                continue
            os.write(lock, os.fsencode(path.name))
            yield folder
            return
        finally:
            discard(folder)
            if lock != -1:
                os.close(lock)
            _finish(folder)


def abandoned(path: Path) -> Iterator[Path]:
    """Yields the hidden folders of killed runs to this path, each while its lock is held.

    Then it removes the folder, unless there is something under the names SWAP or OLD.
    """
    name = os.fsencode(path.name)
    pattern = re.compile(re.escape(f".{path.name[:_NAME]}.") + r"[0-9a-f]{8}\.partial")
    try:
        names = sorted(filter(pattern.fullmatch, _names(path.parent)))
    except OSError:
        return  # it is not there, or may only be written
    for folder in (path.parent / each for each in names):
        if folder.is_symlink():
            continue
        with contextlib.suppress(OSError):
            folder.rmdir()  # killed before it had a lock
        with _held(folder / _LOCK) as content:
            if content == b"":  # killed, or not yet past `_is_at`, which will now fail
                _finish(folder)
            elif content == name and {_LOCK} < _names(folder) <= {NEW, SWAP, OLD, _LOCK}:
                yield folder
                discard(folder)
        if content == name:
            _finish(folder)
            if not folder.exists():
                log.warning("%s: removed; it is what a killed run left", printable(str(folder)))


def discard(folder: Path) -> None:
    """Removes what a hidden folder has under the name NEW, and says so if that fails."""
    new = folder / NEW
    for inner, _, _ in os.walk(new) if not new.is_symlink() else ():
        with contextlib.suppress(OSError):  # nothing can be removed from a read-only folder
            Path(inner).chmod(0o700)
    shutil.rmtree(new, ignore_errors=True)
    with contextlib.suppress(OSError):
        new.unlink()
    if os.path.lexists(new):
        log.warning("%s: could not be removed; remove it yourself", printable(str(folder)))


def _finish(folder: Path) -> None:
    """Removes a hidden folder that has nothing but its lock, which must be free on Windows."""
    with contextlib.suppress(OSError):
        if _names(folder) == {_LOCK}:
            (folder / _LOCK).unlink()
        folder.rmdir()


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder))  # noqa: PTH208  (a path of each would take longer)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bytes | None]:
    """Locks a file and yields its content; None if another run holds it, or it cannot be locked."""
    try:
        lock = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        yield None
        return
    try:
        content = None
        with contextlib.suppress(OSError):
            _lock(lock, wait=False)
            content = os.read(lock, 4096) if _is_at(lock, path) else None
        yield content
    finally:
        os.close(lock)


def _lock(file: int, *, wait: bool) -> None:
    """Locks an open file until it is closed, or the process ends in whatever way."""
    if sys.platform == "win32":
        import msvcrt

        # far behind the name, since nobody else can read what is locked
        os.lseek(file, 1 << 20, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file still goes by this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
