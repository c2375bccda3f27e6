"""What the commands that take several files share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from ..batch.run import are_several, expanded, paired, run
from ..batch.storage import is_url
from ..batch.work import Outcome, Pair, Work
from ..errors import UsageError
from .shared import echo_json, progress

PLACE = click.Path()
"""A path or a URL, or a pattern of either; looked at by the work, not by click."""

Column = Callable[[Outcome], str]

WIDE = 1000
"""Columns of a table that no terminal shows: no row is broken."""

_OPTIONS = (
    click.option(
        "-j", "--jobs", type=click.IntRange(1), metavar="N", help="Work on N files at once."
    ),
    click.option(
        "--dask",
        metavar="ADDRESS",
        help="Have the workers of this Dask scheduler do it, such as tcp://HOST:8786.",
    ),
)


def many_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say who works on several files."""
    return functools.reduce(lambda f, option: option(f), reversed(_OPTIONS), function)


def asked(
    files: Sequence[str], out: str | None = None, dask: str | None = None
) -> list[Pair] | None:
    """Returns the files of a run over several; None for one file on this machine.

    Raises:
        UsageError: a pattern matches nothing, or two files would get the same folder.
    """
    several = are_several(files, out)
    if not (several or dask or any(is_url(place) for place in (*files, out))):
        return None
    found = expanded(files)
    if out is None:
        return [Pair(file) for file in found]
    return paired(found, out) if several else [Pair(found[0], out)]


def outcomes_of(
    what: str, work: Work, pairs: Sequence[Pair], jobs: int | None, dask: str | None
) -> list[Outcome]:
    """Works on files behind a progress bar.

    Raises:
        UsageError: `--jobs` and `--dask` are both given, or the scheduler does not answer.
    """
    if jobs and dask:
        raise UsageError("--jobs is for this machine, and --dask has workers of its own")
    with progress(f"{what} 0/{len(pairs)}") as show:

        def tell(files: int, done: int, total: int) -> None:
            show(done, total, f"{what} {files}/{len(pairs)}")

        return run(work, pairs, processes=jobs or 1, scheduler=dask, progress=tell)


def finish(
    outcomes: Sequence[Outcome], columns: Mapping[str, Column], *, as_json: bool, err: bool
) -> None:
    """Prints what came of the files; exits with 1 if any of them failed.

    Args:
        outcomes: of the files.
        columns: of the table, after the name of the file: what to write by title.
        as_json: print JSON on stdout, and no table.
        err: print the table on stderr.
    """
    failed = [outcome for outcome in outcomes if outcome.error]
    if as_json:
        echo_json([outcome.as_data() for outcome in outcomes])
    else:
        _print_table(outcomes, columns, err=err)
        for outcome in failed:
            click.echo(f"error: {outcome.error}\n{outcome.traceback}".rstrip(), err=True)
        click.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} files done", err=True)
    if failed:
        click.get_current_context().exit(1)


def refuse_for_several(**options: object) -> None:
    """Refuses options that are about one file.

    Raises:
        UsageError: one of them is given.
    """
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value]:
        raise UsageError(
            f"{' and '.join(given)}: for one file only", hint="give the file alone, by its path"
        )


def what_it_is(outcome: Outcome) -> str:
    """Returns the architecture and the task of a file, for a table."""
    words = (outcome.data.get("architecture"), outcome.data.get("task"))
    return ", ".join(word for word in words if word)


def why_not(outcome: Outcome) -> str:
    """Returns the first line of an error, without the name of the file."""
    return outcome.error.partition("\n")[0].removeprefix(f"{outcome.pair.source}: ")


def _print_table(outcomes: Sequence[Outcome], columns: Mapping[str, Column], *, err: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("file")
    for title in columns:
        table.add_column(title, overflow="fold")
    for outcome in outcomes:
        table.add_row(
            Text(outcome.pair.source), *(Text(write(outcome)) for write in columns.values())
        )
    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() else WIDE
    Console(stderr=err, width=width, highlight=False).print(table)
