"""The page as a whole, and its summary for a notebook.

The page is one file: its style and its script are part of it, and its Content-Security-Policy
admits these two by their hashes and nothing else. So a browser fetches nothing, and runs nothing
that came with a file. The page is complete without the script, which only searches the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...destination import Kind
from ...detection.detect import Detection
from ...errors import SHOWN, CkptconvError, NotACheckpoint
from ...planning.plan import Plan, build_plan
from ...planning.step import ASIDE
from ...verification.result import CHECKS, Verification
from ...version import __version__
from ..network import blocks
from ..report import amounts, header_rows, inspection, plan_rows, tensors_by_part
from .drawing import draw
from .render import rendered

DOCTYPE = "<!doctype html>\n"
LIMITS = {"rows": 20_000, "value": 2_000, "lines": 500, "problems": SHOWN}
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

    A refused file gets a page as well, without a plan. A folder that was verified without its
    source has no detection.
    """
    sections = {"checks": "Checks"} if verification else {}
    path = detection.header.path if detection else verification.folder if verification else None
    values: dict[str, Any] = {}
    if detection:
        values = _about(detection, plan)
        values["rows"] = plan_rows(plan) if plan else header_rows(detection.header)
        data, drawings = values["data"], values["drawings"]
        metadata = "Hashes and metadata" if hashes else "Metadata"
        wanted = {
            "trouble": ("What deserves a look", values["trouble"] or detection.refusal),
            "network": ("The network", drawings),
            "shares": ("Parameters and bytes", drawings),
            "evidence": ("Evidence", True),
            "facts": ("Facts and assumptions", detection.facts or data.get("assumed")),
            "metadata": (metadata, hashes or data["metadata"]),
            "keys": ("Keys", True),
        }
        sections |= {ident: title for ident, (title, content) in wanted.items() if content}
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
        version=__version__,
    )


def fragment(detection: Detection, plan: Plan | None = None) -> str:
    """Returns a summary of a file with the drawing of its network, for the cell of a notebook."""
    try:
        if plan is None and not detection.refusal:
            plan = build_plan(detection)
        values = _about(detection, plan)
    except CkptconvError as error:  # its architecture is known, and yet something does not fit
        refusal = NotACheckpoint(error.message, problems=error.problems, hint=error.hint)
        values = _about(replace(detection, refusal=refusal), None)
    return rendered("fragment.html.j2", **values, detection=detection, limits=LIMITS)


def _about(detection: Detection, plan: Plan | None) -> dict[str, Any]:
    """Returns what the templates say of a file."""
    data = inspection(detection, plan)
    components = data["components"]
    parts = tensors_by_part(plan) if plan and components else {}
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
        "shares": {
            name: (len(parts[name]), amounts(parts[name]))
            for name in dict.fromkeys([*components, *parts])
        },
        # the components of a donor are in another file
        "nbytes": max(detection.header.size, sum(t.nbytes for p in parts.values() for t in p)),
        "drawings": {name: draw(name, blocks(plan, name)) for name in components if plan},
    }


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(DOCTYPE)) == DOCTYPE.encode()


PAGE = Kind("a page", _is_page)
"""What a page may replace."""
