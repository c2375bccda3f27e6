"""`ckptconv verify`: is this folder that file, converted?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from ..batch.work import Proof, problems
from ..destination import Destination, TextFile
from ..errors import SHOWN, UsageError, printable
from ..options import Options
from ..reports.html import PAGE, page
from ..reports.junit import REPORT, junit
from ..reports.markdown import markdown
from ..reports.numbers import size
from ..verification.result import Check, Verification
from .many import PLACE, Columns, finish, many_options, outcomes_of, what_it_is, why_not
from .shared import FILE, echo_json, exit_unless, json_option, options_of, plan_options, progress

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
@json_option
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

    Exits with 1 if anything is wrong.
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
    with progress("verifying") as show:
        found = work.verify(source, folder, show)
    detection = found.plan.detection if found.plan else None
    if to_junit:
        to_junit.write(junit(found))
    if to_summary:
        to_summary.append(markdown(found, detection))
    if to_page:
        to_page.write(page(detection, found.plan, found).encode())
        click.echo(f"page: {html}", err=True)
    if as_json:
        echo_json(found.as_data())
    else:
        click.echo(as_text(found))
    exit_unless(found.passed)


def _inputs(source: str | None, folder: str, options: Options) -> Iterator[Path]:
    """Yields the files that are read; those beside the source may be its shards."""
    if source:
        yield from (Path(source), *Path(source).parent.glob("*.safetensors"))
    for kind in ("safetensors", "json", "txt"):
        yield from (*Path(folder).glob(f"*.{kind}"), *Path(folder).glob(f"*/*.{kind}"))
    yield from (*options.donors.values(), *(adapter.path for adapter in options.lora))
    yield from filter(None, [options.original_config])


def as_text(found: Verification) -> str:
    """Returns a verification for a terminal: every check, and the first problems."""
    what = f"{found.folder} is " + (f"{found.source}, converted" if found.source else "consistent")
    if not found.passed:
        what = f"{found.folder}: {problems(len(found.problems))}"
    compared = f"{size(found.nbytes)} compared in " if found.source else ""
    state = "passed" if found.passed else "FAILED"
    return f"{checks_as_text(found.checks)}\n{state}: {what} ({compared}{found.seconds:.1f} s)"


def checks_as_text(checks: Sequence[Check]) -> str:
    """Returns checks for a terminal: each of them, and the first problems."""
    lines, left = [], SHOWN
    width = max(len(check.component) for check in checks)
    for check in checks:
        state = problems(len(check.problems)) if check.problems else "ok"
        line = f"{check.component:{width}}  {check.kind:12}  {state}"
        lines.append(f"{line}: {check.extent}" if check.extent else line)
        lines += [f"    note: {printable(note)}" for note in check.notes]
        lines += [f"  - {printable(str(problem))}" for problem in check.problems[:left]]
        left -= min(left, len(check.problems))
    hidden = sum(len(check.problems) for check in checks) - SHOWN
    return "\n".join([*lines, *([f"  ... and {hidden:,} more (--json shows all)"] * (hidden > 0))])
