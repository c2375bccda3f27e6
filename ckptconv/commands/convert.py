"""`ckptconv convert`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..convert import convert
from ..errors import UsageError
from ..proof.verification import Verification
from ..proof.verify import verify
from ..showing.numbers import size
from ..writing.execute import Layout, Report, parse_size
from .shared import FILE, choices_of, echo_json, json_option, plan_options, progress
from .verify import as_text


@click.command("convert")
@click.argument("file", type=FILE)
@click.argument("out", type=FILE)
@plan_options
@click.option(
    "--variant", default="", help="Put a word such as fp16 into the names of the weights."
)
@click.option("--max-shard-size", help="Split the weights into files of at most this size: 5GB.")
@click.option("--configs-only", is_flag=True, help="Write no weights.")
@click.option("--ignore-unclaimed", is_flag=True, help="Leave out keys that no key map knows.")
@click.option("--verify", "verified", is_flag=True, help="Prove the folder once it is written.")
@click.option("--overwrite", is_flag=True, help="Replace a converted folder that is there.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    file: Path,
    out: Path,
    *,
    variant: str,
    max_shard_size: str | None,
    configs_only: bool,
    ignore_unclaimed: bool,
    verified: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert the checkpoint FILE into the diffusers folder OUT.

    The weights stay as they are, bit for bit, unless --dtype is given. OUT appears when it is
    complete, or not at all. With --verify, exits with 1 if the proof fails.
    """
    if verified and configs_only:
        raise UsageError("--verify compares weights, and --configs-only writes none")
    layout = Layout(
        variant=variant,
        max_shard=parse_size(max_shard_size) if max_shard_size else 0,
        weights=not configs_only,
    )
    with progress("converting") as show:
        report = convert(
            file,
            out,
            layout=layout,
            overwrite=overwrite,
            ignore_unclaimed=ignore_unclaimed,
            progress=show,
            **choices_of(options),
        )
    found = None
    if verified:
        with progress("verifying") as show:
            found = verify(
                file,
                out,
                ignore_unclaimed=ignore_unclaimed,
                progress=show,
                **choices_of(options),
            )
    if as_json:
        echo_json(as_data(report) | ({"verification": found.as_data()} if found else {}))
    else:
        _print(report, found)
    if found and not found.passed:
        ctx.exit(1)


def _print(report: Report, found: Verification | None) -> None:
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    architecture, task = report.plan.detection.require()
    total = size(sum(report.files.values()))
    click.echo(f"{architecture.title}, {task.name}: {task.pipeline}", err=True)
    for fact in report.plan.detection.facts.values():
        if fact.source == "assumed":
            click.echo(f"assumed {fact.name} = {fact.value}: {fact.detail}", err=True)
    click.echo(f"{total} in {report.seconds:.1f} s", err=True)
    if found:
        click.echo(as_text(found), err=True)
    click.echo(report.out)


def as_data(report: Report) -> dict[str, Any]:
    """Returns a report as plain data, for `--json`."""
    architecture, task = report.plan.detection.require()
    return {
        "out": str(report.out),
        "architecture": architecture.name,
        "task": task.name,
        "pipeline": task.pipeline,
        "lossless": report.plan.lossless,
        "facts": {
            f.name: {"value": f.value, "source": f.source}
            for f in report.plan.detection.facts.values()
        },
        "missing": list(report.plan.absent),
        "unclaimed": list(report.plan.unclaimed),
        "files": dict(report.files),
        "warnings": list(report.warnings),
        "seconds": round(report.seconds, 3),
    }
