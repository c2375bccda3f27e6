"""What is done to one file of a run, and what came of it.

Work is a value, so it can be sent to another process or another machine.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..conversion.convert import convert
from ..conversion.write import Packaging, Report
from ..detection.detect import Detection, inspect
from ..errors import CkptconvError, on_the_command_line
from ..maps.architecture import KeyMaps
from ..options import Options
from ..planning.plan import Plan, build_plan
from ..reports.report import hashes, inspection
from ..verification.result import Verification
from ..verification.verify import verify, verify_report

Moved = Callable[[int, int], None]
"""Is called with the bytes of one file that were moved so far, and its bytes in all."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A file of a run.

    Attributes:
        source: path or URL of the file.
        out: path or URL of the folder to make from it or to compare with it; empty for none.
    """

    source: str
    out: str = ""

    def mapped(self, function: Callable[[str], str]) -> Pair:
        """Returns the pair with a function applied to both places."""
        return Pair(function(self.source), function(self.out))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a file.

    Attributes:
        pair: the file.
        data: what the command's `--json` says about it; empty if the file was refused.
        error: why the work failed, as the command line prints it; empty if it did not.
        traceback: of an error that is a bug in ckptconv.
        seconds: how long it took.
    """

    pair: Pair
    data: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    traceback: str = ""
    seconds: float = 0

    def as_data(self) -> dict[str, Any]:
        """Returns plain data, for JSON."""
        data = {"file": self.pair.source, "error": self.error or None, **self.data}
        return data | ({"traceback": self.traceback} if self.traceback else {})


Work = Callable[[Pair, Moved], tuple[dict[str, Any], str]]
"""Works on one file. Returns the data and the error of its `Outcome`, or raises a CkptconvError."""


def attempt(work: Work, pair: Pair, moved: Moved) -> Outcome:
    """Works on one file. Whatever goes wrong is part of the outcome, so that the run goes on."""
    started = time.monotonic()
    data: Mapping[str, Any] = {}
    trace = ""
    try:
        with on_the_command_line():  # a worker's process does not know it
            data, error = work(pair, moved)
    except CkptconvError as refused:
        error = str(refused)
    except Exception as crash:  # noqa: BLE001  (reported with its traceback)
        error = f"{pair.source}: ckptconv failed: {type(crash).__name__}: {crash}"
        trace = traceback.format_exc()
    return Outcome(pair, data, error, trace, time.monotonic() - started)


@dataclass(frozen=True)
class Conversion:
    """Converts a file as `ckptconv.convert` does, and verifies the folder if `verified` is set."""

    options: Options = field(default_factory=Options)
    packaging: Packaging = field(default_factory=Packaging)
    overwrite: bool = False
    strict: bool = False
    verified: bool = False

    def convert(self, source: str, out: str, moved: Moved) -> Report:
        """Converts one file; into a folder beside it if `out` is empty."""
        return convert(
            source,
            out or None,
            variant=self.packaging.variant,
            max_shard_size=self.packaging.max_shard_size,
            configs_only=not self.packaging.weights,
            overwrite=self.overwrite,
            strict=self.strict,
            progress=moved,
            **self.options.as_words(),
        )

    def verify(self, report: Report, source: str, moved: Moved) -> Verification:
        """Verifies what was just converted."""
        return verify_report(report, source, self.options, strict=self.strict, progress=moved)

    def __call__(self, pair: Pair, moved: Moved, /) -> tuple[dict[str, Any], str]:
        """Converts one of several files."""
        if not self.verified:
            return self.convert(pair.source, pair.out, moved).as_data(), ""
        report = self.convert(pair.source, pair.out, lambda done, total: moved(done, 2 * total))
        found = self.verify(report, pair.source, lambda done, total: moved(total + done, 2 * total))
        return report.as_data() | {"verification": found.as_data()}, _failure(found)


@dataclass(frozen=True)
class Proof:
    """Verifies a folder against its file, as `ckptconv.verify` does."""

    options: Options = field(default_factory=Options)
    finite: bool = False
    strict: bool = False

    def verify(self, source: str | None, out: str, moved: Moved) -> Verification:
        """Verifies one folder, alone if there is no source."""
        return verify(
            source,
            out,
            finite=self.finite,
            strict=self.strict,
            progress=moved,
            **self.options.as_words(),
        )

    def __call__(self, pair: Pair, moved: Moved, /) -> tuple[dict[str, Any], str]:
        """Verifies one of several folders."""
        found = self.verify(pair.source, pair.out, moved)
        return found.as_data(), _failure(found)


@dataclass(frozen=True)
class Inspection:
    """Says what a file is, as `ckptconv inspect` does; with its hashes if `hashed` is set."""

    hashed: bool = False
    maps: KeyMaps | None = None

    def inspect(self, source: str) -> tuple[Detection, Plan | None, dict[str, Any]]:
        """Inspects one file. There is no plan for a file that was refused."""
        detection = inspect(source, maps=self.maps)
        plan = None if detection.refusal else build_plan(detection)
        data = inspection(detection, plan)
        if self.hashed:
            data["hashes"] = hashes(detection.header)
        return detection, plan, data

    def __call__(self, pair: Pair, moved: Moved, /) -> tuple[dict[str, Any], str]:
        """Inspects one of several files; a file that cannot be converted is an error."""
        detection, _, data = self.inspect(pair.source)
        error = detection.refusal and str(detection.refusal)
        if data["problems"]:  # a file that was refused has none
            message = f"{pair.source}: cannot be converted"
            error = str(CkptconvError(message, problems=data["problems"]))
        return data, error or ""


def problems(count: int) -> str:
    """Returns a number of problems in words."""
    return f"{count:,} problem{'s' if count > 1 else ''}"


def _failure(found: Verification) -> str:
    if found.passed:
        return ""
    message = f"{found.folder}: {problems(len(found.problems))}"
    return str(CkptconvError(message, problems=found.problems))
