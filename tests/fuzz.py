"""Throws damaged checkpoints at the commands, and asks whether each is taken or refused in words.

    python -m tests.fuzz --minutes 60 --keep findings

makes files for an hour, gives each to `inspect`, `plan` and often `convert` and `verify`, prints
what came of it, and exits with 1 if there was a finding: a traceback, a refusal without a word, a
folder that does not verify, an input that takes long or much memory, a process that died. One of
each kind of finding is kept: the files and why. Number and seed make the same input again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing as mp
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from ckptconv.cli import main as command_line
from tests.support.fuzz_inputs import Trial, good, layouts, trial

SECONDS = 10.0
"""Of the processor that an input may take: a whole SDXL header takes 0.3, converted 2."""
HANG = 120
"""Seconds of the clock after which the process is given up."""
MiB = 1 << 20
GROWTH = 256 * MiB
"""Resident memory that the inputs of one process may add; a whole SDXL header adds 30 MB."""
ROOM = 1024 * MiB
"""Address space beyond what the process has at first; to ask for more fails."""
SMALL = 160 * MiB
"""Files above are not converted: their data are holes, but the folder's would be written."""

SHOWN = ((), ("--json",), ("--tree", "--verdicts"))
CHOICES = ((), (), (), ("--ema",), ("--dtype", "fp16"), ("--only", "unet"))
DONORS = ("--vae", "--text-encoder", "--text-encoder-2")
CERTAIN = ("source", "record", "data")
"""Checks that pass on any folder that was converted. Not all can be built: widths can be odd."""
STREAMS = [
    io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")
]
"""Instead of stdout and stderr; always the same ones, since click keeps every stream it has met."""
Found = tuple[str, bool, str, float, int]
"""Kind, whether it was taken, the fault (or nothing), seconds, and memory in bytes."""


@dataclass
class Tally:
    """What came of a run.

    Attributes:
        kinds: how many inputs of each kind were taken, and how many refused.
        slowest: seconds of the processor of the slowest input.
        growth: bytes that inputs added to the resident memory of a process, at most.
        findings: how often each was met, by the last line that says what it is.
    """

    kinds: Counter[tuple[str, bool]] = field(default_factory=Counter)
    slowest: float = 0.0
    growth: int = 0
    findings: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        kinds = "; ".join(
            f"{kind} {self.kinds[kind, False]:,} refused, {self.kinds[kind, True]:,} taken"
            for kind in sorted({kind for kind, _ in self.kinds})
        )
        return (
            f"{self.kinds.total():,} inputs ({kinds}); slowest {self.slowest * 1000:,.0f} ms; "
            f"memory +{self.growth / MiB:,.0f} MiB; findings: {self.findings.total():,}"
        )


def fuzz(minutes: float, seed: int, keep: Path, *, converting: float = 0.3) -> Tally:
    """Makes inputs until the time is over, in a process that a bad one may kill.

    Args:
        minutes: how long; at least one input is tried.
        seed: of the inputs.
        keep: a folder, made for the first finding.
        converting: share of the small inputs that are converted and verified.
    """
    layouts()  # every process begins with them
    tally, number, end = Tally(), 0, time.monotonic() + minutes * 60
    with tempfile.TemporaryDirectory() as scratch:
        while not tally.kinds or time.monotonic() < end:
            with _process(seed, number, converting, Path(scratch)) as (process, connection):
                goes_on = True
                while goes_on:
                    try:
                        found = connection.recv() if connection.poll(HANG) else None
                        why = f"it takes more than {HANG} seconds"
                    except EOFError:
                        process.join()
                        found, why = None, f"the process ended with {process.exitcode}"
                    kind, taken, fault, seconds, growth = found or ("lost", False, why, 0.0, 0)
                    tally.kinds[kind, taken] += 1
                    tally.slowest = max(tally.slowest, seconds)
                    tally.growth = max(tally.growth, growth)
                    if not fault and seconds > SECONDS:
                        fault = f"it takes more than {SECONDS:.0f} seconds of the processor"
                    if growth > GROWTH:
                        fault = fault or f"it takes more than {GROWTH:,} bytes of memory"
                    if fault:
                        _save(tally, trial(seed, number), fault, keep / f"{seed}-{number}")
                    number += 1
                    goes_on = bool(found) and growth <= GROWTH and time.monotonic() < end
    return tally


def _save(tally: Tally, files: Trial, fault: str, folder: Path) -> None:
    """Counts a finding, and keeps the first that ends in this way."""
    place = re.findall(r"^ *File .*", fault, re.MULTILINE)[-1:]
    what = "; ".join([*(line.strip() for line in place), fault.strip().rpartition("\n")[2]])
    tally.findings[what] += 1
    if tally.findings[what] == 1:
        sys.stderr.write(f"{folder}: {what}\n")
        files.write(folder)
        (folder / "why.txt").write_text(fault, errors="backslashreplace")


@contextlib.contextmanager
def _process(
    seed: int, first: int, converting: float, scratch: Path
) -> Iterator[tuple[mp.process.BaseProcess, Connection]]:
    """Gives a process that tries inputs from a number on; it begins at once, as a fork."""
    here, there = mp.Pipe(duplex=False)
    process = mp.get_context("fork").Process(
        target=_work, args=(there, seed, first, converting, scratch), daemon=True
    )
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()
        shutil.rmtree(scratch / "input", ignore_errors=True)


def _work(out: Connection, seed: int, first: int, converting: float, scratch: Path) -> None:
    """Tries inputs from a number on, after a good one, so that all there is to import is there."""
    taken, fault = attempt(good(), random.Random(0), float(converting > 0), scratch / "input")  # noqa: S311
    assert taken, fault
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _kilobytes("VmHWM")
    room = _kilobytes("VmSize") * 1024 + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    for number in itertools.count(first):
        files, rng = trial(seed, number), random.Random(f"{seed} {number} attempt")  # noqa: S311
        started = time.process_time()
        taken, fault = attempt(files, rng, converting, scratch / "input")
        growth = (_kilobytes("VmHWM") - before) * 1024
        out.send((files.kind, taken, fault, time.process_time() - started, growth))


def _kilobytes(name: str) -> int:
    """Returns a figure of this process alone; `ru_maxrss` can be that of the one it came from."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def attempt(files: Trial, rng: random.Random, converting: float, folder: Path) -> tuple[bool, str]:
    """Tries an input. Returns whether `plan` took it, and what is wrong with the answers."""
    path = files.write(folder)
    options = rng.choice([*CHOICES, (rng.choice(DONORS), str(path))])
    _, fault, _ = run("inspect", str(path), *rng.choice(SHOWN))
    taken, more, _ = run("plan", str(path), *options, *rng.choice([(), ("--json",)]))
    faults = [fault, more]
    if sum(size for _, size in files.files.values()) < SMALL and rng.random() < converting:
        out = str(folder / "out")
        done, fault, _ = run("convert", str(path), out, *options)
        faults += [fault, "`convert` took what `plan` refused"[: 99 * (done and not taken)]]
        if done:
            right, fault, said = run("verify", str(path), out, "--json", *options)
            checks = [] if right or fault else json.JSONDecoder().raw_decode(said)[0]["checks"]
            wrong = [c for c in checks if not c["passed"] and c["check"] in CERTAIN]
            faults += [fault, f"{wrong}\nthe folder does not verify"[: 10_000 * len(wrong)]]
    shutil.rmtree(folder)
    return taken, next(filter(None, faults), "")


def run(*arguments: str) -> tuple[bool, str, str]:
    """Runs a command. Returns whether it took the file, what is wrong, and what it said."""
    code: object = 0
    fault = ""
    for stream in STREAMS:
        stream.seek(0)
        stream.truncate()
    os.environ["CKPTCONV_DEBUG"] = "1"  # or what nobody foresaw would be a line and an exit code
    with contextlib.redirect_stdout(STREAMS[0]), contextlib.redirect_stderr(STREAMS[1]):
        try:
            command_line(arguments)
        except SystemExit as error:
            code = error.code
        except Exception:  # noqa: BLE001  (what must not come)
            fault = traceback.format_exc()
    for stream in STREAMS:
        stream.flush()
    said = "".join(stream.buffer.getvalue().decode(errors="replace") for stream in STREAMS)
    if not fault and code not in (0, 1, 3) and "error: " not in said:
        fault = f"{said}\n`{arguments[0]}` exits with {code}"
    if not fault and (not said.strip() or re.search(r"^error:\s*$", said, re.MULTILINE)):
        fault = f"`{arguments[0]}` says nothing"
    return not (code or fault), fault, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("findings"), metavar="DIR")
    options = parser.parse_args()
    tally = fuzz(options.minutes, options.seed, options.keep)
    sys.stdout.write(f"{tally}\n")
    sys.stdout.writelines(f"  {n:,} x {what}\n" for what, n in tally.findings.most_common())
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
