"""What a verification found, as parts of a page."""

from __future__ import annotations

from ...verification.result import CHECKS, Check, Verification
from .markup import Html, Section, element, joined, listing, table

__all__ = ["checks", "verdict"]

SHOWN = 20
"""Problems of a check that are shown at once; the others open with a click."""


def verdict(verification: Verification, *, alone: bool) -> list[Html]:
    """Returns the result in a sentence, as the top of a page shows it.

    Args:
        verification: what was found.
        alone: the folder was verified without its source, so the page begins with its name.
    """
    failed = sum(bool(check.problems) for check in verification.checks)
    count = f"{len(verification.checks)} checks"
    if verification.passed:
        mark = element("strong", "\u2713 Verified.")
        of = f"is {verification.source} converted" if verification.source else "is consistent"
        said = f"{verification.folder} {of}: {count}, no problem."
    else:
        mark = element("strong", "\u2717 Not verified.")
        problems = len(verification.problems)
        said = (
            f"{verification.folder}: {problems:,} problem{'s' * (problems > 1)} "
            f"in {failed} of {count}."
        )
    parts = [element("h1", verification.folder.name)] if alone else []
    kind = "ok" if verification.passed else "bad"
    return [*parts, element("p", mark, " ", said, class_=f"verdict {kind}")]


def checks(verification: Verification) -> list[Section]:
    """Returns the checks, those of a component together, with every problem."""
    rows = [
        (
            element("code", check.component),
            joined((element("b", check.kind), f": {CHECKS[check.kind]}")),
            _result(check),
            _found(check),
        )
        for check in verification.checks
    ]
    took = f"{verification.seconds:.1f} s"
    if verification.source:
        took = f"{verification.nbytes:,} bytes compared in {took}"
    body = table(("component", "check", "result", "what was found"), rows, class_="blocks checks")
    return [Section("checks", "Checks", joined((body, element("p", took))))]


def _result(check: Check) -> Html:
    if not check.problems:
        return element("span", "\u2713 passed", class_="ok")
    return element("span", f"\u2717 {len(check.problems):,} wrong", class_="bad")


def _found(check: Check) -> Html:
    problems = [joined((element("code", p.where), f": {p.what}")) for p in check.problems]
    parts = [element("p", check.extent)] if check.extent else []
    if problems:
        parts.append(listing(problems[:SHOWN]))
    if rest := problems[SHOWN:]:
        parts.append(element("details", element("summary", f"{len(rest):,} more"), listing(rest)))
    if check.notes:
        parts.append(listing(check.notes, class_="notes"))
    return joined(parts)
