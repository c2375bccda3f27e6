"""Attacks every command, and asks whether anything was lost, let in, left behind or not said.

    python -m tests.hostile [--only WORD] [--short]

Each attack prepares a folder of a user's files, runs a command in a process of its own, and may do
something while that writes. Whatever the attack, what the user had must still be there, byte for
byte; no code of the files may run; nothing may reach for the network, hang, fill the memory, end
with a traceback or leave hidden files. It prints a figure for each kind of attack, and exits with 1
if there was a finding. The attacks themselves are in `tests/support/hostility.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing as mp
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path

import ckptconv
from ckptconv.__main__ import run as command_line
from ckptconv.files import ByteCounter
from ckptconv.maps.architecture import bundled
from ckptconv.sample import layout_of, write_sample
from tests.support.hostility import ATTACKS, CANARY, Attack, Scene

SECONDS = 60
"""Of the clock, after which a command hangs."""
ROOM = 3 << 30
"""Address space in bytes beyond what the process has at first; to ask for more fails."""
WRITTEN = ("stdout", "stderr")
"""Files beside the user's folder, for what a command writes."""
CODES = {
    "taken": {0},
    "refused": {1, 2, 3},
    "either": {0, 1, 2, 3},
    "stopped": {129, 130, 131, 143},
}
"""The exit codes that an attack may end with, by what is expected of it."""


def run(attack: Attack, arguments: list[str], scene: Scene, *, quietly: bool) -> tuple[int, str]:
    """Runs a command in another process; returns its exit code and what it wrote.

    Args:
        attack: what is done while it writes, unless `quietly`.
        arguments: of `ckptconv`.
        scene: the current folder of the process.
        quietly: leave it alone.
    """
    ours, theirs = mp.Pipe(duplex=False)
    for name in WRITTEN:
        (scene.root.parent / name).write_text("")
    process = mp.get_context("fork").Process(
        target=_run, args=(attack, arguments, scene, quietly, theirs)
    )
    process.start()
    theirs.close()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return 124, ""
    aside = scene.root.parent
    said = "".join((aside / name).read_text(errors="replace") for name in WRITTEN)
    try:
        code, scene.made_meanwhile = ours.recv()
        return code, said
    except EOFError:  # it died by a signal
        return process.exitcode, said


def _run(
    attack: Attack, arguments: list[str], scene: Scene, quietly: bool, answer: Connection
) -> None:
    os.chdir(scene.root)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have set to ignore
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    sys.addaudithook(_no_network)
    if attack.during and not quietly:
        _do_while_writing(lambda: attack.during and attack.during(scene))
    aside = scene.root.parent
    out_path, err_path = (aside / name for name in WRITTEN)
    out = (attack.stdout or out_path).open("w")
    with err_path.open("w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        with redirect_stdout(out), redirect_stderr(err):
            try:
                command_line(arguments)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:  # noqa: BLE001  (that is the finding)
                traceback.print_exc()
                code = 99
    with contextlib.suppress(OSError):
        out.close()
    answer.send((code, scene.made_meanwhile))


def _no_network(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        CANARY.write_text(f"reached for the network: {arguments}")


def _do_while_writing(act: Callable[[], object]) -> None:
    """Acts once, when the first bytes are counted."""
    add = ByteCounter.add
    acted: list[bool] = []

    def adding(self: ByteCounter, nbytes: int) -> None:
        add(self, nbytes)
        if not acted:
            acted.append(True)
            act()

    ByteCounter.add = adding  # type: ignore[method-assign]


def contents(root: Path) -> dict[str, str]:
    """Returns what is below a folder: the hash of each file, the target of each link."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "a folder" if path.is_dir() else "special"
    return found


def faults(attack: Attack, scene: Scene) -> Iterator[str]:
    """Runs an attack, and yields what is wrong."""
    attack.prepare(scene)
    before = contents(scene.root)
    arguments = [part.format(**scene.names()) for part in attack.command.split(" ")]
    code, said = run(attack, arguments, scene, quietly=False)
    if attack.killed:
        code, said = run(attack, arguments, scene, quietly=True)
    if code == 124:
        yield "it hangs"
    elif code not in CODES[attack.expect]:
        yield f"exit code {code}, expected {attack.expect}: {said[-600:]}"
    elif "Traceback" in said:
        yield f"a traceback: {said[-600:]}"
    elif code and not said.strip():
        yield "it fails without a word"
    if CANARY.exists():
        yield f"let in: {CANARY.read_text()}"
        CANARY.unlink()
    after = contents(scene.root)
    made = {**before, **{name: after.get(name, "") for name in scene.made_meanwhile}}
    for name, content in made.items():
        if not name.startswith(attack.replaces or ("\0",)) and after.get(name) != content:
            yield f"{name}: the user's, and it is {'changed' if name in after else 'gone'}"
    for name in after.keys() - made.keys():
        if Path(name).name.startswith("."):
            yield f"{name}: left behind"


def attempt(attacks: dict[str, list[Attack]], scratch: Path) -> Iterator[tuple[str, str, str]]:
    """Yields the kind, the name and the fault (or nothing) of each attack, one line a fault."""
    good = scratch / "good"
    good.mkdir()
    architecture = bundled().architectures["sd1"]
    write_sample(architecture, good / "model.safetensors", layout_of(architecture, dtype="fp16"))
    ckptconv.convert(good / "model.safetensors", good / "model")
    for kind, several in attacks.items():
        for attack in several:
            root = scratch / "here" / "user"
            shutil.copytree(good, root, symlinks=True)
            yield kind, attack.name, "\n".join(faults(attack, Scene(root)))
            shutil.rmtree(scratch / "here", ignore_errors=True)


def _stock() -> None:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="attacks whose kind or name contains this")
    parser.add_argument("--short", action="store_true", help="leave out those that load models")
    options = parser.parse_args()
    chosen = {
        kind: [
            attack
            for attack in several
            if options.only in f"{kind}: {attack.name}" and not (options.short and attack.loads)
        ]
        for kind, several in ATTACKS.items()
    }
    _stock()  # imports what the processes then share
    tried: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as scratch:
        for kind, name, fault in attempt(chosen, Path(scratch)):
            tried[kind] += 1
            if fault:
                failed[kind] += 1
                sys.stderr.write(f"{kind}: {name}: {fault}\n")
                sys.stderr.flush()
    for kind, count in tried.items():
        sys.stdout.write(f"{kind}: {count} attacks, {failed[kind]} findings\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
