"""What a verification found: checks, each with its problems."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..planning.plan import Plan

CHECKS = {
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
    """

    folder: Path
    source: Path | None
    architecture: str
    task: str
    checks: tuple[Check, ...]
    nbytes: int
    seconds: float
    plan: Plan | None = field(default=None, repr=False)

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
