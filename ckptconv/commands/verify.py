"""`ckptconv verify`: is this folder that file, converted?"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from ..batch.work import Proof
from ..destination import Destination, TextFile
from ..errors import CkptconvError, UsageError, printable
from ..options import Options
from ..reports.html import PAGE, page
from ..reports.junit import REPORT, junit
from ..reports.markdown import markdown
from ..reports.numbers import size
from ..verification.result import Check, Verification, counted
from .many import PLACE, Columns, finish, many_options, outcomes_of, what_it_is, why_not
from .shared import (
    FILE,
    echo_json,
    echo_lines,
    exit_for,
    note,
    options_of,
    output_options,
    plan_options,
    progress,
)

REPORTS = (".xml", ".html", ".md")
"""How the names of reports end: those in a folder that is read are no part of it."""

COLUMNS: Columns = {
    "folder": lambda outcome: outcome.pair.out,
    "result": lambda outcome: "FAILED" if outcome.error else "passed",
    "is": what_it_is,
    "compared": lambda outcome: size(outcome.data.get("bytes_compared", 0)),
    "seconds": lambda outcome: f"{outcome.seconds:.1f}",
    "note": why_not,
}


@click.command("verify")
@click.argument("places", nargs=-1, type=PLACE, required=True, metavar="[FILE]... DIR")
@click.option("--finite", is_flag=True, help="Also look for NaN and infinities.")
@click.option(
    "--strict", is_flag=True, help="Fail for keys that no map knows, and for incomplete components."
)
@click.option("--junit", "report", type=FILE, help="Write a JUnit XML report to this file.")
@click.option("--html", type=FILE, help="Write a page with the checks and a drawing of the file.")
@click.option("--markdown", "summary", type=FILE, help="Append a summary to this file.")
@click.option("--overwrite", is_flag=True, help="Replace existing reports.")
@plan_options
@many_options
@output_options
def command(
    *,
    places: tuple[str, ...],
    finite: bool,
    strict: bool,
    report: Path | None,
    html: Path | None,
    summary: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Prove that the diffusers folder DIR is the checkpoint FILE, converted.

    Whichever program made DIR: every key of FILE is accounted for, the tensors are those that the
    classes of diffusers and transformers expect, every value is equal bit for bit (or rounded
    exactly, where the dtype differs), and configurations and tokenizers are right. Without FILE,
    DIR is checked as far as that goes. Repeat those options of the conversion that DIR has no
    record of.

    If there are several files, or a quoted pattern of them, each is compared with the folder in DIR
    that has its name, as `convert` makes them.

    Exits with 1 if a check fails, and with 3 if FILE or DIR is refused. The reports are written
    in either case.
    """
    *files, folder = places
    work = Proof(options_of(options), finite, strict)
    for_one = {"junit": report, "html": html, "markdown": summary}
    outcomes = files and outcomes_of("verifying", work, files, folder, options, **for_one)
    if outcomes:
        finish(outcomes, COLUMNS, as_json=as_json)
        return
    source = files[0] if files else None
    inputs = [*_inputs(source, folder, work.options)]
    to_junit = report and Destination(report, overwrite, unasked=REPORT, inputs=inputs)
    to_page = html and Destination(html, overwrite, PAGE, inputs=inputs)
    to_summary = summary and TextFile(summary, inputs)
    reports = [each for each in (to_junit, to_page, to_summary) if each]
    if len({each.path.resolve() for each in reports}) < len(reports):
        raise UsageError("two reports have the same name", hint="give each a file of its own")
    for each in reports:
        each.check()
    found = _found(work, source, folder)
    detection = found.plan.detection if found.plan else None
    if to_junit:
        to_junit.write(junit(found))
    if to_summary:
        to_summary.append(markdown(found, detection))
    if to_page:
        to_page.write(page(detection, found.plan, found).encode())
        note(f"page: {html}")
    if as_json:
        echo_json(found.as_data(), found.error)
    elif not found.refusal:
        echo_lines(as_text(found).splitlines())
    if found.refusal:
        click.echo(f"error: {found.refusal}", err=True)
    exit_for(found.error)


def _found(work: Proof, source: str | None, folder: str) -> Verification:
    """Verifies; what cannot be verified is a check that failed, so that it is reported as well."""
    try:
        with progress("verifying") as show:
            return work.verify(source, folder, show)
    except UsageError:
        raise
    except CkptconvError as error:
        return Verification.refused(folder, source, error)


def _inputs(source: str | None, folder: str, options: Options) -> Iterator[Path]:
    """Yields the files that are read; those beside the source may be its shards."""
    places = [Path(folder), *options.donors.values()]
    if source:
        yield from Path(source).parent.glob("*.safetensors")
        places.append(Path(source))
    for place in places:
        yield place
        for pattern in ("*", "*/*"):  # Path.glob would raise where a folder cannot be read
            names = glob.iglob(pattern, root_dir=place)  # noqa: PTH207
            yield from (place / name for name in names if not name.endswith(REPORTS))
    yield from (adapter.path for adapter in options.lora)
    yield from filter(None, [options.original_config])


def as_text(found: Verification) -> str:
    """Returns a verification for a terminal: every check, and the first problems."""
    what = f"{found.folder} is " + (f"{found.source}, converted" if found.source else "consistent")
    if not found.passed:
        what = f"{found.folder}: {counted(len(found.problems))}"
    compared = f"{size(found.nbytes)} compared in " if found.source else ""
    state = "passed" if found.passed else "FAILED"
    return f"{checks_as_text(found.checks)}\n{state}: {what} ({compared}{found.seconds:.1f} s)"


def checks_as_text(checks: Sequence[Check]) -> str:
    """Returns checks for a terminal: each of them, and the first problems."""
    lines = []
    width = max(len(check.component) for check in checks)
    for check in checks:
        state = counted(len(check.problems)) if check.problems else "ok"
        line = f"{check.component:{width}}  {check.kind:12}  {state}"
        lines.append(f"{line}: {check.extent}" if check.extent else line)
        lines += [f"    note: {printable(note)}" for note in check.notes]
        lines += [f"  - {printable(problem)}" for problem in check.lines]
    return "\n".join(lines)
