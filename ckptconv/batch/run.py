"""A run over many files: which files, which folders, and what came of each."""

from __future__ import annotations

import contextlib
import glob
import secrets
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..errors import CkptconvError, UsageError
from ..folder.names import CONFIG_FILES, INDEX
from ..planning.step import ASIDE
from .storage import INDEX_SUFFIX, Staged, check_urls, is_url, listed, size_of
from .work import Outcome, Pair, Work, attempt

Progress = Callable[[int, int, int], None]
"""Is called with files that are done, bytes of input that are done, and bytes of input in all."""

MAGIC = frozenset("*?[")


def run(
    work: Work,
    pairs: Sequence[Pair],
    *,
    processes: int = 1,
    scheduler: str | None = None,
    progress: Progress = lambda _files, _done, _total: None,
) -> list[Outcome]:
    """Works on files, and goes on past those that fail.

    Args:
        work: what to do with each file: a `Conversion`, a `Proof` or an `Inspection`.
        pairs: the files, from `paired`.
        processes: how many files at once; more than one are worked on in processes of their own
            (a script that asks for that needs the usual `if __name__ == "__main__"`).
        scheduler: address of a Dask scheduler whose workers do it instead, such as
            `tcp://10.0.0.1:8786`.
        progress: see `Progress`.

    Returns:
        What came of each file, in the order of `pairs`.

    Raises:
        UsageError: the scheduler does not answer, or what an address needs is not installed.
    """
    given = pairs
    pairs = [Pair(_plain(pair.source), pair.out and _plain(pair.out)) for pair in given]
    check_urls(place for pair in pairs for place in (pair.source, pair.out) if is_url(place))
    meter = _Meter([_size(pair.source) for pair in pairs], progress)
    staged = Staged(work, secrets.token_hex(8))
    ended: Generator[tuple[int, Outcome]]
    if scheduler is not None:
        from .fleet import each as on_fleet

        ended = on_fleet(staged, [_absolute(pair) for pair in pairs], scheduler)
    elif processes > 1 and len(pairs) > 1:
        from .workers import each as in_processes

        ended = in_processes(staged, pairs, processes, meter.moved)
    else:
        ended = (
            (i, attempt(staged, pair, lambda done, total, i=i: meter.moved(i, done, total)))  # type: ignore[misc]  # mypy has no type for i=i
            for i, pair in enumerate(pairs)
        )
    outcomes: dict[int, Outcome] = {}
    with contextlib.closing(ended):  # workers end with it, whatever happens here
        for index, outcome in ended:
            outcomes[index] = replace(outcome, pair=given[index])
            meter.ended(index)
    return [outcomes[index] for index in range(len(pairs))]


def expanded(files: Iterable[str]) -> list[str]:
    """Returns the files that paths, URLs and patterns name, each pattern's sorted.

    Raises:
        UsageError: a pattern matches nothing; or what a URL needs is not installed.
        FileRefused: a storage cannot be listed.
    """
    found: list[str] = []
    empty: list[str] = []
    for file in files:
        matches = [file]
        if _is_pattern(file):
            matches = listed(file) if is_url(file) else _globbed(file)
            empty += [file] if not matches else []
        found += matches
    if empty:
        raise UsageError(f"{', '.join(empty)}: matches no file", hint="check the pattern")
    return found


def are_several(files: Sequence[str], out: str | None = None) -> bool:
    """Whether files, as they were given, each get a folder of their own in `out`.

    As with `cp`: where they are more than one, or might be, or where `out` ends in a slash and is
    not itself a model's folder.
    """
    within = out is not None and out.endswith("/") and not _is_model(Path(out))
    return len(files) > 1 or within or any(_is_pattern(file) for file in files)


def paired(files: Sequence[str], out: str) -> list[Pair]:
    """Gives each file the folder in `out` that has its name, without the suffix.

    Raises:
        UsageError: two files would get the same folder.
    """
    pairs = [Pair(file, f"{out.rstrip('/')}/{_stem(file)}") for file in files]
    counts = Counter(pair.out for pair in pairs)
    if twice := [f"{p.source}: {p.out}" for p in pairs if counts[p.out] > 1]:
        raise UsageError(
            "several files would get the same folder",
            problems=twice,
            hint="rename one of them, or convert them into different folders",
        )
    return pairs


class _Meter:
    """Adds up the progress of files: each counts as many bytes as it has."""

    def __init__(self, sizes: Sequence[int], show: Progress) -> None:
        self.sizes, self.show = sizes, show
        self.done = [0] * len(sizes)
        self.files = 0

    def moved(self, index: int, done: int, total: int) -> None:
        self.done[index] = self.sizes[index] * done // max(total, 1)
        self._tell()

    def ended(self, index: int) -> None:
        self.done[index] = self.sizes[index]
        self.files += 1
        self._tell()

    def _tell(self) -> None:
        self.show(self.files, sum(self.done), sum(self.sizes))


def _is_pattern(file: str) -> bool:
    """Whether a name is to be matched; that of a file that is there is not."""
    if not MAGIC & set(file) or file.startswith(("http://", "https://")):
        return False
    return is_url(file) or not Path(file).exists()


def _globbed(pattern: str) -> list[str]:
    # not Path.glob, which takes no absolute pattern and spells the names in its own way
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207


def _is_model(folder: Path) -> bool:
    """Whether a folder is what a conversion makes, or a part of it."""
    names = (INDEX, ASIDE, *CONFIG_FILES.values())
    return any((folder / name).exists() for name in names)


def _stem(file: str) -> str:
    name = PurePosixPath(file).name
    return name.removesuffix(INDEX_SUFFIX) if name.endswith(INDEX_SUFFIX) else Path(name).stem


def _plain(place: str) -> str:
    """Returns the path of a `file://` URL; anything else as it is."""
    return place.removeprefix("file://")


def _absolute(pair: Pair) -> Pair:
    """Returns a pair that means the same to a worker with another current folder."""
    source, out = (
        place and (place if is_url(place) else str(Path(place).absolute()))
        for place in (pair.source, pair.out)
    )
    return Pair(source or "", out)


def _size(source: str) -> int:
    """Returns the size of a file; 0 if it cannot be told, which the work on it will say."""
    try:
        return size_of(source) if is_url(source) else Path(source).stat().st_size
    except (CkptconvError, OSError, ValueError):
        return 0
