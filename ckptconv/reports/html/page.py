"""The page as a whole: what it consists of, its policy, and the file that it is written to.

The page is one file: its style and its script stand in it, and its Content-Security-Policy admits
these two by their hashes and nothing else, so a browser fetches nothing and runs nothing that came
with a file. It is whole without the script, which only searches the table of the keys.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Mapping
from pathlib import Path

from ...destination import check_destination, new_file
from ...detection.detect import Detection
from ...planning.plan import build_plan
from ...verification.result import Verification
from ...version import __version__
from ..html import sections
from ..report import inspection
from .checks import checks, verdict
from .markup import Html, Section, element

__all__ = ["check_page", "page", "write_page"]

DOCTYPE = "<!doctype html>\n"


def page(
    detection: Detection | None,
    verification: Verification | None = None,
    *,
    hashes: Mapping[str, str] | None = None,
) -> str:
    """Returns a page: HTML, complete in itself.

    Args:
        detection: what the file is; one that was refused gets a page as well. None if a folder was
            verified without its source.
        verification: what a verification found, if there was one.
        hashes: of the file, from `ckptconv.report.hashes`, if they were computed.
    """
    top: list[Html] = []
    parts: list[Section] = []
    if detection:
        data = inspection(detection)
        plan = None if detection.refusal else build_plan(detection)
        top += sections.beginning(data, plan)
        parts += sections.trouble(data)
        if plan and not data["problems"]:
            parts += [*sections.network(plan), *sections.shares(data, plan)]
        parts += sections.evidence(detection)
        parts += sections.facts(detection, data.get("assumed", {}))
        parts += sections.metadata(detection.header, hashes or {})
        parts += sections.keys(detection.header, plan)
    if verification:
        top += verdict(verification, alone=detection is None)
        parts = [*checks(verification), *parts]
    path = detection.header.path if detection else verification.folder if verification else None
    return DOCTYPE + _document(f"{path.name if path else ''} - ckptconv", top, parts)


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


def _document(title: str, top: list[Html], parts: list[Section]) -> Html:
    style, script = _data("report.css"), _data("report.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
    policy += "base-uri 'none'; form-action 'none'"
    links = (element("li", element("a", p.title, href=f"#{p.ident}")) for p in parts)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", style),
    )
    body = element(
        "body",
        element("header", *top),
        element("nav", element("ul", *links), aria_label="Contents"),
        element("main", *(part.html() for part in parts)),
        element(
            "footer",
            element("p", f"Written by ckptconv {__version__}. The page refers to nothing outside."),
        ),
        element("script", script),
    )
    return element("html", head, body, lang="en")


def _data(name: str) -> Html:
    """Returns a file of ours that stands in the page as it is."""
    data = importlib.resources.files(__package__) / name
    return Html(data.read_text(encoding="utf-8"))


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
