"""Scrambles converted folders, and counts commands that end in anything but an answer.

    python -m tests.scramble --rounds 30

makes 30 folders of each architecture that are damaged in ways no program writes. Each goes to
`load_pipeline`, `verify`, `export` and `convert --vae`; what loads runs for one step. It prints
how each command ended, and exits with 1 if one ended with anything but a result or an error of
ckptconv, took a minute, or ran a program of the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ckptconv
from ckptconv import load_pipeline
from ckptconv.errors import CkptconvError
from ckptconv.inference.generation import Settings, call_arguments, generate
from tests.mutations import linked, prepare, replace

SLOW = 60.0
"""Seconds of a core that no command takes on a tiny model."""
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        1,
        3,
        10**9,
        10**30,
        0.5,
        1e9,
        float("nan"),
        "",
        "x",
        "../../x",
        "\x1b[2J",
    ),
    *([], {}, [[]], [None], [0], [-1, 10**9], ["x"] * 300, {"x": {"y": []}}, "a" * 10_000),
    *("evil.py", ["evil", "Evil"], "someone/kernel", {"model_type": "evil"}),
)
CODE: dict[str, Any] = {
    "attn_implementation": "someone/kernel",
    "_attn_implementation": "someone/kernel",
    "auto_map": {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]},
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "custom_pipeline": "evil",
    "trust_remote_code": True,
    "use_kernels": True,
}


def value(folder: Path, rng: random.Random) -> str:
    """Sets one entry of a JSON file, at any depth, to something else."""
    path = rng.choice([p for p in sorted(folder.rglob("*.json")) if p.name != "vocab.json"])
    data = json.loads(path.read_text())
    at: Any = data
    while isinstance(at, dict | list) and at:
        key = rng.choice(sorted(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.4:
            break
        at = at[key]
    at[key] = rng.choice(VALUES)
    replace(path, json.dumps(data))
    return f"{path.relative_to(folder)}: {key} = {str(at[key])[:40]}"


def whole(folder: Path, rng: random.Random) -> str:
    """Replaces a whole file by junk, by nothing, by a pipe or by a device."""
    path = rng.choice([p for p in sorted(folder.rglob("*")) if p.is_file()])
    path.unlink()
    junk = (b"", b"{}", b"[]", b"\0" * 100, b"[" * 100_000, b'{"x": "\\ud800"}', b"\xff\xfe")
    kind = rng.choice(["junk"] * 6 + ["gone", "pipe", "device", "folder", "loop", "huge"])
    if kind == "junk":
        path.write_bytes(content := rng.choice(junk))
        kind = str(content[:10])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    return f"{path.relative_to(folder)} is {kind}"


def code(folder: Path, rng: random.Random) -> str:
    """Asks for code, in a configuration or in the index, and puts it where libraries look."""
    configs = [*sorted(folder.glob("*/*config.json")), folder / "model_index.json"]
    path, key = rng.choice(configs), rng.choice(sorted(CODE))
    data = json.loads(path.read_text())
    parts = [name for name, entry in data.items() if isinstance(entry, list)]
    if path.name == "model_index.json" and parts:
        key = rng.choice([*parts, "_class_name", key])
        data[key] = ["evil", "Evil"]
    else:
        data[key] = CODE[key]
    replace(path, json.dumps(data))
    text = f"from pathlib import Path\nPath({str(folder / 'RAN')!r}).touch()\nclass Evil: pass\n"
    for place in (folder, path.parent):
        (place / "evil.py").write_text(text)
    return f"{path.relative_to(folder)}: {key}"


def swapped(folder: Path, rng: random.Random) -> str:
    """Puts one component in the place of another."""
    parts = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "ckptconv")
    first, second = rng.sample(parts, 2)
    shutil.rmtree(first)
    shutil.copytree(second, first)
    return f"{first.name} is {second.name}"


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (value, value, whole, code, swapped)


def run(folder: Path) -> Any:
    """Loads a folder and makes one step."""
    pipe = load_pipeline(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    if type(pipe).__name__ in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        settings = Settings("a cat", steps=1, size=(64, 64))
        generate(pipe, call_arguments(pipe, settings, {}), 0)


def commands(source: Path, folder: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Returns what each damaged folder is given to, by name."""
    choices: dict[str, Any] = {"vae": folder, "overwrite": True}
    return {
        "load": lambda: run(folder),
        "verify": lambda: json.dumps(ckptconv.verify(None, folder).as_data(), ensure_ascii=False),
        "export": lambda: ckptconv.export(folder, out / "x.safetensors", overwrite=True),
        "donor": lambda: ckptconv.convert(source, out / "x", **choices),
    }


def outcome(command: Callable[[], Any]) -> str:
    """Returns how a command ended: `done`, `refused`, or what is wrong."""
    started = time.process_time()
    try:
        command()
        ended = "done"
    except CkptconvError as error:
        str(error).encode("utf-8", "surrogateescape")
        ended = "refused"
    except BaseException as error:  # what this looks for
        if isinstance(error, KeyboardInterrupt):
            raise
        ended = "".join(traceback.format_exception(error)[-3:])
    return ended if time.process_time() - started < SLOW else f"took too long, then {ended}"


def attack(
    rounds: int, seed: int, names: list[str] | None = None
) -> tuple[Counter[str], list[str]]:
    """Returns how many commands ended how, and the faults."""
    counts, faults = Counter[str](), []
    with tempfile.TemporaryDirectory() as scratch:
        place, out = Path(scratch), Path(scratch) / "out"
        out.mkdir()
        bases = {k: v for k, v in prepare(place, ["plain"]).items() if not names or k[0] in names}
        for turn in range(rounds):
            for (name, _), (source, base) in bases.items():
                rng = random.Random(f"{seed} {turn} {name}")  # noqa: S311
                folder = linked(base, place / "damaged")
                what = DAMAGES[turn % len(DAMAGES)](folder, rng)
                for command, call in commands(source, folder, out).items():
                    ended = outcome(call)
                    if (folder / "RAN").exists():
                        ended = "ran a program of the folder"
                    counts[f"{command} {ended if ended in ('done', 'refused') else 'FAULT'}"] += 1
                    if ended not in ("done", "refused"):
                        faults.append(f"{name}: {what}: {command}: {ended}")
                shutil.rmtree(folder)
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="architectures")
    options = parser.parse_args()
    counts, faults = attack(options.rounds, options.seed, options.only)
    for ending, count in sorted(counts.items()):
        print(f"{ending:16} {count:5}")  # noqa: T201
    print(*faults, f"{len(faults)} faults", sep="\n")  # noqa: T201
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
