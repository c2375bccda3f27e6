"""`ckptconv plan`: what would become of every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..conversion.convert import plan_file
from ..errors import printable
from ..reports.report import plan_rows
from .shared import FILE, echo_json, exit_for, note, options_of, output_options, plan_options


@click.command("plan")
@click.argument("file", type=FILE)
@plan_options
@output_options
def command(file: Path, *, as_json: bool, **options: Any) -> None:
    """Show what becomes of every key of FILE: source, operation, target, shape.

    Exits with 3 if keys are missing or of the wrong shape.
    """
    plan, _ = plan_file(file, options_of(options))
    rows = plan_rows(plan)
    if as_json:
        echo_json(
            {
                "file": str(file),
                "assembly": plan.assembly and plan.assembly.as_data(),
                "lossless": plan.lossless,
                "problems": list(plan.problems),
                "absent": list(plan.absent),
                "keys": rows,
            },
            plan.fault,
        )
    else:
        for row in rows:
            targets = " + ".join(row["targets"]) or row["reason"]
            reason = f" ({row['reason']})" if row["reason"] and row["targets"] else ""
            cast = row["target_dtype"] or row["dtype"]
            dtype = row["dtype"] if cast == row["dtype"] else f"{row['dtype']} to {cast}"
            cells = (row["source"], row["op"], f"{targets}{reason}", f"{dtype} {row['shape']}")
            click.echo("\t".join(map(printable, cells)))
        for line in plan.assembly.lines if plan.assembly else ():
            note(printable(line))
        counts = f"{len(rows):,} keys; {'lossless' if plan.lossless else 'not lossless'}"
        note(f"{counts}; missing components: {', '.join(plan.absent) or 'none'}")
        for text in plan.notes:
            note(f"warning: {printable(text)}")
        for problem in plan.problems:
            click.echo(f"problem: {printable(problem)}", err=True)
    exit_for(plan.fault)
