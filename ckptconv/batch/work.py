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
        error: why the work failed; None if it did not.
        traceback: of an error that is a bug in ckptconv.
        seconds: how long it took.
    """

    pair: Pair
    data: Mapping[str, Any] = field(default_factory=dict)
    error: CkptconvError | None = None
    traceback: str = ""
    seconds: float = 0


Done = tuple[dict[str, Any], CkptconvError | None]
"""The data and the error of an `Outcome`."""
Work = Callable[[Pair, Moved], Done]
"""Works on one file; raises the error, or returns it with what is known of the file."""


def attempt(work: Work, pair: Pair, moved: Moved) -> Outcome:
    """Works on one file. Whatever goes wrong is part of the outcome, so that the run goes on."""
    started = time.monotonic()
    data: Mapping[str, Any] = {}
    error: CkptconvError | None
    trace = ""
    try:
        with on_the_command_line():  # a worker's process does not know it
            data, error = work(pair, moved)
    except CkptconvError as refused:
        error = refused
    except Exception as crash:  # noqa: BLE001  (reported with its traceback)
        what = f"{pair.source}: ckptconv failed: {type(crash).__name__}: {crash}"
        error = CkptconvError(what, code="crashed")
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

    def __call__(self, pair: Pair, moved: Moved, /) -> Done:
        """Converts one of several files."""
        if not self.verified:
            return self.convert(pair.source, pair.out, moved).as_data(), None
        report = self.convert(pair.source, pair.out, lambda done, total: moved(done, 2 * total))
        found = self.verify(report, pair.source, lambda done, total: moved(total + done, 2 * total))
        return report.as_data() | {"verification": found.as_data()}, found.error


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

    def __call__(self, pair: Pair, moved: Moved, /) -> Done:
        """Verifies one of several folders."""
        found = self.verify(pair.source, pair.out, moved)
        return found.as_data(), found.error


@dataclass(frozen=True)
class Inspection:
    """Says what a file is, as `ckptconv inspect` does; with its hashes if `hashed` is set."""

    hashed: bool = False
    maps: KeyMaps | None = None

    def inspect(
        self, source: str
    ) -> tuple[Detection, Plan | None, dict[str, Any], CkptconvError | None]:
        """Inspects one file: no plan if it was refused, and an error unless it converts."""
        detection = inspect(source, maps=self.maps)
        plan = None if detection.refusal else build_plan(detection)
        data = inspection(detection, plan)
        if self.hashed:
            data["hashes"] = hashes(detection.header)
        return detection, plan, data, plan.fault if plan else detection.refusal

    def __call__(self, pair: Pair, moved: Moved, /) -> Done:
        """Inspects one of several files."""
        _, _, data, error = self.inspect(pair.source)
        return data, error
