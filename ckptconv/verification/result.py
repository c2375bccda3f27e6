"""What a verification found: checks, each with its problems."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SHOWN, CheckFailed, CkptconvError
from ..planning.plan import Plan

NAMES = 3
"""Names in a line that stands for several equal problems."""

CHECKS = {
    "input": "the file and the folder can be read, and are what they should be",
    "source": "every key of the file is accounted for",
    "architecture": "the folder is a model of a known architecture",
    "index": "model_index.json names the components and their classes",
    "code": "nothing asks whoever loads the folder to run code",
    "weights": "names, shapes and dtypes are those that the class expects",
    "config": "the configuration agrees with the weights and with the architecture",
    "data": "the values are those of the file",
    "zeros": "no large weight is zero, as an unfinished download leaves it",
    "finite": "no value is NaN or infinite",
    "tokenizer": "vocabulary, merges and special tokens are those of CLIP",
    "record": "what ckptconv notes of the source agrees with it",
    "map": "every key map is well-formed and keeps the laws",
    "arch": "every arch.yaml is well-formed",
    "layout": "the published header converts to what the classes expect",
    "task": "so does the header with the input channels of this task",
    "sample": "so does the header of a small sample",
}
"""What each kind of check shows."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong.

    Attributes:
        where: name of the tensor, the configuration's entry or the file.
        what: what was found and what was expected.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one component.

    Attributes:
        component: its name; `model` for what concerns the whole folder.
        kind: a key of `CHECKS`.
        problems: all of them; the check passed if there are none.
        notes: what is worth knowing and is not wrong.
        extent: what was checked, such as `686 tensors as UNet2DConditionModel expects them`.
    """

    component: str
    kind: str
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    extent: str = ""

    @classmethod
    def of(
        cls, component: str, kind: str, findings: Iterable[Problem | str], extent: str = ""
    ) -> Check:
        """Returns the check that found these problems and, as sentences, these notes."""
        found = tuple(findings)
        problems = tuple(each for each in found if isinstance(each, Problem))
        notes = tuple(each for each in found if isinstance(each, str))
        return cls(component, kind, problems, notes, extent)

    @property
    def collapsed(self) -> list[Problem]:
        """The problems, where one stands for all that differ only in where they are."""
        places: dict[str, list[str]] = {}
        for problem in self.problems:
            places.setdefault(problem.what, []).append(problem.where)
        return [Problem(_places(found), what) for what, found in places.items()]

    @property
    def lines(self) -> list[str]:
        """The problems for a reader: equal ones collapsed, and the first only of very many."""
        lines = list(map(str, self.collapsed))
        more = len(lines) - SHOWN
        return lines[:SHOWN] + [f"... and {more:,} more (--json lists all)"] * (more > 0)

    def as_data(self) -> dict[str, Any]:
        """Returns it as plain data, for JSON."""
        return {
            "component": self.component,
            "check": self.kind,
            "passed": not self.problems,
            "extent": self.extent,
            "problems": [{"where": p.where, "what": p.what} for p in self.problems],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, repr=False)
class Verification:
    """The result.

    Attributes:
        folder: that was verified.
        source: the file that it should come from; None if it was verified alone.
        architecture: name of the architecture; empty if none matches.
        task: name of the task; empty if none matches.
        checks: grouped by component.
        nbytes: of tensors that were compared.
        seconds: that it took.
        plan: of the source; None if the folder was verified alone.
        refusal: why the file or the folder could not be verified at all.
    """

    folder: Path
    source: Path | None
    architecture: str
    task: str
    checks: tuple[Check, ...]
    nbytes: int
    seconds: float
    plan: Plan | None = field(default=None, repr=False)
    refusal: CkptconvError | None = None

    @classmethod
    def refused(cls, folder: str, source: str | None, error: CkptconvError) -> Verification:
        """Returns the verification of what was refused: one check, which failed."""
        where, _, what = error.message.partition(": ")
        problems = (Problem(where, what), *(Problem(where, each) for each in error.problems))
        check = Check("model", "input", problems, (error.hint,) if error.hint else ())
        path = Path(source) if source else None
        return cls(Path(folder), path, "", "", (check,), 0, 0.0, refusal=error)

    def __repr__(self) -> str:
        state = "passed" if self.passed else f"{len(self.problems):,} problems"
        return f"<Verification of {self.folder}: {len(self.checks)} checks, {state}>"

    @property
    def passed(self) -> bool:
        """Whether no check found a problem."""
        return not any(check.problems for check in self.checks)

    @property
    def problems(self) -> tuple[str, ...]:
        """Every problem as a sentence that begins with the component."""
        return tuple(
            f"{check.component}: {problem}" for check in self.checks for problem in check.problems
        )

    @property
    def error(self) -> CkptconvError | None:
        """What a command ends with: the refusal, or that a check failed."""
        return self.refusal or failure(str(self.folder), self.checks)

    def as_data(self) -> dict[str, Any]:
        """Returns it as plain data, for JSON."""
        return {
            "folder": str(self.folder),
            "source": None if self.source is None else str(self.source),
            "architecture": self.architecture,
            "task": self.task,
            "passed": self.passed,
            "checks": [check.as_data() for check in self.checks],
            "bytes_compared": self.nbytes,
            "seconds": round(self.seconds, 3),
        }


def failure(what: str, checks: Sequence[Check]) -> CheckFailed | None:
    """Returns the error that says which checks of something failed, or None if all passed."""
    lines = [f"{check.component}: {line}" for check in checks for line in check.lines]
    count = sum(len(check.problems) for check in checks)
    return CheckFailed(f"{what}: {counted(count)}", problems=lines) if count else None


def counted(count: int) -> str:
    """Returns a number of problems in words."""
    return f"{count:,} problem{'s' if count > 1 else ''}"


def _places(names: Sequence[str]) -> str:
    more = len(names) - NAMES
    return ", ".join(names[:NAMES]) + (f" and {more:,} more" if more > 0 else "")
