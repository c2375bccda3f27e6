"""Files elsewhere: what a URL names, and work that fetches its input and puts its output away.

fsspec knows the protocols (`s3://`, `gs://`, `hf://`, ...). Nothing here is reached unless a URL
was given.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from ..errors import CkptconvError, FileRefused, OutputError, UsageError
from ..files import read_json
from ..folder.names import INDEX, RECORD
from ..planning.step import ASIDE
from .work import Moved, Pair, Work

EXTRA = "pip install 'ckptconv[fleet]'"
INDEX_SUFFIX = ".safetensors.index.json"
MARK = f"{ASIDE}/uploading"
"""Lies in a folder while it is being uploaded, and names the run."""


def is_url(text: str | None) -> TypeGuard[str]:
    """Whether a text is a URL and not a path.

    >>> is_url("s3://bucket/model.safetensors"), is_url("model.safetensors")
    (True, False)
    """
    return bool(text and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text))


def check_urls(urls: Iterable[str]) -> None:
    """Checks that there are libraries for some URLs, before anything starts; asks no storage.

    Raises:
        UsageError: a protocol is unknown, or its library is not installed.
    """
    for url in {url.partition("://")[0]: url for url in urls}.values():
        _filesystem(url)


def listed(url: str) -> list[str]:
    """Returns the URLs that a pattern matches, sorted.

    Raises:
        UsageError: the protocol is unknown, or its library is not installed.
        FileRefused: the storage cannot be listed.
    """
    fs, path = _filesystem(url)
    with _telling(f"{url}: cannot be listed"):
        return [str(fs.unstrip_protocol(name)) for name in sorted(fs.glob(path))]


def size_of(url: str) -> int:
    """Returns the size of a file in bytes.

    Raises:
        UsageError: the protocol is unknown, or its library is not installed.
        FileRefused: it cannot be looked at.
    """
    fs, path = _filesystem(url)
    with _telling(f"{url}: cannot be looked at"):
        return int(fs.size(path) or 0)


@dataclass(frozen=True)
class Staged:
    """Work on files elsewhere, done on this machine's disk.

    The input is copied to a scratch folder that is removed at the end, whatever happens. The output
    is uploaded with its index last, so that a folder that is not whole does not load; nothing that
    exists is replaced unless the work may. A folder whose proof failed is not uploaded.

    Attributes:
        work: what is done.
        run: names the run. A folder that the same run began to upload, on a machine that was lost,
            may be uploaded again.
        scratch: where the scratch folder is made; where the system keeps such by default.
    """

    work: Work
    run: str
    scratch: str | None = None

    @property
    def makes(self) -> bool:
        """Whether the work makes a folder."""
        return self.work.makes

    @property
    def overwrite(self) -> bool:
        """Whether the work may replace a folder."""
        return self.work.overwrite

    def __call__(self, pair: Pair, moved: Moved, /) -> tuple[dict[str, Any], str]:
        """Fetches, works, and uploads; paths of the scratch folder are told as URLs."""
        if not is_url(pair.source) and not is_url(pair.out):
            return self.work(pair, moved)
        with tempfile.TemporaryDirectory(prefix="ckptconv-", dir=self.scratch) as folder:
            local = _local(pair, Path(folder))
            names = {
                here: there
                for here, there in ((local.source, pair.source), (local.out, pair.out))
                if here and there
            }
            try:
                data, error = self._staged(pair, local, moved)
            except CkptconvError as refused:
                problems = [_told(text, names) for text in refused.problems]
                message = _told(refused.message, names)
                raise type(refused)(message, problems=problems, hint=refused.hint) from refused
            return _told(data, names), _told(error, names)

    def _staged(self, pair: Pair, local: Pair, moved: Moved) -> tuple[dict[str, Any], str]:
        out = pair.out if pair.out and is_url(pair.out) else None
        if out and self.work.makes:
            _check_destination(out, self)
        if is_url(pair.source):
            _fetch(pair.source, Path(local.source), moved)
        if out and not self.work.makes:
            _fetch_folder(out, Path(str(local.out)))
        data, error = self.work(local, moved)
        if out and self.work.makes:
            if error:
                return data, f"{error}\nhint: the folder was not uploaded"
            _upload(Path(str(local.out)), out, self)
        return data, error


def _local(pair: Pair, folder: Path) -> Pair:
    """Returns where the files of a pair lie on this machine while they are worked on."""
    source, out = pair.source, pair.out
    if is_url(source):
        source = str(folder / "in" / PurePosixPath(source).name)
    if out and is_url(out):
        out = str(folder / "out" / PurePosixPath(out).name)
    for name in ("in", "out"):
        (folder / name).mkdir()
    return Pair(source, out)


def _told(data: Any, names: dict[str, str]) -> Any:
    """Returns plain data with other names for some paths."""
    if isinstance(data, str):
        for here, there in names.items():
            data = data.replace(here, there)
        return data
    if isinstance(data, list):
        return [_told(each, names) for each in data]
    if isinstance(data, dict):
        return {key: _told(value, names) for key, value in data.items()}
    return data


def _filesystem(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL, and the path in it.

    Raises:
        UsageError: the protocol is unknown, or its library is not installed.
    """
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # no stubs

        fs, path = url_to_fs(url)
    except ImportError as error:
        raise UsageError(
            f"{url}: a library for such addresses is not installed: {error}",
            hint=f"{EXTRA} (gs:// needs gcsfs as well)",
        ) from error
    except ValueError as error:
        raise UsageError(f"{url}: {error}", hint="check the spelling of the address") from error
    return fs, str(path).rstrip("/")


@contextlib.contextmanager
def _telling(what: str, kind: type[CkptconvError] = FileRefused) -> Iterator[None]:
    """Turns what a storage raises into our error.

    Raises:
        CkptconvError: of the given kind.
    """
    try:
        yield
    except CkptconvError:
        raise
    except Exception as error:  # every protocol's library has exceptions of its own
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        why = why or type(error).__name__
        raise kind(f"{what}: {why}", hint="check the address and your rights there") from error


def _fetch(url: str, to: Path, moved: Moved) -> None:
    """Copies a file from a storage; with an index come its shards.

    Raises:
        FileRefused: it is not there or cannot be read.
        OutputError: the scratch disk is too small.
    """
    fs, path = _filesystem(url)
    with _telling(f"{url}: cannot be fetched"):
        _fetch_one(fs, path, to, moved)
        if not url.endswith(INDEX_SUFFIX):
            return
        shards = read_json(to).get("weight_map")
        for name in sorted(set(shards.values())) if isinstance(shards, dict) else ():
            if isinstance(name, str) and Path(name).name == name:  # others the reader refuses
                _fetch_one(fs, f"{path.rpartition('/')[0]}/{name}", to.parent / name, moved)


def _fetch_one(fs: Any, path: str, to: Path, moved: Moved) -> None:
    need, free = int(fs.size(path) or 0), shutil.disk_usage(to.parent).free
    if need > free:
        raise OutputError(
            f"{to.parent}: the scratch disk has {free:,} bytes free, and {path} needs {need:,}",
            hint="give the worker a larger local directory, or set TMPDIR",
        )
    from fsspec.callbacks import Callback  # type: ignore[import-untyped]  # no stubs

    def hook(size: int | None, value: int, **_: Any) -> None:
        moved(0, size or need)  # it is alive; the bytes that count are those of the work

    fs.get_file(path, str(to), callback=Callback(hooks={"moved": hook}))


def _fetch_folder(url: str, to: Path) -> None:
    """Copies a folder from a storage.

    Raises:
        FileRefused: it is not there or cannot be read.
    """
    fs, path = _filesystem(url)
    with _telling(f"{url}: cannot be fetched"):
        names = _existing(fs, path)
        if not names:
            raise FileRefused(f"{url}: no such folder", hint="check the address")
        for name in sorted(names):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{path}/{name}", str(to / name))


def _existing(fs: Any, path: str) -> set[str]:
    """Returns the files under a folder of a storage, relative to it; "" if it is a file."""
    fs.invalidate_cache()  # others write there, too
    try:
        found = fs.find(path, detail=True).items()
    except FileNotFoundError:
        return set()
    names = (name for name, info in found if info["type"] == "file")  # not an empty folder
    return {str(name)[len(path) :].lstrip("/") for name in names}


def _check_destination(url: str, staged: Staged) -> set[str]:
    """Checks that a folder of a storage may be written; returns the files that are there.

    Raises:
        OutputError: it exists and may not be replaced, or it cannot be looked at.
    """
    fs, path = _filesystem(url)
    with _telling(f"{url}: cannot be looked at", OutputError):
        names = _existing(fs, path)
        if not names:
            return names
        mark = fs.cat_file(f"{path}/{MARK}").decode() if MARK in names else ""
        if mark == staged.run:
            return names  # a worker of this run began it, and was lost
        if not staged.overwrite:
            what = (
                "exists" if not mark else "is being uploaded by another run, or that one was lost"
            )
            raise OutputError(
                f"{url}: {what}", hint="--overwrite replaces it; or choose another name"
            )
        if not mark and f"{ASIDE}/{RECORD}" not in names:
            raise OutputError(
                f"{url}: exists and is not a converted folder, so --overwrite does not remove it",
                hint="remove it yourself, or choose another name",
            )
        return names


def _upload(folder: Path, url: str, staged: Staged) -> None:
    """Uploads a folder; it loads when it is whole, and not before.

    Raises:
        OutputError: it exists, or the storage cannot be written; what was uploaded is removed.
    """
    fs, path = _filesystem(url)
    old = _check_destination(url, staged)
    files = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    names = sorted(files, key=_order)
    mark = folder.parent / "mark"
    mark.write_text(staged.run, encoding="utf-8")
    try:
        fs.put_file(str(mark), f"{path}/{MARK}")
        _remove(fs, path, old & {INDEX})
        for name in names:
            if name == INDEX:
                _remove(fs, path, old - {*names, MARK})
            fs.put_file(str(folder / name), f"{path}/{name}")
        _remove(fs, path, old - {*names, MARK})
        _remove(fs, path, {MARK})
    except BaseException as error:
        left = "a part of it is there, without an index" if old else ""
        if not old:
            left = _removed(fs, path, {*names, MARK})
        if not isinstance(error, Exception):
            raise
        why = "; ".join(filter(None, (str(error) or type(error).__name__, left)))
        raise OutputError(
            f"{url}: cannot be written: {why}", hint="check the address and your rights there"
        ) from error


def _removed(fs: Any, path: str, names: set[str]) -> str:
    """Removes what was uploaded; returns what to say if that fails as well."""
    try:
        _remove(fs, path, names)
    except Exception as error:  # noqa: BLE001  (told beside the error that led here)
        return f"what was uploaded could not be removed: {error}"
    return ""


def _order(name: str) -> tuple[bool, bool, bool, str]:
    """Sorts what makes a folder load behind what it needs: weights, configurations, the index."""
    return name == INDEX, "/" not in name, name.endswith(".json"), name


def _remove(fs: Any, path: str, names: set[str]) -> None:
    for name in sorted(names):
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{name}")
