"""Remote files: what a URL names, and work that downloads its input and uploads its output.

fsspec knows the protocols (`s3://`, `gs://`, `hf://`, ...). It is imported only if a URL was given.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..destination import INDEX_SUFFIX
from ..errors import CkptconvError, FileRefused, OutputError, UsageError, option
from ..files import MOST_JSON, read_json
from ..folder.names import INDEX, RECORD
from ..folder.record import recorded_files
from ..planning.step import ASIDE
from .work import Conversion, Done, Moved, Pair, Work

CHECK = "check the address and your rights there"
EXTRA = "pip install 'ckptconv[fleet]'"
MARK = f"{ASIDE}/uploading"
"""A file in a folder that is being uploaded; it names the run."""


def is_url(text: str) -> bool:
    """Whether a text is a URL and not a path.

    >>> is_url("s3://bucket/model.safetensors"), is_url("model.safetensors")
    (True, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def check_urls(urls: Iterable[str]) -> None:
    """Checks that the libraries for some URLs are installed; contacts no storage."""
    for url in {url.partition("://")[0]: url for url in urls}.values():
        _filesystem(url)


def listed(url: str) -> list[str]:
    """Returns the URLs that a pattern matches, sorted."""
    with _storage(url, "cannot be listed") as (fs, path):
        return [str(fs.unstrip_protocol(name)) for name in sorted(fs.glob(path))]


def size_of(url: str) -> int:
    """Returns the size of a file in bytes."""
    with _storage(url, "cannot be looked at") as (fs, path):
        return int(fs.size(path) or 0)


@dataclass(frozen=True)
class Staged:
    """Work on remote files, done on this machine's disk.

    The input is copied to a scratch folder, which is always removed. A conversion is uploaded with
    its index last, so that an incomplete folder does not load, and replaces nothing that exists
    unless it may. A folder that failed its verification is not uploaded.

    Attributes:
        work: what is done.
        run: names the run. A folder that a lost machine of the same run began to upload may be
            uploaded again.
        scratch: where the scratch folder is made; by default where the system keeps such folders.
    """

    work: Work
    run: str
    scratch: str | None = None

    def __call__(self, pair: Pair, moved: Moved, /) -> Done:
        """Downloads, works, and uploads; messages name the URLs, not the scratch folder."""
        if not is_url(pair.source) and not is_url(pair.out):
            return self.work(pair, moved)
        with tempfile.TemporaryDirectory(prefix="ckptconv-", dir=self.scratch) as folder:
            local = Pair(
                _local(pair.source, Path(folder, "in")), _local(pair.out, Path(folder, "out"))
            )
            names = {local.source: pair.source, local.out: pair.out}

            def reworded(error: CkptconvError) -> CkptconvError:
                return error.reworded(lambda text: str(_renamed(text, names)))

            try:
                data, error = self._staged(pair, local, moved)
            except CkptconvError as refused:
                raise reworded(refused) from refused
            return _renamed(data, names), error and reworded(error)

    def _staged(self, pair: Pair, local: Pair, moved: Moved) -> Done:
        conversion = self.work if is_url(pair.out) and isinstance(self.work, Conversion) else None
        if conversion:
            _check_destination(pair.out, self.run, overwrite=conversion.overwrite)
        if is_url(pair.source):
            _fetch(pair.source, Path(local.source), moved)
        if is_url(pair.out) and not conversion:
            _fetch_folder(pair.out, Path(local.out))
        data, error = self.work(local, moved)
        if conversion and error:
            error.hint = "the folder was not uploaded"
            return data, error
        if conversion:
            _upload(Path(local.out), pair.out, self.run, overwrite=conversion.overwrite)
        return data, error


def _local(place: str, folder: Path) -> str:
    """Returns where a file or folder lies on this machine while it is worked on."""
    folder.mkdir()
    return str(folder / PurePosixPath(place).name) if is_url(place) else place


def _renamed(data: Any, names: dict[str, str]) -> Any:
    """Returns plain data with other names for some paths."""
    if isinstance(data, str):
        for here, there in names.items():
            data = data.replace(here, there) if here else data
        return data
    if isinstance(data, list):
        return [_renamed(each, names) for each in data]
    if isinstance(data, dict):
        return {key: _renamed(value, names) for key, value in data.items()}
    return data


def _filesystem(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL, and the path in it."""
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
def _storage(
    url: str, failed: str, kind: type[CkptconvError] = FileRefused
) -> Iterator[tuple[Any, str]]:
    """Gives the file system of a URL and the path in it, and turns what they raise into our error.

    `failed` says what then failed, such as `cannot be listed`.
    """
    fs, path = _filesystem(url)
    try:
        yield fs, path
    except CkptconvError:
        raise
    except Exception as error:  # every protocol's library has exceptions of its own
        why = "no such file" if isinstance(error, FileNotFoundError) else _reason(error)
        raise kind(f"{url}: {failed}: {why}", hint=CHECK) from error


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _fetch(url: str, to: Path, moved: Moved) -> None:
    """Downloads a file and, if it is an index, its shards."""
    with _storage(url, "cannot be fetched") as (fs, path):
        _fetch_one(fs, path, to, moved)
        if not url.endswith(INDEX_SUFFIX):
            return
        shards = read_json(to).get("weight_map")
        for name in sorted(set(shards.values())) if isinstance(shards, dict) else ():
            if isinstance(name, str) and Path(name).name == name:  # the reader refuses others
                _fetch_one(fs, f"{path.rpartition('/')[0]}/{name}", to.parent / name, moved)


def _fetch_one(fs: Any, path: str, to: Path, moved: Moved) -> None:
    need, free = int(fs.size(path) or 0), shutil.disk_usage(to.parent).free
    if need > free:
        raise OutputError(
            f"{to.parent}: the scratch disk has {free:,} bytes free, and {path} needs {need:,}",
            hint="give the worker a larger local directory, or set TMPDIR",
            code="disk-full",
        )
    from fsspec.callbacks import Callback  # type: ignore[import-untyped]  # no stubs

    def hook(size: int | None, value: int, **_: Any) -> None:
        moved(0, size or need)  # a sign of life: only the bytes of the work count

    fs.get_file(path, str(to), callback=Callback(hooks={"moved": hook}))


def _fetch_folder(url: str, to: Path) -> None:
    with _storage(url, "cannot be fetched") as (fs, path):
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


def _check_destination(url: str, run: str, *, overwrite: bool) -> set[str]:
    """Checks that a folder of a storage may be written; returns the files that are there."""
    with _storage(url, "cannot be looked at", OutputError) as (fs, path):
        names = _existing(fs, path)
        mark = fs.cat_file(f"{path}/{MARK}").decode() if MARK in names else ""
        if not names or mark == run:  # a worker of this run began it, and was lost
            return names
        if not overwrite:
            what = "is being uploaded by another run, or that one was lost" if mark else "exists"
            hint = f"{option('overwrite', True)} replaces it; or choose another name"
            raise OutputError(f"{url}: {what}", hint=hint, code="exists")
        stays = f"so {option('overwrite', True)} does not remove it"
        record = f"{ASIDE}/{RECORD}"
        listed = _listed(fs, f"{path}/{record}") if record in names else frozenset()
        if not (mark or listed):
            what = f"exists and is not a converted folder that lists its files, {stays}"
            hint = "remove it yourself, or choose another name"
            raise OutputError(f"{url}: {what}", hint=hint, code="exists")
        if strangers := sorted(names - listed if not mark else ()):
            raise OutputError(
                f"{url}: holds what ckptconv did not write, {stays}",
                problems=strangers,
                hint="move these files elsewhere, or choose another name",
                code="exists",
            )
        return names


def _listed(fs: Any, path: str) -> frozenset[str]:
    """Returns the files that a record lists; none if it is no record of ours."""
    try:
        values = json.loads(fs.cat_file(path, end=MOST_JSON))
    except (ValueError, RecursionError):
        return frozenset()
    return recorded_files(values) if isinstance(values, dict) else frozenset()


def _upload(folder: Path, url: str, run: str, *, overwrite: bool) -> None:
    """Uploads a folder, its index last. If that fails, what was uploaded is removed."""
    old = _check_destination(url, run, overwrite=overwrite)
    fs, path = _filesystem(url)
    files = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    names = sorted(files, key=_order)
    mark = folder.parent / "mark"
    mark.write_text(run, encoding="utf-8")
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
        left = "a part of it is there, without an index"
        if not old:
            left = _removed(fs, path, {*names, MARK})
        if not isinstance(error, Exception):
            raise
        why = "; ".join(filter(None, (_reason(error), left)))
        raise OutputError(f"{url}: cannot be written: {why}", hint=CHECK) from error


def _removed(fs: Any, path: str, names: set[str]) -> str:
    """Removes what was uploaded; returns what to say if that fails as well."""
    try:
        _remove(fs, path, names)
    except Exception as error:  # noqa: BLE001  (reported beside the error that led here)
        return f"what was uploaded could not be removed: {error}"
    return ""


def _order(name: str) -> tuple[bool, bool, bool, str]:
    """Sorts weights before configurations, and those before the index that makes a folder load."""
    return name == INDEX, "/" not in name, name.endswith(".json"), name


def _remove(fs: Any, path: str, names: set[str]) -> None:
    for name in sorted(names):
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{name}")
