"""`ckptconv convert`: the main job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ..batch.work import Conversion, Outcome
from ..configs.config import class_of
from ..conversion.write import Packaging, Report
from ..dtypes import CASTS, LIBRARY_NAMES
from ..errors import UsageError, printable
from ..folder.names import INDEX
from ..inference.model import loading_dtype
from ..planning.assembly import Assembly
from ..reports.numbers import size
from ..verification.result import Verification
from .many import PLACE, Columns, finish, many_options, outcomes_of, what_it_is, why_not
from .shared import echo_json, exit_for, note, options_of, output_options, plan_options, progress
from .verify import as_text

COLUMNS: Columns = {
    "result": lambda outcome: "failed" if outcome.error else "done",
    "is": what_it_is,
    "size": lambda outcome: size(sum(outcome.data["files"].values())) if outcome.data else "",
    "seconds": lambda outcome: f"{outcome.seconds:.1f}",
    "note": why_not,
}


@click.command("convert")
@click.argument("places", nargs=-1, type=PLACE, metavar="FILE... [OUT]")
@plan_options
@click.option("--variant", default="", help="Add a word such as fp16 to the weight file names.")
@click.option(
    "--max-shard-size", help="Split the weights into files of at most this size, such as 5GB."
)
@click.option("--configs-only", is_flag=True, help="Write no weights.")
@click.option(
    "--strict", is_flag=True, help="Refuse keys that no map knows, and incomplete components."
)
@click.option("--verify", "verified", is_flag=True, help="Verify the folder after writing it.")
@click.option("--overwrite", is_flag=True, help="Replace an existing converted folder.")
@many_options
@output_options
def command(
    *,
    places: tuple[str, ...],
    variant: str,
    max_shard_size: str | None,
    configs_only: bool,
    strict: bool,
    verified: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert the checkpoint FILE into the diffusers folder OUT.

    Without OUT, the folder goes next to the file: model.safetensors becomes model. The weights stay
    as they are, bit for bit, unless --dtype is given. OUT appears when it is complete, or not at
    all. With --verify, the exit code is 1 if the verification fails.

    With --assemble, FILE is a folder: the files in it that make a model together become OUT, by
    default a folder beside them that has the name of the transformer's or UNet's file.

    If there are several files, or a quoted pattern of them, each becomes a folder in OUT with the
    name of the file; so does a single file if OUT ends in a slash. A file that fails does not stop
    the others and is reported at the end. FILE and OUT may be URLs, such as s3://BUCKET/FILE.
    """
    *files, out = places if len(places) > 1 else (*places, "")
    if not files:
        raise click.MissingParameter(param_hint="'FILE'", param_type="argument")
    if verified and configs_only:
        raise UsageError("--verify compares weights, and --configs-only writes none")
    packaging = Packaging.of(variant, max_shard_size, configs_only=configs_only)
    work = Conversion(options_of(options), packaging, overwrite, strict, verified)
    if outcomes := outcomes_of("converting", work, files, out, options):
        if not as_json:
            _print_several(outcomes)
        finish(outcomes, COLUMNS, as_json=as_json, err=True)
        return
    with progress("converting") as show:
        report = work.convert(files[0], out, show)
    found = None
    if verified:
        with progress("verifying") as show:
            found = work.verify(report, files[0], show)
    error = found.error if found else None
    if as_json:
        more = {"verification": found.as_data()} if found else {}
        echo_json(report.as_data() | more, error)
    else:
        _print(report, found, packaging)
    exit_for(error)


def _print(report: Report, found: Verification | None, packaging: Packaging) -> None:
    for line in report.plan.assembly.lines if report.plan.assembly else ():
        note(printable(line))
    for warning in report.warnings:
        note(f"warning: {printable(warning)}")
    architecture, task = report.plan.detection.require()
    note(f"{architecture.title}, {task.name}: {task.pipeline}")
    for fact in report.plan.detection.facts.values():
        if fact.source == "assumed":
            note(f"assumed {fact.name} = {fact.value}: {fact.detail}")
    note(f"{size(sum(report.files.values()))} in {report.seconds:.1f} s")
    if found and found.passed:
        note(as_text(found))
    elif found:
        click.echo(as_text(found), err=True)
    if packaging.weights and (call := loading_call(report, packaging.variant)):
        note(f"load it with {printable(call)}")
    click.echo(report.out)


def loading_call(report: Report, variant: str = "") -> str:
    """Returns the Python call that loads a converted folder in the dtype of its weights.

    Empty for a part of a model. Without a dtype, diffusers loads all weights in fp32. What is null
    in `model_index.json` has to be None in the call.
    """
    single = report.plan.detection.require()[0].single
    if not single and INDEX not in report.files:
        return ""
    dtype = LIBRARY_NAMES[CASTS[loading_dtype(report.plan)]]
    options = {"torch_dtype": f"torch.{dtype}"} if dtype != "float32" else {}
    if variant:
        options["variant"] = repr(variant)
    options |= dict.fromkeys(report.plan.absent, "None")
    arguments = ", ".join([repr(str(report.out)), *(f"{k}={v}" for k, v in options.items())])
    cls = class_of(report.configs[single]) if single else "DiffusionPipeline"
    return f"{cls}.from_pretrained({arguments})"


def _print_several(outcomes: Sequence[Outcome]) -> None:
    """Prints what the files of a folder were taken for, the warnings, and the folders made."""
    for outcome in outcomes:
        if assembly := outcome.data.get("assembly"):
            for line in Assembly.of_data(assembly, what_it_is(outcome)).lines:
                note(f"{outcome.pair.source}: {printable(line)}")
        for warning in outcome.data.get("warnings", ()):
            note(f"warning: {outcome.pair.source}: {printable(warning)}")
        if not outcome.error:
            click.echo(outcome.pair.out or outcome.data["out"])
