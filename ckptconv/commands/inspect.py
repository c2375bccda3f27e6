"""`ckptconv inspect`: what a file is, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..batch.work import Inspection, Outcome
from ..destination import Destination
from ..detection.detect import Detection
from ..errors import printable
from ..planning.plan import Plan
from ..reports.numbers import millions, size
from .many import PLACE, Columns, finish, many_options, outcomes_of, why_not
from .shared import FILE, console, echo_json, exit_unless, json_option, key_maps

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..reports.network import Block


def _assumed(outcome: Outcome) -> str:
    return ", ".join(f"{k} = {v}" for k, v in outcome.data.get("assumed", {}).items())


COLUMNS: Columns = {
    "architecture": lambda outcome: outcome.data.get("architecture") or "",
    "task": lambda outcome: outcome.data.get("task") or "",
    "size": lambda outcome: size(outcome.data["size"]) if outcome.data else "",
    "assumed, or why not": lambda outcome: why_not(outcome) or _assumed(outcome),
}
HASHES: Columns = {"hash": lambda outcome: outcome.data.get("hashes", {}).get("short", "")}


@click.command("inspect")
@click.argument("files", nargs=-1, type=PLACE, metavar="FILE...")
@click.option("--tree", is_flag=True, help="Draw the network block by block.")
@click.option("--verdicts", is_flag=True, help="Show why each architecture matches or does not.")
@click.option("--hash", "hashed", is_flag=True, help="Compute the hashes (reads the whole file).")
@click.option("--html", type=FILE, help="Write a page about the file, with a drawing of it.")
@click.option("--overwrite", is_flag=True, help="Replace an existing page.")
@many_options
@json_option
def command(
    *,
    files: tuple[str, ...],
    tree: bool,
    verdicts: bool,
    hashed: bool,
    html: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what FILE is: architecture, task, components, and the evidence.

    Several files, or a quoted pattern of them, are listed in a table.

    Exits with 1 if FILE is not a checkpoint that can be converted as it is.
    """
    if not files:
        raise click.MissingParameter(param_hint="'FILE'", param_type="argument")
    work = Inspection(hashed, key_maps())
    for_one = {"tree": tree, "verdicts": verdicts, "html": html}
    if outcomes := outcomes_of("inspecting", work, files, None, options, **for_one):
        finish(outcomes, {**COLUMNS, **(HASHES if hashed else {})}, as_json=as_json)
        return
    if html:
        from ..reports.html import PAGE, page  # a tenth of an inspection's time

        destination = Destination(html, overwrite, PAGE, inputs=files)
        destination.check()
    detection, plan, data = work.inspect(files[0])
    if html:
        destination.write(page(detection, plan, hashes=data.get("hashes")).encode())
        click.echo(f"page: {html}", err=True)
    if as_json:
        echo_json(data)
    else:
        _print(data, detection, plan if tree else None, verdicts=verdicts)
    exit_unless(not (detection.refusal or data["problems"]))


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
    for name, verdict in data["verdicts"].items() if verdicts else ():
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
    parts += ["evidence:", *(f"  - {line}" for line in data["evidence"])]
    if data["ema"]:
        parts.append("EMA: the file holds a copy of the UNet; --ema takes it")
    assumed = [f"{k} = {v}" for k, v in data.get("assumed", {}).items()]
    sections: dict[str, list[str]] = {
        "assumed, since the weights cannot tell": assumed,
        "missing components": data["missing"],
        "problems": data["problems"],
        "unclaimed keys": data["unclaimed"],
        "notes": data["notes"],
        "metadata": [f"{k}: {v[:100]}" for k, v in data["metadata"].items()],
    }
    for name, lines in sections.items():
        if lines:
            parts += [f"{name}:", *(f"  - {line}" for line in lines[:20])]
        if len(lines) > 20:
            parts.append(f"  ... and {len(lines) - 20} more (--json shows all)")
    return parts


def _components(components: dict[str, dict[str, Any]]) -> RenderableType:
    from rich.table import Table

    table = Table("component", "class")
    for title in ("tensors", "parameters", "size"):
        table.add_column(title, justify="right")
    table.add_column("dtypes")
    for name, row in components.items():
        counts = (f"{row['tensors']:,}", millions(row["parameters"]), size(row["bytes"]))
        dtypes = ", ".join(f"{dtype} x {count:,}" for dtype, count in row["dtypes"].items())
        table.add_row(name, row["class"], *counts, dtypes)
    return table


def _tree(plan: Plan) -> RenderableType:
    from rich.tree import Tree

    from ..reports.network import blocks

    architecture, task = plan.detection.require()
    root = Tree(task.pipeline)
    for component in architecture.models:
        if members := blocks(plan, component.name):
            total = sum(block.parameters for block in members)
            branch = root.add(f"{component.name}: {total:,} parameters")
            for block in members:
                branch.add(f"{block.name}: {', '.join(_traits(block))}")
    return root


def _traits(block: Block) -> list[str]:
    traits = []
    if block.channels:
        traits.append(f"{block.channels} channels")
    if block.resnets:
        traits.append(f"{block.resnets} resnets")
    if any(block.attention):
        traits.append(f"attention depth {'+'.join(map(str, block.attention))}")
    elif block.attention:
        traits.append(f"{len(block.attention)} attention")
    if block.resamples:
        traits.append(f"{block.resamples}sample")
    return [*traits, f"{block.parameters:,} parameters"]
