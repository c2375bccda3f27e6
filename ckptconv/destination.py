"""Says where files and folders may be written, and makes them appear there whole or not at all.

What is made grows under a hidden name beside its destination (see `in_place.py`) and is renamed at
the end. Missing parent folders are made. An exception removes it all again. What a killed run
leaves behind is removed by the next one to the same destination, which says so.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import itertools
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .errors import OutputError, option, printable, reason
from .in_place import NEW, OLD, SWAP, abandoned, discard, exchange, hidden_folder, move

log = logging.getLogger(__name__)


class Kind(NamedTuple):
    """What may be replaced.

    Attributes:
        name: in messages.
        test: whether a path is that.
        strangers: what is inside such a folder and was not written by ckptconv.
    """

    name: str
    test: Callable[[Path], bool]
    strangers: Callable[[Path], Sequence[str]] = lambda _: ()


FILE = Kind("a regular file", Path.is_file)

INDEX_SUFFIX = ".safetensors.index.json"
"""How the name of the index of a sharded checkpoint ends."""

TEXT = 1 << 20
"""Bytes at the beginning of a file that are looked at to tell whether it is text."""

ELSEWHERE = "choose another place"


@dataclass(frozen=True, slots=True)
class Destination:
    """The place where a file or folder is to appear.

    Attributes:
        path: of the file or folder.
        overwrite: whatever exists there may be replaced if it is of the right kind. A link is
            never replaced.
        kind: what is replaced if `overwrite` is set.
        unasked: what is replaced even without `overwrite`.
        inputs: files that are read; neither they nor a folder that holds one is replaced.
        closed: a folder that is read, in which nothing is written.
    """

    path: Path
    overwrite: bool = False
    kind: Kind = FILE
    unasked: Kind | None = None
    inputs: Sequence[str | Path] = ()
    closed: Path | None = None

    def check(self) -> None:
        """Removes what killed runs left, and checks that the file or folder may be put in place.

        Call it before the work that makes the file or folder.

        Raises:
            OutputError: something is there that may not be replaced, or nothing can be there.
        """
        with _looking(self.path):
            self._check_place()
            for hidden in abandoned(self.path):
                self._settle(hidden)
            self._require_replaceable()

    @contextlib.contextmanager
    def new(self) -> Iterator[Path]:
        """Yields a hidden name to make the file or folder at; at the end it is put in place.

        Raises:
            OutputError: the system cannot write it, or as `check` does, before or at the end.
        """
        self.check()
        with writing(self.path), _parents(self.path), hidden_folder(self.path) as hidden:
            try:
                yield hidden / NEW
                self._put_in_place(hidden)
            finally:
                self._settle(hidden)

    def write(self, content: bytes) -> None:
        """Writes a file; raises as `new` does."""
        with self.new() as hidden:
            hidden.write_bytes(content)

    def _put_in_place(self, hidden: Path) -> None:
        """Renames what was made; an exception leaves the rest to `_settle`."""
        new, swap, old = hidden / NEW, hidden / SWAP, hidden / OLD
        try:
            return move(new, self.path)
        except FileExistsError as error:
            if not (self.overwrite or self.unasked):
                what = f"{self.path}: another program made it meanwhile"
                raise OutputError(what, hint="choose another name", code="exists") from error
        self._require_replaceable()
        new.rename(swap)
        if exchange(swap, self.path):
            # Nobody else can reach it now, so this look at it is the last word.
            if objection := self._objection(swap, overwrite=self.overwrite):
                exchange(swap, self.path)
                raise objection
            return None
        swap.rename(new)
        if not (new.is_dir() or self.path.is_dir()):
            new.replace(self.path)
            return None
        move(self.path, old)
        if objection := self._objection(old, overwrite=self.overwrite):
            raise objection
        return move(new, self.path)

    def _settle(self, hidden: Path) -> None:
        """Puts back what stood at the destination if nothing is there, or gives it up to removal.

        What may not be removed stays where it is, which is said.
        """
        old, swap = hidden / OLD, hidden / SWAP
        if _exists(old) and not _exists(self.path):
            move(old, self.path)
            log.warning("%s: put back; a run was stopped while it replaced this", _shown(self.path))
        for kept in filter(_exists, (old, swap)):
            objection = self._objection(kept, overwrite=True)
            if kept == old:  # its successor may not be at the destination
                objection = objection or self._objection(self.path, overwrite=True)
            if objection:
                what = "%s: stood at %s before, and is yours to move or to remove: %s"
                log.warning(what, _shown(kept), _shown(self.path), objection)
            else:
                discard(hidden)
                kept.rename(hidden / NEW)

    def _check_place(self) -> None:
        """Refuses a path at which no new file or folder can appear."""
        path, here = self.path, Path.cwd()
        if path.name in ("", "..") or any(_same(path, each) for each in (here, *here.parents)):
            what = f"{path}: is the current folder, or one that holds it"
            raise OutputError(what, hint="give the name of a file or folder to make")
        above = next(filter(_exists, path.parents), path)
        if not above.is_dir():
            raise OutputError(f"{above}: is not a folder", hint=ELSEWHERE)
        parent = path.parent.resolve()
        closed = self.closed
        if closed and any(_same(each, closed) for each in (parent, *parent.parents)):
            raise OutputError(f"{path}: lies in {closed}, which is read", hint=ELSEWHERE)

    def _require_replaceable(self) -> None:
        """Raises OutputError if something is at the destination that may not be replaced."""
        if not _exists(self.path):
            return
        if objection := self._objection(self.path, overwrite=self.overwrite):
            raise objection

    def _objection(self, there: Path, *, overwrite: bool) -> OutputError | None:
        """Returns why what is, or was, at the destination may not be replaced."""
        stays = f"so {option('overwrite', True)} does not remove it"
        refusal = functools.partial(OutputError, code="exists")
        for one in self.inputs:
            resolved = Path(one).resolve()
            if any(_same(there, each) for each in (resolved, *resolved.parents)):
                holds = f"holds the input {one}, {stays}"
                what = holds if there.is_dir() else "is one of the files to read"
                return refusal(f"{self.path}: {what}", hint="choose another name")
        link = there.is_symlink()
        if not link and self.unasked and self.unasked.test(there):
            return None
        if link or not self.kind.test(there):
            return refusal(
                f"{self.path}: exists and is {_found(there)}; it is not {self.kind.name}, {stays}",
                hint="remove it yourself, or choose another name",
            )
        if strangers := self.kind.strangers(there):
            return refusal(
                f"{self.path}: holds what ckptconv did not write, {stays}",
                problems=strangers,
                hint="move these files elsewhere, or choose another name",
            )
        if overwrite:
            return None
        what = f"exists and is not {self.unasked.name}" if self.unasked else "exists"
        hint = f"{option('overwrite', True)} replaces it; or choose another name"
        return refusal(f"{self.path}: {what}", hint=hint)


@dataclass(frozen=True, slots=True)
class TextFile:
    """A text file to append to, which need not exist; a link to it is followed.

    Attributes:
        path: of the file.
        inputs: files that are read, and are not appended to.
    """

    path: Path
    inputs: Sequence[str | Path] = ()

    def check(self) -> None:
        """Raises OutputError if what is there is no text file, or is an input."""
        with _looking(self.path):
            if not self.path.parent.is_dir():
                raise OutputError(f"{self.path.parent}: is not a folder", hint=ELSEWHERE)
            if not _exists(self.path) or not self.path.exists():
                return
            if any(_same(self.path, Path(one)) for one in self.inputs):
                what = f"{self.path}: is one of the files to read"
            elif not self.path.is_file():
                what = f"{self.path}: is {_found(self.path)}, and not a text file to append to"
            elif not _is_text(self.path):
                what = f"{self.path}: holds other data than text, so nothing is appended to it"
            else:
                return
            raise OutputError(what, hint="give the name of a text file, or of a new file")

    def append(self, text: str) -> None:
        """Adds text at the end; raises OutputError as `check` does, or if that fails."""
        self.check()
        with writing(self.path, ELSEWHERE), self.path.open("ab") as file:
            file.write(text.encode())


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
def writing(path: Path, hint: str = f"nothing was left behind; {ELSEWHERE}") -> Iterator[None]:
    """Turns an error of the system into an OutputError for `path`."""
    try:
        yield
    except OSError as error:
        what = f"{path}: cannot be written: {reason(error)}"
        code = "disk-full" if error.errno == errno.ENOSPC else ""
        raise OutputError(what, hint=hint, code=code) from error


@contextlib.contextmanager
def _looking(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        what = f"{path}: cannot be looked at: {reason(error)}"
        raise OutputError(what, hint=ELSEWHERE) from error


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


def without_suffix(place: str) -> str:
    """Returns the path or URL of a checkpoint without its suffix: where its folder goes by default.

    >>> without_suffix("models/v1.5.ckpt"), without_suffix("s3://b/x.safetensors.index.json")
    ('models/v1.5', 's3://b/x')
    """
    index = place.endswith(INDEX_SUFFIX)
    return place.removesuffix(INDEX_SUFFIX if index else Path(place).suffix)


def _exists(path: Path) -> bool:
    """Whether anything is there, a link to nowhere included."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _shown(path: Path) -> str:
    return printable(str(path))


def _same(path: Path, other: Path) -> bool:
    """Whether two names lead to one file or folder, in other letters or by a hard link as well."""
    try:
        return path.samefile(other)
    except (OSError, ValueError):
        return False


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        beginning = file.read(TEXT)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return False
    return b"\0" not in beginning


def _found(path: Path) -> str:
    tests = {"a link": Path.is_symlink, "a folder": Path.is_dir, "a file": Path.is_file}
    return next((what for what, test in tests.items() if test(path)), "a device or a pipe")
