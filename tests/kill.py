"""Kills conversions and exports (SIGKILL), and looks for losses and for litter.

    python -m tests.kill --kills 200

A quarter of the kills come from outside, at random moments; a quarter from within, before a random
one of the calls that open, make, rename or remove a file, which the clock would hardly ever hit;
and half of them right before or after a rename, in half of which a user puts a file at the
destination at the last moment. Half of the runs are on a system that cannot exchange two names.

After every kill, each folder that was left is offered to diffusers and transformers, the files of
the user are looked for, and the same command runs again beside the wreckage: it must give what an
undisturbed run gives, or refuse to replace the user's file, and leave nothing else behind.
"""

from __future__ import annotations

import filecmp
import itertools
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from safetensors import SafetensorError, safe_open

import ckptconv
from ckptconv import destination, in_place
from ckptconv.errors import OutputError
from ckptconv.libraries import hide_progress_bars
from ckptconv.maps.architecture import bundled
from ckptconv.sample import layout_of, write_sample
from tests.mutations import linked

JOBS = ("convert", "convert --overwrite", "export", "export --overwrite")
MINE = b"a file of the user"
DONE, REFUSED, FAILED = 0, 1, 3


@dataclass(frozen=True)
class Kill:
    """One run that is killed.

    Attributes:
        job: one of `JOBS`.
        seconds: after how long it is killed, if the clock decides.
        at: whether `call` and `user` count calls or renames.
        call: before which call, or before or after which rename, it is killed.
        user: when the user puts a file at the destination.
        exchanges: whether the system can exchange two names.
    """

    job: str
    seconds: float | None = None
    at: str = "calls"
    call: int | None = None
    user: int | None = None
    exchanges: bool = True


@dataclass
class Tally:
    """What was found.

    Attributes:
        left: by job, what was at the destination after the kills.
        weights: files of weights that were left, by whether a reader takes them.
        models: folders with a configuration that were left, by whether they load.
        after: what came of the next runs.
        losses: files of the user, and old folders, that are gone; and what loads and is not whole.
        litter: what is left after the next run, or was removed without a word.
    """

    left: Counter[str] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)


class Killer:
    """Kills runs on one checkpoint in one folder."""

    def __init__(self, source: Path, work: Path) -> None:
        """Runs undisturbed, to know the results and the time."""
        self.source, self.place, self.tally = source, work / "place", Tally()
        self.folder, self.file = work / "folder", work / "file"
        self.old = {"convert": work / "old", "export": work / "old file"}
        self.said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("ckptconv").addHandler(handler)
        ckptconv.convert(source, self.folder)  # imports what it needs, too
        started = time.monotonic()
        ckptconv.convert(source, self.folder, overwrite=True)
        self.seconds = time.monotonic() - started
        ckptconv.export(self.folder, self.file)
        ckptconv.convert(source, self.old["convert"], only=["vae"], variant="old")
        self.old["export"].write_bytes(b"an old file")

    def count(self, kill: Kill) -> int:
        """Returns the number of calls or of renames that an undisturbed run makes."""
        self._prepare(kill.job)
        read, write = os.pipe()
        os.waitpid(self._start(kill, tell=write), 0)
        os.close(write)
        with os.fdopen(read) as said:
            return int(said.read())

    def kill(self, kill: Kill) -> None:
        """Kills a run, judges what is left, and runs the same command again."""
        self._prepare(kill.job)
        pid = self._start(kill)
        if kill.seconds is not None:
            time.sleep(kill.seconds)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code not in (DONE, REFUSED, -signal.SIGKILL):
            raise RuntimeError(f"{kill}: it failed by itself: {code}")
        there = self._found(kill.job)
        self.tally.left[f"{kill.job}: {there}"] += 1
        added = (self.place / "added").exists()
        lost = "--overwrite" in kill.job and there == "nothing" and kill.exchanges
        self._look(kill, lost or there == "a part", there, added)
        self._loads(kill)
        self._again(kill, there, added)

    def two_at_once(self, job: str) -> None:
        """Runs the same command twice at once: without --overwrite, one of them must be refused."""
        self._prepare(job)
        pids = [self._start(Kill(job)) for _ in range(2)]
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
        wanted = [DONE, DONE if "--overwrite" in job else REFUSED]
        self.tally.after[f"two at once: {codes.count(DONE)} done"] += 1
        if codes != wanted or self._found(job) != "the new":
            self.tally.losses.append(f"{job}, two at once: {codes}, {self._found(job)}")
        self.tally.litter += [f"{job}, two at once: {name}" for name in self._hidden()]

    def _prepare(self, job: str) -> None:
        """Puts the user's files in the place, and what is to be replaced."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        for name in ("out.txt", ".out.partial"):
            (self.place / name).write_bytes(MINE)
        if job == "convert --overwrite":
            linked(self.old["convert"], self.place / "out")
        elif job == "export --overwrite":
            shutil.copyfile(self.old["export"], self.place / "out")

    def _start(self, kill: Kill, *, tell: int | None = None) -> int:
        """Runs a command in another process, which is to kill itself, or to tell how it went."""
        if pid := os.fork():
            return pid
        code = FAILED
        try:  # the child, which never comes back
            if not kill.exchanges:
                in_place._call = lambda: None  # type: ignore[assignment]
            count = itertools.count(1)

            def act() -> None:
                number = next(count)
                if number == kill.user:
                    self._add()
                if number == kill.call:
                    os.kill(os.getpid(), signal.SIGKILL)

            if kill.call or kill.user or tell:
                (at_calls if kill.at == "calls" else at_renames)(act)
            self._run(kill.job, overwrite="--overwrite" in kill.job)
            if tell is not None:
                os.write(tell, str(next(count) - 1).encode())
            code = DONE
        except OutputError:
            code = REFUSED
        finally:
            os._exit(code)

    def _add(self) -> None:
        """Puts a file of the user at the destination, or into the folder that is there."""
        out = self.place / "out"
        if out.is_dir():
            (out / "mine.txt").write_bytes(MINE)
        elif not out.exists():
            out.write_bytes(MINE)
        else:
            return  # a file that --overwrite may replace
        (self.place / "added").touch()

    def _run(self, job: str, *, overwrite: bool) -> None:
        if job.startswith("convert"):
            ckptconv.convert(self.source, self.place / "out", overwrite=overwrite)
        else:
            ckptconv.export(self.folder, self.place / "out", overwrite=overwrite)

    def _found(self, job: str) -> str:
        """Tells what is at the destination."""
        out, kind = self.place / "out", job.split()[0]
        new = self.folder if kind == "convert" else self.file
        if not out.exists():
            return "nothing"
        for what, other in (("the new", new), ("the old", self.old[kind])):
            if _same(out, other):
                return what
        return "the user's" if out.is_file() and out.read_bytes() == MINE else "a part"

    def _hidden(self) -> list[Path]:
        return [path for path in self.place.iterdir() if path.is_dir() and path.name != "out"]

    def _look(self, kill: Kill, lost: bool, there: str, added: bool) -> None:
        """Looks for the files of the user."""
        if lost:
            self.tally.losses.append(f"{kill}: {there} is left")
        mine = [p for p in self.place.rglob("*") if p.is_file() and p.read_bytes() == MINE]
        if len(mine) != 2 + added:
            self.tally.losses.append(
                f"{kill}: of {2 + added} files of the user {len(mine)} are left"
            )

    def _again(self, kill: Kill, there: str, added: bool) -> None:
        """Runs the command that was killed once more."""
        before = [path for path in self._hidden() if (path / "lock").exists()]
        before = [path for path in before if (path / "lock").read_bytes()]
        self.said.clear()
        try:
            self._run(kill.job, overwrite="--overwrite" in kill.job or there == "the new")
            ended = "done"
        except OutputError:
            ended = "refused"
        there, kept = self._found(kill.job), 0
        for path in self._hidden():
            if any(mine.read_bytes() == MINE for mine in path.rglob("mine.txt")):
                kept += 1  # the user's own, in the folder that was there
            else:
                self.tally.litter.append(f"{kill}: {path.name} is left after the next run")
        said = "\n".join(self.said)
        self.tally.litter += [f"{kill}: {p.name}: not a word" for p in before if p.name not in said]
        self.tally.after[f"{ended}{' (the user added a file)' if added else ''}"] += 1
        wrong = there != "the new" if ended == "done" else not added
        self._look(kill, wrong, f"{ended}: {there}", added)
        self.tally.after["kept in a hidden folder, which was said"] += kept

    def _loads(self, kill: Kill) -> None:
        """Notes what loads and is not whole, in everything that was left."""
        tops = [self.place / "out", *(inner for path in self._hidden() for inner in path.iterdir())]
        for top in tops:
            if top.is_file() and top.name in ("new", "swap") and _opens(top):
                if not _same(top, self.file):
                    self.tally.losses.append(f"{kill}: {top} is taken, and is not whole")
            elif top.is_dir() and not any(
                _same(top, f) for f in (self.folder, self.old["convert"])
            ):
                self.tally.losses += [f"{kill}: {fault}" for fault in self._faults(top)]

    def _faults(self, top: Path) -> Iterator[str]:
        """Yields what loads and is not whole, in one folder that was left."""
        from diffusers import DiffusionPipeline

        for weights in top.rglob("*.safetensors"):
            name = weights.relative_to(top)
            taken = _opens(weights)
            self.tally.weights["taken" if taken else "refused"] += 1
            if taken and not filecmp.cmp(weights, self.folder / name, shallow=False):
                yield f"{top.name}/{name} is taken, and is not whole"
        for folder in (path for path in top.iterdir() if path.name in _classes()):
            loads = _loads(_classes()[folder.name], folder)
            self.tally.models["loads" if loads else "refused"] += 1
            if loads and not _same(folder, self.folder / folder.name):
                yield f"{top.name}/{folder.name} loads, and is not whole"
        loads = _loads(DiffusionPipeline, top)
        self.tally.models["pipeline loads" if loads else "pipeline refused"] += 1
        if loads and not _same(top, self.folder):
            yield f"{top.name} loads, and is not whole"


def at_calls(act: Callable[[], None]) -> None:
    """Lets this process act before every call that touches a name on the disk."""

    def hook(event: str, _: Any) -> None:
        if event.startswith(("open", "os.", "shutil.")):
            act()

    sys.addaudithook(hook)


def at_renames(act: Callable[[], None]) -> None:
    """Lets this process act before and after every rename."""

    def around(rename: Callable[..., Any]) -> Callable[..., Any]:
        def call(*names: Path) -> Any:
            act()
            result = rename(*names)
            act()
            return result

        return call

    for place, name in ((destination, "move"), (destination, "exchange"), (Path, "rename")):
        setattr(place, name, around(getattr(place, name)))


def _classes() -> dict[str, Any]:
    import diffusers
    import transformers

    return {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }


def _opens(weights: Path) -> bool:
    try:
        with safe_open(weights, "numpy"):
            return True
    except SafetensorError:
        return False


def _loads(model: Any, folder: Path) -> bool:
    try:
        model.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError):
        return False
    return True


def _same(path: Path, reference: Path) -> bool:
    """Whether two files or folders are equal, apart from what the user added."""
    if not (path.is_dir() and reference.is_dir()):
        both = path.is_file() and reference.is_file()
        return both and filecmp.cmp(path, reference, shallow=False)
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"mine.txt"}
    wanted = {str(p.relative_to(reference)) for p in reference.rglob("*") if p.is_file()}
    return names == wanted and not any(filecmp.cmpfiles(path, reference, names, shallow=False)[1:])


def plan_kills(killer: Killer, kills: int, seed: int) -> Iterator[Kill]:
    """Yields kills of every sort, each job's in turn."""
    chance = random.Random(seed)  # noqa: S311  (no secret)
    counts: dict[tuple[str, str, bool], int] = {}
    for n in range(kills):
        job, sort, exchanges = JOBS[n % 4], n // 4 % 4, bool(n // 16 % 2)
        if sort == 0:
            yield Kill(job, chance.uniform(0, 1.2 * killer.seconds), exchanges=exchanges)
            continue
        at = "calls" if sort == 1 else "renames"
        if (job, at, exchanges) not in counts:
            counts[job, at, exchanges] = killer.count(Kill(job, at=at, exchanges=exchanges))
        call = chance.randint(1, counts[job, at, exchanges])
        user = chance.randint(1, call) if sort == 3 else None
        yield Kill(job, None, at, call, user, exchanges)


@click.command()
@click.option("--kills", default=50, show_default=True)
@click.option("--pairs", default=20, show_default=True, help="Runs of two at once.")
@click.option("--arch", default="sd1", show_default=True)
@click.option("--full", is_flag=True, help="A checkpoint of the published size.")
@click.option("--seed", default=0, show_default=True)
def main(kills: int, pairs: int, arch: str, full: bool, seed: int) -> None:
    """Kill conversions and exports; exit with 1 if anything was lost or left behind."""
    architecture = bundled().architectures[arch]
    hide_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        size = write_sample(architecture, source, layout_of(architecture, full=full, dtype="fp16"))
        killer = Killer(source, Path(folder))
        click.echo(f"{size / 1e6:,.0f} MB in {killer.seconds:.2f} s")
        for kill in plan_kills(killer, kills, seed):
            killer.kill(kill)
        for n in range(pairs):
            killer.two_at_once(JOBS[n % 4])
        tally = killer.tally
    click.echo(
        f"{kills} kills and {pairs} runs of two at once: {len(tally.losses)} losses, "
        f"{len(tally.litter)} litter after the next run"
    )
    for what in ("left", "after", "weights", "models"):
        click.echo(f"{what}: {dict(sorted(getattr(tally, what).items()))}")
    for fault in (*tally.losses, *tally.litter):
        click.echo(f"fault: {fault}")
    sys.exit(bool(tally.losses or tally.litter))


if __name__ == "__main__":
    main()
