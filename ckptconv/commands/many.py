"""What the commands that take several files share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from ..batch.run import are_several, expanded, paired, run
from ..batch.storage import is_url
from ..batch.work import Outcome, Pair, Work
from ..errors import UsageError
from .shared import echo_json, exit_unless, joined, progress

PLACE = click.Path()
"""A path or a URL, or a pattern of either. The work looks at it; click does not."""

WIDE = 1000
"""Width of a table that is not written to a terminal: no row is broken."""

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
    """Prints what came of the files, as a table or as JSON; exits with 1 if any failed."""
    failed = [outcome for outcome in outcomes if outcome.error]
    if as_json:
        echo_json([outcome.as_data() for outcome in outcomes])
    else:
        _print_table(outcomes, columns, err=err)
        for outcome in failed:
            click.echo(f"error: {outcome.error}\n{outcome.traceback}".rstrip(), err=True)
        click.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} files done", err=True)
    exit_unless(not failed)


def what_it_is(outcome: Outcome) -> str:
    """Returns the architecture and the task of a file."""
    return ", ".join(filter(None, map(outcome.data.get, ("architecture", "task"))))


def why_not(outcome: Outcome) -> str:
    """Returns the first line of an error, without the name of the file."""
    return outcome.error.partition("\n")[0].removeprefix(f"{outcome.pair.source}: ")


def _print_table(outcomes: Sequence[Outcome], columns: Columns, *, err: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("file")
    for title in columns:
        table.add_column(title, overflow="fold")
    for outcome in outcomes:
        cells = (outcome.pair.source, *(write(outcome) for write in columns.values()))
        table.add_row(*map(Text, cells))
    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() else WIDE
    Console(stderr=err, width=width, highlight=False).print(table)
