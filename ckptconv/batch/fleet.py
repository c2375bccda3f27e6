"""Works on files on many machines: the workers of a Dask cluster that is already running."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import CkptconvError, UsageError, option
from ..version import __version__
from .storage import EXTRA, Staged
from .work import Outcome, Pair, attempt

if TYPE_CHECKING:
    from distributed import Client

TIMEOUT = "10s"
"""How long the scheduler has to answer."""


def each(staged: Staged, pairs: Sequence[Pair], scheduler: str) -> Generator[tuple[int, Outcome]]:
    """Yields the index and the outcome of each file as it ends.

    A file whose worker is lost is given to another, as often as the scheduler allows
    (`distributed.scheduler.allowed-failures`). Paths must be such that the workers can reach them.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        message = f"{option('dask')} needs Dask, which is not installed: {error}"
        raise UsageError(message, hint=EXTRA) from error
    try:
        client = Client(scheduler, timeout=TIMEOUT, set_as_default=False)  # type: ignore[no-untyped-call]  # theirs is untyped
    except (OSError, ValueError) as error:
        message = f"{scheduler}: no Dask scheduler answers: {error}"
        raise UsageError(message, hint="check its address") from error
    with contextlib.closing(client):
        _check_workers(client, scheduler)
        futures = client.map(_on_worker, [staged] * len(pairs), pairs, pure=False)
        indices = {future: index for index, future in enumerate(futures)}
        try:
            for future in as_completed(futures, loop=client.loop):  # type: ignore[no-untyped-call]  # theirs is untyped
                index = indices[future]
                yield index, _outcome(future, pairs[index])
        finally:
            client.cancel(futures)  # type: ignore[no-untyped-call]  # none is left, unless the run was interrupted


def _on_worker(staged: Staged, pair: Pair) -> Outcome:
    from distributed import get_worker

    scratch = get_worker().local_directory
    return attempt(replace(staged, scratch=scratch), pair, lambda _done, _total: None)


def _outcome(future: Any, pair: Pair) -> Outcome:
    if future.status == "finished":
        outcome: Outcome = future.result()
        return outcome
    error = future.exception()  # Dask's own, such as KilledWorker: `attempt` raises none
    what = f"{pair.source}: the worker was lost: {error}"
    return Outcome(pair, error=CkptconvError(what, code="worker-lost"))


def _check_workers(client: Client, scheduler: str) -> None:
    """Checks that every worker has this version of ckptconv."""
    answer: Any = client.get_versions(packages=["ckptconv"])
    versions = {name: each["packages"].get("ckptconv") for name, each in answer["workers"].items()}
    if wrong := {name: version for name, version in versions.items() if version != __version__}:
        raise UsageError(
            f"{scheduler}: not every worker has ckptconv {__version__}",
            problems=[f"{name}: has {version or 'none'}" for name, version in wrong.items()],
            hint="install this version on every worker, with what the addresses need",
        )
