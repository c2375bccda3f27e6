"""`ckptconv architectures`: what is known."""

from __future__ import annotations

from typing import Any

import click

from .shared import console, echo_json, json_option, key_maps


@click.command("architectures")
@json_option
def command(*, as_json: bool) -> None:
    """List the known architectures, their tasks and components."""
    rows: list[dict[str, Any]] = [
        {
            "architecture": a.name,
            "title": a.title,
            "tasks": {t.name: t.pipeline for t in a.tasks},
            "components": [c.name for c in a.models],
        }
        for a in key_maps().architectures.values()
    ]
    if as_json:
        echo_json(rows)
        return
    from rich.table import Table

    table = Table("architecture", "title", "task")
    table.add_column("pipeline", no_wrap=True)
    table.add_column("components")
    for row in rows:
        first: tuple[str, ...] = (str(row["architecture"]), str(row["title"]))
        parts = ", ".join(row["components"])
        for task, pipeline in row["tasks"].items():
            table.add_row(*first, task, pipeline, parts)
            first, parts = ("", ""), ""
        table.add_section()
    console().print(table)
