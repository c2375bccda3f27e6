"""Kills conversions (SIGKILL), and checks that they leave nothing that loads without being whole.

    python -m tests.kill --kills 50

Half of the kills come from outside, at random moments; the other half from within, before a random
one of the calls that open, make, rename or remove a file, which the clock would hardly ever hit.
After every kill, each folder that was left is offered to diffusers and transformers, and the same
conversion is run again beside the wreckage.
"""

from __future__ import annotations

import filecmp
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from safetensors import SafetensorError, safe_open

import ckptconv
from ckptconv.maps.architecture import bundled
from ckptconv.sample import layout_of, write_sample


@dataclass
class Tally:
    """What was found.

    Attributes:
        left: kills by what they left: `nothing`, `a part`, `the whole folder`.
        weights: files of weights that were left, by whether a reader takes them.
        models: folders with a configuration that were left, by whether they load.
        faults: what loads without being whole, or does not convert afterwards.
    """

    left: Counter[str] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Killer:
    """Kills conversions of one checkpoint in one folder."""

    def __init__(self, source: Path, work: Path) -> None:
        """Converts undisturbed, to know the result, the time and the number of calls."""
        self.source, self.work = source, work
        self.reference = work / "reference"
        ckptconv.convert(source, self.reference)  # imports what it needs, too
        started = time.monotonic()
        ckptconv.convert(source, self.reference, overwrite=True)
        self.seconds = time.monotonic() - started
        self.place = work / "place"
        self.tally = Tally()
        self.place.mkdir()
        self.calls = self._count()
        self._clear()

    def by_clock(self, seconds: float) -> None:
        """Kills a conversion after a time, and judges what is left."""
        pid = self._start()
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._judge()

    def by_call(self, number: int) -> None:
        """Kills a conversion before its n-th call, and judges what is left."""
        _, status = os.waitpid(self._start(call=number), 0)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the conversion failed by itself: {code}")
        self._judge()

    def _count(self) -> int:
        """Returns the number of calls that a conversion makes."""
        read, write = os.pipe()
        os.waitpid(self._start(call=0, tell=write), 0)
        os.close(write)
        with os.fdopen(read) as said:
            return int(said.read())

    def _start(self, *, call: int | None = None, tell: int | None = None) -> int:
        """Converts in another process, which is to kill itself, or to tell how it went."""
        if pid := os.fork():
            return pid
        try:  # the child, which never comes back
            count = itertools.count(1) if call is None else _kill_before(call)
            ckptconv.convert(self.source, self.place / "out", overwrite=True)
            if tell is not None:
                os.write(tell, str(next(count) - 1).encode())
            os._exit(0)
        finally:
            os._exit(3)

    def _judge(self) -> None:
        left = sorted(self.place.iterdir())
        whole = self.place / "out" in left
        self.tally.left["the whole folder" if whole else "a part" if left else "nothing"] += 1
        for top in left:
            self.tally.faults += self._faults(top)
        ckptconv.convert(self.source, self.place / "out", overwrite=True)
        if not _same(self.place / "out", self.reference):
            self.tally.faults.append("the next conversion gave something else")
        self._clear()

    def _faults(self, top: Path) -> Iterator[str]:
        """Yields what loads and is not whole, in one folder that was left."""
        from diffusers import DiffusionPipeline

        for weights in top.rglob("*.safetensors"):
            name = weights.relative_to(top)
            taken = _opens(weights)
            self.tally.weights["taken" if taken else "refused"] += 1
            if taken and not filecmp.cmp(weights, self.reference / name, shallow=False):
                yield f"{top.name}/{name} is taken, and is not whole"
        for folder in (path for path in top.iterdir() if path.name in _classes()):
            loads = _loads(_classes()[folder.name], folder)
            self.tally.models["loads" if loads else "refused"] += 1
            if loads and not _same(folder, self.reference / folder.name):
                yield f"{top.name}/{folder.name} loads, and is not whole"
        loads = _loads(DiffusionPipeline, top)
        self.tally.models["pipeline loads" if loads else "pipeline refused"] += 1
        if loads and not _same(top, self.reference):
            yield f"{top.name} loads, and is not whole"

    def _clear(self) -> None:
        shutil.rmtree(self.place)
        self.place.mkdir()


def _kill_before(call: int) -> Iterator[int]:
    """Lets this process kill itself before its n-th call that touches a name on the disk.

    Returns the counter of these calls.
    """
    count = itertools.count(1)

    def hook(event: str, _: Any) -> None:
        if event.startswith(("open", "os.", "shutil.")) and next(count) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


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


def _same(folder: Path, reference: Path) -> bool:
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    wanted = {str(p.relative_to(reference)) for p in reference.rglob("*") if p.is_file()}
    return names == wanted and not any(
        filecmp.cmpfiles(folder, reference, names, shallow=False)[1:]
    )


def kill_often(killer: Killer, kills: int, seed: int) -> Tally:
    """Kills half of the conversions by the clock and half by the number of a call."""
    chance = random.Random(seed)  # noqa: S311  (no secret)
    for n in range(kills):
        if n % 2:
            killer.by_call(chance.randint(1, killer.calls))
        else:
            killer.by_clock(chance.uniform(0, 1.2 * killer.seconds))
    return killer.tally


@click.command()
@click.option("--kills", default=50, show_default=True)
@click.option("--arch", default="sd1", show_default=True)
@click.option("--full", is_flag=True, help="A checkpoint of the published size.")
@click.option("--seed", default=0, show_default=True)
def main(kills: int, arch: str, full: bool, seed: int) -> None:
    """Kill conversions; exit with 1 if one of them left what loads and is not whole."""
    architecture = bundled().architectures[arch]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        size = write_sample(architecture, source, layout_of(architecture, full=full, dtype="fp16"))
        killer = Killer(source, Path(folder))
        click.echo(f"{size / 1e6:,.0f} MB in {killer.seconds:.2f} s and {killer.calls} calls")
        tally = kill_often(killer, kills, seed)
    click.echo(f"{kills} kills left {dict(tally.left)}")
    click.echo(f"weights: {dict(tally.weights)}; models: {dict(tally.models)}")
    for fault in tally.faults:
        click.echo(f"fault: {fault}")
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
