"""A verification as Markdown, such as for the summary of a CI job."""

from __future__ import annotations

import re

from ..detection.detect import Detection
from ..verification.result import Check, Verification, counted

_SPACE = re.compile(r"[\x00-\x20\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")


def markdown(verification: Verification, detection: Detection | None = None) -> str:
    """Returns a heading, what the file is, the checks as a table, and the first problems.

    No text from a file can escape from its code span.
    """
    source, folder = verification.source, _code(verification.folder)
    of = f"is {_code(source)} converted" if source else "is consistent"
    verdict = f"Verified: {folder} {of}" if verification.passed else f"Not verified: {folder}"
    lines = [f"### {verdict}", ""]
    if detection and detection.architecture and detection.task:
        what = f"{detection.architecture.title}, {detection.task.name}"
        facts = [f for f in detection.facts.values() if f.source == "assumed"]
        assumed = "".join(f"; assumed {_code(f'{f.name} = {f.value}')}" for f in facts)
        lines += [f"{what}{assumed}", ""]
    lines += ["| component | check | result |", "| --- | --- | --- |"]
    checks = verification.checks
    lines += [f"| {_code(c.component)} | {c.kind} | {_result(c)} |" for c in checks]
    if problems := verification.problems:
        lines += ["", f"{counted(len(problems))}:", ""]
        lines += [f"- {_code(f'{c.component}: {line}')}" for c in checks for line in c.lines]
    return "\n".join([*lines, "", ""])


def _result(check: Check) -> str:
    return f"{len(check.problems):,} wrong" if check.problems else f"ok: {_code(check.extent)}"


def _code(value: object) -> str:
    """Returns a value as a code span that it cannot end, in one cell of a table."""
    plain = _SPACE.sub(" ", str(value)).replace("`", "'").replace("|", "\\|").strip()
    return f"`{plain or ' '}`"
