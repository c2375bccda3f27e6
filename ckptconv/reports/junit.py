"""A verification as a JUnit XML report, which every CI system can display."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET  # writes only; nothing is parsed

from ..destination import Kind
from ..verification.result import CHECKS, Verification

FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold."""

ROOT = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<testsuites?[\s/>]", re.DOTALL
)
"""How a JUnit report begins."""


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return ROOT.match(file.read(4096)) is not None


REPORT = Kind("a JUnit report", _is_report)
"""What a job that runs again may replace without being asked."""


def junit(verification: Verification) -> bytes:
    """Returns the report, with a test case for each check of a component."""
    failed = sum(bool(check.problems) for check in verification.checks)
    counts = {"tests": str(len(verification.checks)), "failures": str(failed), "errors": "0"}
    seconds = f"{verification.seconds:.3f}"
    suites = ET.Element("testsuites", {**counts, "time": seconds})
    name = _text(f"ckptconv verify {verification.folder}")
    suite = ET.SubElement(suites, "testsuite", {"name": name, **counts, "time": seconds})
    for check in verification.checks:
        named = {"classname": _text(f"ckptconv.{check.component}"), "name": check.kind}
        case = ET.SubElement(suite, "testcase", named)
        if check.problems:
            message = f"{check.component}: {check.lines[0]} (of {len(check.problems):,})"
            failure = ET.SubElement(case, "failure", {"message": _text(message), "type": "problem"})
            failure.text = _text("\n".join(check.lines))
        lines = [f"{CHECKS[check.kind]}: {check.extent}", *(f"note: {n}" for n in check.notes)]
        ET.SubElement(case, "system-out").text = _text("\n".join(lines))
    ET.indent(suites)
    return bytes(ET.tostring(suites, encoding="utf-8", xml_declaration=True))


def _text(text: str) -> str:
    return FORBIDDEN.sub("\ufffd", text)
