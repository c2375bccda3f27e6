"""`ckptconv inspect`: what a file is, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..batch.work import Inspection, Outcome
from ..destination import check_destination
from ..detection.detect import Detection, inspect
from ..errors import printable
from ..planning.plan import Plan, build_plan
from ..reports.numbers import millions, size
from ..reports.report import hashes, inspection
from .many import PLACE, asked, finish, many_options, outcomes_of, refuse_for_several, why_not
from .shared import FILE, console, echo_json, json_option, key_maps

if TYPE_CHECKING:
    from rich.console import RenderableType


@click.command("inspect")
@click.argument("files", nargs=-1, type=PLACE, metavar="FILE...")
@click.option("--tree", is_flag=True, help="Draw the network block by block.")
@click.option("--verdicts", is_flag=True, help="Show what every architecture says of the file.")
@click.option("--hash", "hashed", is_flag=True, help="Compute the hashes (reads the whole file).")
@click.option("--html", type=FILE, help="Write a page about the file, with its drawing.")
@click.option("--overwrite", is_flag=True, help="Replace a page that is there.")
@many_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    files: tuple[str, ...],
    *,
    tree: bool,
    verdicts: bool,
    hashed: bool,
    html: Path | None,
    overwrite: bool,
    jobs: int | None,
    dask: str | None,
    as_json: bool,
) -> None:
    """Say what FILE is: architecture, task, components, and the evidence.

    Several files, or a quoted pattern of them, are told in a table.

    Exits with 1 if FILE is not a checkpoint that can be converted as it is.
    """
    if not files:
        raise click.MissingParameter(param_hint="'FILE'", param_type="argument")
    if (pairs := asked(files, dask=dask)) is not None:
        refuse_for_several(tree=tree, verdicts=verdicts, html=html)
        work = Inspection(hashed, key_maps())
        outcomes = outcomes_of("inspecting", work, pairs, jobs, dask)
        finish(outcomes, COLUMNS | (HASHES if hashed else {}), as_json=as_json, err=False)
        return
    if html:
        from ..reports.html import PAGE, page, write_page  # a tenth of an inspection's time

        check_destination(html, overwrite=overwrite, kind=PAGE)
    detection = inspect(files[0], maps=key_maps())
    plan = None if detection.refusal else build_plan(detection)
    data = inspection(detection, plan)
    if hashed:
        data["hashes"] = hashes(detection.header)
    if html:
        write_page(html, page(detection, plan, hashes=data.get("hashes")), overwrite=overwrite)
        click.echo(f"page: {html}", err=True)
    if as_json:
        echo_json(data)
    else:
        _print(data, detection, plan if tree else None, verdicts=verdicts)
    if detection.refusal or data["problems"]:
        ctx.exit(1)


def _assumed(outcome: Outcome) -> str:
    return ", ".join(f"{k} = {v}" for k, v in outcome.data.get("assumed", {}).items())


COLUMNS = {
    "architecture": lambda outcome: outcome.data.get("architecture") or "",
    "task": lambda outcome: outcome.data.get("task") or "",
    "size": lambda outcome: size(outcome.data["size"]) if outcome.data else "",
    "assumed, or why not": lambda outcome: why_not(outcome) or _assumed(outcome),
}
HASHES = {"hash": lambda outcome: outcome.data.get("hashes", {}).get("short", "")}


def _print(
    data: dict[str, Any], detection: Detection, tree: Plan | None, *, verdicts: bool
) -> None:
    out = console()
    if detection.refusal:
        out.print(str(detection.refusal), markup=False)
    else:
        for part in _summary(data):
            out.print(printable(part) if isinstance(part, str) else part, markup=False)
        if tree and not data["problems"]:
            out.print(_tree(tree))
    if verdicts:
        for name, verdict in data["verdicts"].items():
            out.print(f"{name}: {'matches' if verdict['matches'] else 'does not match'}")
            for line in verdict["failing"]:
                out.print(printable(f"  - {line}"), markup=False)
    for name, value in data.get("hashes", {}).items():
        out.print(f"{name}: {value}")


def _summary(data: dict[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = [
        f"{data['file']}: {data['title']}, {data['task']} "
        f"({size(data['size'])}, {data['tensors']:,} tensors)",
        f"architecture: {data['architecture']}    pipeline: {data['pipeline']}",
    ]
    for name in ("prediction_type", "zero_terminal_snr"):
        if fact := data.get(name):  # a lone component has none
            parts.append(f"{name}: {fact['value']} ({fact['source']}: {fact['detail']})")
    if data["components"]:
        parts.append(_components(data["components"]))
    parts.append("evidence:")
    parts += [f"  - {line}" for line in data["evidence"]]
    if data["ema"]:
        parts.append("EMA: the file holds a copy of the UNet; --ema takes it")
    for name, lines in (
        (
            "assumed, since the weights cannot tell",
            [f"{k} = {v}" for k, v in data.get("assumed", {}).items()],
        ),
        ("missing components", data["missing"]),
        ("problems", data["problems"]),
        ("unclaimed keys", data["unclaimed"]),
        ("notes", data["notes"]),
        ("metadata", [f"{k}: {v[:100]}" for k, v in data["metadata"].items()]),
    ):
        if lines:
            parts.append(f"{name}:")
            parts += [f"  - {line}" for line in lines[:20]]
            if len(lines) > 20:
                parts.append(f"  ... and {len(lines) - 20} more (--json shows all)")
    return parts


def _components(components: dict[str, dict[str, Any]]) -> RenderableType:
    from rich.table import Table

    table = Table("component", "class")
    for name in ("tensors", "parameters", "size", "dtypes"):
        table.add_column(name, justify="right" if name != "dtypes" else "left")
    for name, row in components.items():
        dtypes = ", ".join(f"{dtype} x {count:,}" for dtype, count in row["dtypes"].items())
        table.add_row(
            name,
            row["class"],
            f"{row['tensors']:,}",
            millions(row["parameters"]),
            size(row["bytes"]),
            dtypes,
        )
    return table


def _tree(plan: Plan) -> RenderableType:
    from rich.tree import Tree

    from ..reports.network import blocks

    architecture, task = plan.detection.require()
    root = Tree(f"{task.pipeline}")
    for component in architecture.models:
        members = blocks(plan, component.name)
        if not members:
            continue
        total = sum(block.parameters for block in members)
        branch = root.add(f"{component.name}: {total:,} parameters")
        for block in members:
            words = [f"{block.channels} channels" if block.channels else ""]
            words.append(f"{block.resnets} resnets" if block.resnets else "")
            if any(block.attention):
                words.append(f"attention depth {'+'.join(map(str, block.attention))}")
            elif block.attention:
                words.append(f"{len(block.attention)} attention")
            words.append(f"{block.resamples}sample" if block.resamples else "")
            words.append(f"{block.parameters:,} parameters")
            branch.add(f"{block.name}: {', '.join(word for word in words if word)}")
    return root
