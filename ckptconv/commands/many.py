"""What the commands that take several files share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from ..batch.run import are_several, expanded, paired, run
from ..batch.storage import is_url
from ..batch.work import Outcome, Pair, Work
from ..errors import UsageError
from .shared import document, echo_json, echo_table, exit_for, is_quiet, joined, note, progress

PLACE = click.Path()
"""A path or a URL, or a pattern of either. The work looks at it; click does not."""

Columns = Mapping[str, Callable[[Outcome], str]]
"""By title, what a column of the table says about a file."""

many_options = joined(
    click.option(
        "-j", "--jobs", type=click.IntRange(1), metavar="N", help="Work on N files at a time."
    ),
    click.option(
        "--dask",
        metavar="ADDRESS",
        help="Work on the cluster of this Dask scheduler, such as tcp://HOST:8786.",
    ),
)
"""Adds the options that say who works on several files; `outcomes_of` reads them."""


def outcomes_of(
    what: str,
    work: Work,
    files: Sequence[str],
    out: str | None,
    options: Mapping[str, Any],
    **for_one: object,
) -> list[Outcome] | None:
    """Works on files behind a progress bar; returns None for one file on this machine.

    `out` is None if no folders are made, and empty if each goes beside its file. `options` has the
    values of `many_options`, `for_one` the options that are refused for several files.
    """
    jobs, dask = options["jobs"], options["dask"]
    several = are_several(files, out or "")
    if not (several or dask or any(map(is_url, (*files, out or "")))):
        return None
    found = expanded(files)
    if out is None:
        pairs = [Pair(file) for file in found]
    else:
        pairs = paired(found, out) if several or not out else [Pair(found[0], out)]
    if given := [f"--{name}" for name, value in for_one.items() if value]:
        raise UsageError(
            f"{' and '.join(given)}: for one file only", hint="give the file alone, by its path"
        )
    if jobs and dask:
        raise UsageError("--jobs is for this machine, and --dask has workers of its own")
    with progress(f"{what} 0/{len(pairs)}") as show:
        return run(
            work,
            pairs,
            processes=jobs or 1,
            dask=dask,
            progress=lambda n, done, total: show(done, total, f"{what} {n}/{len(pairs)}"),
        )


def finish(
    outcomes: Sequence[Outcome], columns: Columns, *, as_json: bool, err: bool = False
) -> None:
    """Prints what came of the files, as a table or as JSON; exits with the highest code of any."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    worst = max(errors, key=lambda error: error.exit_code, default=None)
    if as_json:
        echo_json({"files": list(map(_document, outcomes))}, worst, "files")
    else:
        if not (err and is_quiet()):
            rows = [[o.pair.source, *(cell(o) for cell in columns.values())] for o in outcomes]
            echo_table(["file", *columns], rows, err=err)
        for outcome in outcomes:
            if outcome.error:
                click.echo(f"error: {outcome.error}\n{outcome.traceback}".rstrip(), err=True)
        note(f"{len(outcomes) - len(errors)} of {len(outcomes)} files done")
    exit_for(worst)


def _document(outcome: Outcome) -> dict[str, Any]:
    """Returns what the command prints for this file alone, and which file it is."""
    trace = {"traceback": outcome.traceback} if outcome.traceback else {}
    found: dict[str, Any] = document(outcome.data, outcome.error)
    return found | {"file": outcome.pair.source} | trace


def what_it_is(outcome: Outcome) -> str:
    """Returns the architecture and the task of a file."""
    return ", ".join(filter(None, map(outcome.data.get, ("architecture", "task"))))


def why_not(outcome: Outcome) -> str:
    """Returns the sentence of an error, without the name of the file."""
    message = outcome.error.message if outcome.error else ""
    return message.removeprefix(f"{outcome.pair.source}: ")
