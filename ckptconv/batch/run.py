"""A run over many files: which files, which folders, and what came of each."""

from __future__ import annotations

import contextlib
import glob
import secrets
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from ..destination import without_suffix
from ..errors import CkptconvError, UsageError
from ..folder.names import CONFIG_FILES, INDEX
from ..planning.step import ASIDE
from .storage import Staged, check_urls, is_url, listed, size_of
from .work import Outcome, Pair, Work, attempt

Progress = Callable[[int, int, int], None]
"""Is called with the number of files that are done, and bytes of input done and in all."""

MAGIC = frozenset("*?[")


def run(
    work: Work,
    pairs: Sequence[Pair],
    *,
    processes: int = 1,
    dask: str | None = None,
    progress: Progress = lambda _files, _done, _total: None,
) -> list[Outcome]:
    """Works on files, goes on past those that fail, and returns the outcomes in their order.

    Args:
        work: a `Conversion`, a `Proof` or an `Inspection`.
        pairs: the files, from `paired`.
        processes: how many files at a time. More than one are worked on in processes of their own;
            a script that asks for that needs the usual `if __name__ == "__main__"`.
        dask: address of a Dask scheduler whose workers do it, such as `tcp://10.0.0.1:8786`.
        progress: see `Progress`.

    Raises:
        UsageError: the scheduler does not answer, or what an address needs is not installed.
    """
    local = [pair.mapped(lambda place: place.removeprefix("file://")) for pair in pairs]
    check_urls(place for pair in local for place in (pair.source, pair.out) if is_url(place))
    staged = Staged(work, secrets.token_hex(8))
    sizes = [_size(pair.source) for pair in local]
    counted = [0] * len(sizes)
    outcomes: dict[int, Outcome] = {}

    def moved(index: int, done: int, total: int) -> None:
        counted[index] = sizes[index] * done // max(total, 1)
        progress(len(outcomes), sum(counted), sum(sizes))

    ended: Generator[tuple[int, Outcome]]
    if dask is not None:
        from .fleet import each as on_fleet

        ended = on_fleet(staged, [pair.mapped(_absolute) for pair in local], dask)
    elif processes > 1 and len(local) > 1:
        from .workers import each as in_processes

        ended = in_processes(staged, local, processes, moved)
    else:
        ended = ((i, attempt(staged, pair, partial(moved, i))) for i, pair in enumerate(local))
    with contextlib.closing(ended):  # whatever happens here, the workers end
        for index, outcome in ended:
            outcomes[index] = replace(outcome, pair=pairs[index])
            moved(index, 1, 1)
    return [outcomes[index] for index in range(len(pairs))]


def expanded(files: Iterable[str]) -> list[str]:
    """Returns the files that paths, URLs and patterns name, each pattern's sorted.

    Raises:
        UsageError: a pattern matches nothing, or what a URL needs is not installed.
        FileRefused: a storage cannot be listed.
    """
    found = [(file, _matches(file)) for file in files]
    if empty := [file for file, matches in found if not matches]:
        raise UsageError(f"{', '.join(empty)}: matches no file", hint="check the pattern")
    return [match for _, matches in found for match in matches]


def are_several(files: Sequence[str], out: str = "") -> bool:
    """Whether files, as they were given, each get a folder of their own in `out`.

    As with `cp`: if there are several or might be, or if `out` ends in a slash and is not itself a
    model's folder.
    """
    within = out.endswith("/") and not _is_model(Path(out))
    return len(files) > 1 or within or any(_is_pattern(file) for file in files)


def paired(files: Sequence[str], out: str) -> list[Pair]:
    """Gives each file a folder of its name without the suffix: in `out`, or without it beside it.

    Without `out`, the conversion of a folder decides where its model goes.

    Raises:
        UsageError: two files would get the same folder, or a URL has no `out`.
    """
    if not out and (remote := [file for file in files if is_url(file)]):
        raise UsageError(f"{', '.join(remote)}: OUT is missing", hint="say where the folder goes")
    within = f"{out.rstrip('/')}/" if out else ""
    names = [without_suffix(PurePosixPath(file).name if out else file) for file in files]
    pairs = [
        Pair(file, "" if not out and Path(file).is_dir() else within + name)
        for file, name in zip(files, names, strict=True)
    ]
    counts = Counter(pair.out for pair in pairs if pair.out)
    if twice := [f"{p.source}: {p.out}" for p in pairs if counts[p.out] > 1]:
        raise UsageError(
            "several files would get the same folder",
            problems=twice,
            hint="rename one of them, or convert them into different folders",
        )
    return pairs


def _matches(file: str) -> list[str]:
    if not _is_pattern(file):
        return [file]
    # Path.glob would refuse an absolute pattern, and spells names in its own way
    return listed(file) if is_url(file) else sorted(glob.glob(file, recursive=True))  # noqa: PTH207


def _is_pattern(file: str) -> bool:
    """Whether a name is to be matched; the name of a file that exists is not."""
    if not MAGIC & set(file) or file.startswith(("http://", "https://")):
        return False
    return is_url(file) or not Path(file).exists()


def _is_model(folder: Path) -> bool:
    """Whether a folder is what a conversion makes, or a part of it."""
    names = (INDEX, ASIDE, *CONFIG_FILES.values())
    return any((folder / name).exists() for name in names)


def _absolute(place: str) -> str:
    """Returns a place that means the same to a worker with another current folder."""
    return place if not place or is_url(place) else str(Path(place).absolute())


def _size(source: str) -> int:
    """Returns the size of a file, or 0 if the work on it will fail anyway."""
    try:
        return size_of(source) if is_url(source) else Path(source).stat().st_size
    except (CkptconvError, OSError, ValueError):
        return 0
