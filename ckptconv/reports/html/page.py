"""The page as a whole, its summary for a notebook, and the file that a page is written to.

The page is one file: its style and its script are part of it, and its Content-Security-Policy
admits these two by their hashes and nothing else. So a browser fetches nothing, and runs nothing
that came with a file. The page is complete without the script, which only searches the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...destination import check_destination, new_file
from ...detection.detect import Detection
from ...errors import CkptconvError, NotACheckpoint
from ...planning.plan import Plan, build_plan
from ...planning.step import ASIDE
from ...verification.result import CHECKS, Verification
from ...version import __version__
from ..network import blocks
from ..report import groups, header_rows, inspection, plan_rows, weights
from .drawing import draw
from .render import ours, policy, rendered

DOCTYPE = "<!doctype html>\n"
LIMITS = {"rows": 20_000, "value": 2_000, "lines": 500, "problems": 20}
"""At most so many keys in the table, characters of a value of the metadata, lines of a list, and
problems of a check before the rest folds away: a hostile file can hold millions."""


def page(
    detection: Detection | None,
    plan: Plan | None,
    verification: Verification | None = None,
    *,
    hashes: Mapping[str, str] | None = None,
) -> str:
    """Returns a page: HTML, complete in itself.

    Args:
        detection: what the file is; one that was refused gets a page as well. None if a folder was
            verified without its source.
        plan: what becomes of the keys; None if the file was refused or there is none.
        verification: the result of a verification, if there was one.
        hashes: of the file, from `ckptconv.reports.report.hashes`, if they were computed.
    """
    sections = {"checks": "Checks"} if verification else {}
    path = detection.header.path if detection else verification.folder if verification else None
    values: dict[str, Any] = {}
    if detection:
        values = _about(detection, plan)
        values["rows"] = plan_rows(plan) if plan else header_rows(detection.header)
        data, drawings = values["data"], values["drawings"]
        wanted = {
            "trouble": ("What deserves a look", values["trouble"] or "refusal" in data),
            "network": ("The network", drawings),
            "shares": ("Parameters and bytes", drawings),
            "evidence": ("Evidence", True),
            "facts": ("Facts and assumptions", detection.facts or data.get("assumed")),
            "metadata": (
                "Hashes and metadata" if hashes else "Metadata",
                hashes or data["metadata"],
            ),
            "keys": ("Keys", True),
        }
        sections |= {ident: title for ident, (title, shown) in wanted.items() if shown}
    style, script = ours("network.css") + ours("page.css"), ours("page.js")
    return rendered(
        "page.html.j2",
        **values,
        name=path.name if path else "",
        detection=detection,
        verification=verification,
        hashes=hashes or {},
        sections=sections,
        checks=CHECKS,
        aside=ASIDE,
        limits=LIMITS,
        style=style,
        script=script,
        policy=policy(style, script),
        version=__version__,
    )


def fragment(detection: Detection, plan: Plan | None = None) -> str:
    """Returns a summary of a file with the drawing of its network, for the cell of a notebook.

    Args:
        detection: what the file is.
        plan: what becomes of its keys; made here if it is not given.
    """
    try:
        if plan is None and not detection.refusal:
            plan = build_plan(detection)
        values = _about(detection, plan)
    except CkptconvError as error:  # its architecture is known, and yet something does not fit
        refusal = NotACheckpoint(error.message, problems=error.problems, hint=error.hint)
        values = _about(replace(detection, refusal=refusal), None)
    style = ours("network.css") + ours("notebook.css")
    return rendered("fragment.html.j2", **values, detection=detection, limits=LIMITS, style=style)


def _about(detection: Detection, plan: Plan | None) -> dict[str, Any]:
    """Returns what the templates say of a file."""
    data = inspection(detection, plan)
    components = data["components"]
    found = groups(plan) if plan and components else {}
    order = dict.fromkeys([*components, *found])
    trouble = {
        "Keys that are missing, unknown or of a wrong shape": data["problems"],
        "Keys that no map knows": data["unclaimed"],
        "Components that the file does not have": data["missing"],
        "Notes": data["notes"],
    }
    return {
        "data": data,
        "parameters": sum(part["parameters"] for part in components.values()),
        "dtypes": dict.fromkeys(d for part in components.values() for d in part["dtypes"]),
        "trouble": {title: lines for title, lines in trouble.items() if lines},
        "shares": {name: (len(found[name]), weights(found[name])) for name in order},
        # the components of a donor are in another file
        "nbytes": max(
            detection.header.size, sum(t.nbytes for part in found.values() for t in part)
        ),
        "drawings": {name: draw(name, blocks(plan, name)) for name in components if plan},
    }


def write_page(path: Path, content: str, *, overwrite: bool = False) -> None:
    """Writes a page: whole, or not at all.

    Args:
        path: the file to make.
        content: from `page`.
        overwrite: replace a page that is there; nothing but a page is replaced.

    Raises:
        OutputError: the file exists and may not be replaced, or cannot be written.
    """
    check_page(path, overwrite=overwrite)
    with new_file(path) as hidden:
        hidden.write_text(content, encoding="utf-8")


def check_page(path: Path, *, overwrite: bool = False) -> None:
    """Checks that a page may be written, before the work that it reports on.

    Args:
        path: the file to make.
        overwrite: replace a page that is there; nothing but a page is replaced.

    Raises:
        OutputError: the file exists and may not be replaced, or its folder is missing.
    """
    check_destination(path, overwrite=overwrite, kind=("a page", _is_page))


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(DOCTYPE)) == DOCTYPE.encode()
