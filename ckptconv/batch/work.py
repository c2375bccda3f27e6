"""What is done to one file of a run, and what came of it.

A work is a value: it can be sent to another process or to another machine.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..conversion.convert import convert
from ..conversion.write import Packaging, Report
from ..detection.detect import inspect
from ..errors import CkptconvError, on_the_command_line
from ..maps.architecture import KeyMaps
from ..options import Options
from ..planning.plan import build_plan
from ..reports.report import hashes, inspection
from ..verification.result import Verification
from ..verification.verify import verify, verify_report

Moved = Callable[[int, int], None]
"""Is called with bytes that were moved and bytes in all, of one file."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A file of a run.

    Attributes:
        source: path or URL of the file.
        out: path or URL of the folder that is made from it or compared with it, if any is.
    """

    source: str
    out: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a file.

    Attributes:
        pair: the file.
        data: what the command's `--json` says of it; empty if the file was refused.
        error: why it is not done, as the command line prints it; empty if it is.
        traceback: of an error that is ckptconv's own.
        seconds: that it took.
    """

    pair: Pair
    data: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    traceback: str = ""
    seconds: float = 0

    def as_data(self) -> dict[str, Any]:
        """Returns it as plain data, for JSON."""
        told = {"file": self.pair.source, "error": self.error or None, **self.data}
        return told | ({"traceback": self.traceback} if self.traceback else {})


class Work(Protocol):
    """What is done to each file."""

    @property
    def makes(self) -> bool:
        """Whether it makes the folder `out`, rather than reads it."""

    @property
    def overwrite(self) -> bool:
        """Whether it may replace a folder."""

    def __call__(self, pair: Pair, moved: Moved, /) -> tuple[dict[str, Any], str]:
        """Does it; returns what there is to tell as plain data, and what is wrong, if anything.

        Raises:
            CkptconvError: the file is refused.
        """


def attempt(work: Work, pair: Pair, moved: Moved) -> Outcome:
    """Does the work on one file; whatever happens to it, the run can go on."""
    started = time.monotonic()
    data: Mapping[str, Any] = {}
    trace = ""
    try:
        with on_the_command_line():  # which a worker's process does not know
            data, error = work(pair, moved)
    except CkptconvError as refused:
        error = str(refused)
    except Exception as crash:  # noqa: BLE001  (told with its traceback; the other files wait)
        error = f"{pair.source}: ckptconv failed: {type(crash).__name__}: {crash}"
        trace = traceback.format_exc()
    return Outcome(pair, data, error, trace, time.monotonic() - started)


@dataclass(frozen=True)
class Conversion:
    """Converts, and proves the folder on demand.

    Attributes:
        options: what becomes of the file.
        packaging: how the weights are divided among files.
        overwrite: replace a converted folder that is there.
        ignore_unclaimed: leave out keys that no map knows.
        verified: prove the folder once it is written.
    """

    options: Options = field(default_factory=Options)
    packaging: Packaging = field(default_factory=Packaging)
    overwrite: bool = False
    ignore_unclaimed: bool = False
    verified: bool = False

    makes: ClassVar[bool] = True

    def convert(self, source: str | Path, out: str | Path, moved: Moved) -> Report:
        """Converts one file; raises as `ckptconv.convert` does."""
        return convert(
            source,
            out,
            variant=self.packaging.variant,
            max_shard_size=self.packaging.max_shard_size,
            configs_only=not self.packaging.weights,
            overwrite=self.overwrite,
            ignore_unclaimed=self.ignore_unclaimed,
            progress=moved,
            **self.options.as_words(),
        )

    def verify(self, report: Report, source: str | Path, moved: Moved) -> Verification:
        """Verifies what was just converted."""
        ignore = self.ignore_unclaimed
        return verify_report(report, source, self.options, ignore_unclaimed=ignore, progress=moved)

    def __call__(self, pair: Pair, moved: Moved, /) -> tuple[dict[str, Any], str]:
        """Converts one of several files: the folder that holds their folders is made."""
        assert pair.out is not None  # noqa: S101  (ours)
        with contextlib.suppress(OSError):  # `convert` says what is wrong with the place
            Path(pair.out).parent.mkdir(exist_ok=True)
        if not self.verified:
            return conversion(self.convert(pair.source, pair.out, moved)), ""
        report = self.convert(pair.source, pair.out, lambda done, all_: moved(done, 2 * all_))
        found = self.verify(report, pair.source, lambda done, all_: moved(all_ + done, 2 * all_))
        return conversion(report, found), _problems(found)


@dataclass(frozen=True)
class Proof:
    """Verifies a folder against its file.

    Attributes:
        options: what the conversion was told.
        finite: look for NaN and infinities as well.
        ignore_unclaimed: keys that no map knows are no problem.
    """

    options: Options = field(default_factory=Options)
    finite: bool = False
    ignore_unclaimed: bool = False

    makes: ClassVar[bool] = False
    overwrite: ClassVar[bool] = False

    def verify(self, source: str | Path | None, out: str | Path, moved: Moved) -> Verification:
        """Verifies one folder; raises as `ckptconv.verify` does."""
        return verify(
            source,
            out,
            finite=self.finite,
            ignore_unclaimed=self.ignore_unclaimed,
            progress=moved,
            **self.options.as_words(),
        )

    def __call__(self, pair: Pair, moved: Moved, /) -> tuple[dict[str, Any], str]:
        """Verifies one of several folders."""
        assert pair.out is not None  # noqa: S101  (ours)
        found = self.verify(pair.source, pair.out, moved)
        return found.as_data(), _problems(found)


@dataclass(frozen=True)
class Inspection:
    """Says what a file is.

    Attributes:
        hashed: compute the hashes of the file as well.
        maps: key maps to use; those that come with ckptconv by default.
    """

    hashed: bool = False
    maps: KeyMaps | None = None

    makes: ClassVar[bool] = False
    overwrite: ClassVar[bool] = False

    def __call__(self, pair: Pair, moved: Moved, /) -> tuple[dict[str, Any], str]:
        """Inspects one of several files; a file that cannot be converted is an error."""
        detection = inspect(pair.source, maps=self.maps)
        data = inspection(detection, None if detection.refusal else build_plan(detection))
        if self.hashed:
            data["hashes"] = hashes(detection.header)
        if detection.refusal:
            return data, str(detection.refusal)
        problems = CkptconvError(f"{pair.source}: cannot be converted", problems=data["problems"])
        return data, str(problems) if data["problems"] else ""


def _problems(found: Verification) -> str:
    """Returns what a verification found wrong, as an error prints it."""
    if found.passed:
        return ""
    count = len(found.problems)
    what = f"{found.folder}: {count:,} problem{'s' if count > 1 else ''}"
    return str(CkptconvError(what, problems=found.problems))


def conversion(report: Report, found: Verification | None = None) -> dict[str, Any]:
    """Returns a conversion and its proof as plain data, for `--json`."""
    architecture, task = report.plan.detection.require()
    data = {
        "out": str(report.out),
        "architecture": architecture.name,
        "task": task.name,
        "pipeline": task.pipeline,
        "lossless": report.plan.lossless,
        "facts": {
            f.name: {"value": f.value, "source": f.source}
            for f in report.plan.detection.facts.values()
        },
        "missing": list(report.plan.absent),
        "unclaimed": list(report.plan.unclaimed),
        "files": dict(report.files),
        "warnings": list(report.warnings),
        "seconds": round(report.seconds, 3),
    }
    return data | ({"verification": found.as_data()} if found else {})
