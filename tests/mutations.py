"""Damages converted folders, one damage at a time, and asks whether `verify` finds and names it.

    python -m tests.mutations --rounds 5

makes 5 random damages of each kind to a folder of each architecture in each layout, prints what
was missed, and exits with 1 if anything was. The same seed makes the same damages. The suite runs
one round of it. Nothing here reads or writes weights with ckptconv.
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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ckptconv
from ckptconv.maps.architecture import bundled
from ckptconv.sample import layout_of, write_sample

Entry = dict[str, Any]
Header = dict[str, Entry]

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded": {"variant": "fp16", "max_shard_size": 20_000_000, "dtype": "fp16"},
}
KINDS = {"F16": "<f2", "F32": "<f4"}


@dataclass(frozen=True)
class Damage:
    """What was done, the names of which each must be in a problem, and how to undo it."""

    what: str
    names: tuple[str, ...]


def read(path: Path) -> tuple[Header, bytes]:
    """Reads a safetensors file; the offsets count from the end of the header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, data[8 + length :]


def write(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Writes one, wide dtypes first, in place of what a link shares with the undamaged folder."""
    header, end = {}, 0
    ordered = sorted(tensors.items(), key=lambda item: item[1][0] != "F32")
    for key, (dtype, shape, data) in ordered:
        offsets = [end, end + len(data)]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.unlink()
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.writelines(data for _, (_, _, data) in ordered)


class Weights:
    """One weight file, to alter."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        files = sorted(folder.glob("*/*.safetensors"))
        self.path = rng.choice([p for p in files if p.parent.name != "ckptconv"])
        header, data = read(self.path)
        self.tensors = {
            key: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
            for key, e in header.items()
        }
        self.rng = rng

    def pick(self, fits: Callable[[str, list[int]], bool] = lambda _dtype, _shape: True) -> str:
        keys = [key for key, (dtype, shape, _) in self.tensors.items() if fits(dtype, shape)]
        return self.rng.choice(keys)

    def save(self) -> None:
        write(self.path, self.tensors)
        index = next(self.path.parent.glob("*.index*.json"), None)
        if index:  # the index must agree, or it would be what gives the damage away
            values = json.loads(index.read_text())
            table = {k: f for k, f in values["weight_map"].items() if f != self.path.name}
            values["weight_map"] = table | dict.fromkeys(self.tensors, self.path.name)
            replace(index, json.dumps(values))


def replace(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def swap(folder: Path, rng: random.Random) -> Damage:
    """Swaps the values of two tensors of one shape."""
    weights = Weights(folder, rng)
    shapes = Counter(str(value[:2]) for value in weights.tensors.values())
    first = weights.pick(lambda dtype, shape: shapes[str((dtype, shape))] > 1)
    dtype, shape, data = weights.tensors[first]
    others = [
        key
        for key, value in weights.tensors.items()
        if key != first and value[:2] == (dtype, shape) and value[2] != data
    ]
    second = rng.choice(others)
    weights.tensors[first], weights.tensors[second] = (
        weights.tensors[second],
        weights.tensors[first],
    )
    weights.save()
    return Damage(f"swapped {first} and {second}", (first, second))


def flip(folder: Path, rng: random.Random) -> Damage:
    """Flips one bit."""
    weights = Weights(folder, rng)
    key = weights.pick()
    dtype, shape, data = weights.tensors[key]
    damaged = bytearray(data)
    bit = rng.randrange(len(data) * 8)
    damaged[bit // 8] ^= 1 << bit % 8
    weights.tensors[key] = (dtype, shape, bytes(damaged))
    weights.save()
    return Damage(f"flipped bit {bit} of {key}", (key,))


def drop(folder: Path, rng: random.Random) -> Damage:
    """Leaves a tensor out."""
    weights = Weights(folder, rng)
    key = weights.pick()
    del weights.tensors[key]
    weights.save()
    return Damage(f"dropped {key}", (key,))


def add(folder: Path, rng: random.Random) -> Damage:
    """Adds a copy of a tensor under another name."""
    weights = Weights(folder, rng)
    key = weights.pick()
    new = f"{key.rpartition('.')[0]}.extra_{rng.randrange(1000)}"
    weights.tensors[new] = weights.tensors[key]
    weights.save()
    return Damage(f"added {new}", (new,))


def rename(folder: Path, rng: random.Random) -> Damage:
    """Gives a tensor another name."""
    weights = Weights(folder, rng)
    key = weights.pick()
    at = rng.randrange(len(key))
    new = key[:at] + ("x" if key[at] != "x" else "y") + key[at + 1 :]
    weights.tensors[new] = weights.tensors.pop(key)
    weights.save()
    return Damage(f"renamed {key} to {new}", (key, new))


def retype(folder: Path, rng: random.Random) -> Damage:
    """Stores a tensor in another dtype, its values the same or rounded."""
    weights = Weights(folder, rng)
    key = weights.pick(lambda dtype, _: dtype in KINDS)
    dtype, shape, data = weights.tensors[key]
    other = "F32" if dtype == "F16" else "F16"
    cast = np.frombuffer(data, KINDS[dtype]).astype(KINDS[other]).tobytes()
    weights.tensors[key] = (other, shape, cast)
    weights.save()
    return Damage(f"turned {key} from {dtype} into {other}", (key,))


def transpose(folder: Path, rng: random.Random) -> Damage:
    """Transposes a square matrix."""
    while True:
        weights = Weights(folder, rng)
        square = {k for k, (_, s, _) in weights.tensors.items() if len(s) == 2 and s[0] == s[1]}
        if square:
            break
    key = rng.choice(sorted(square))
    dtype, shape, data = weights.tensors[key]
    matrix = np.frombuffer(data, KINDS[dtype]).reshape(shape)
    weights.tensors[key] = (dtype, shape, matrix.T.tobytes())
    weights.save()
    return Damage(f"transposed {key}", (key,))


def truncate(folder: Path, rng: random.Random) -> Damage:
    """Cuts the end of a weight file off."""
    path = Weights(folder, rng).path
    data = path.read_bytes()
    cut = rng.randrange(1, len(data))
    path.unlink()
    path.write_bytes(data[:-cut])
    return Damage(f"cut {cut:,} bytes off {path.name}", (path.name,))


def configure(folder: Path, rng: random.Random) -> Damage:
    """Changes one value of one configuration, or of the index."""
    files = [p for p in sorted(folder.glob("*/*config.json")) if p.parent.name != "ckptconv"]
    path = rng.choice([*files, folder / "model_index.json"])
    values = json.loads(path.read_text())
    silent = {"_diffusers_version", "transformers_version", "clean_up_tokenization_spaces"}
    key = rng.choice(sorted(values.keys() - silent))
    before = values[key]
    values[key] = altered(before, rng)
    replace(path, json.dumps(values))
    where = path.relative_to(folder)
    return Damage(f"{where}: {key} from {before!r} to {values[key]!r}", (key,))


def altered(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value * 2 or 1, -value - 1])
    if isinstance(value, float):
        return value * rng.choice([0.5, 1.5]) or 0.25
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], altered(value[at], rng), *value[at + 1 :]]
    if value is None:
        return rng.choice([1, "other"])
    return rng.choice([value + "x", value[:-1], "epsilon" if value != "epsilon" else "sample"])


def tokens(folder: Path, rng: random.Random) -> Damage:
    """Swaps two tokens, or two merges, of a tokenizer."""
    path = rng.choice(sorted([*folder.glob("*/vocab.json"), *folder.glob("*/merges.txt")]))
    if path.suffix == ".json":
        table = json.loads(path.read_text())
        first, second = rng.sample(sorted(table), 2)
        table[first], table[second] = table[second], table[first]
        replace(path, json.dumps(table))
    else:
        lines = path.read_text().splitlines()
        at = rng.randrange(1, len(lines) - 1)
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
        replace(path, "\n".join(lines) + "\n")
    return Damage(f"swapped entries of {path.relative_to(folder)}", (path.name,))


def aside(folder: Path, rng: random.Random) -> Damage:
    """Flips one bit of what the conversion kept aside."""
    path = folder / "ckptconv" / "dropped.safetensors"
    header, _ = read(path)
    key = rng.choice([k for k, e in header.items() if e["data_offsets"][0] != e["data_offsets"][1]])
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    low, high = header[key]["data_offsets"]
    bit = rng.randrange(low * 8, high * 8)
    data[start + bit // 8] ^= 1 << bit % 8
    path.unlink()
    path.write_bytes(data)
    return Damage(f"flipped a bit of {key} in {path.name}", (key,))


DAMAGES = (
    swap,
    flip,
    drop,
    add,
    rename,
    retype,
    transpose,
    truncate,
    configure,
    tokens,
    aside,
)


def linked(folder: Path, copy: Path) -> Path:
    """Copies a folder as links: a damage replaces the file that it alters."""
    shutil.copytree(folder, copy, copy_function=os.link)
    return copy


def outcome(source: Path, folder: Path, damage: Damage) -> str:
    """Returns why a damage counts as missed; empty if every name is in a problem."""
    found = ckptconv.verify(source, folder)
    if found.passed:
        return "not found"
    lost = [name for name in damage.names if not any(name in p for p in found.problems)]
    return f"found, but {', '.join(lost)} is not named: {found.problems[:3]}" if lost else ""


def trials(
    bases: dict[tuple[str, str], tuple[Path, Path]], place: Path, rounds: int, seed: int
) -> Iterator[tuple[str, str, str, Damage, str]]:
    """Yields architecture, layout, kind, damage and why it was missed (empty if it was not)."""
    for turn in range(rounds):
        for (name, layout), (source, base) in bases.items():
            for kind in DAMAGES:
                rng = random.Random(f"{seed} {turn} {name} {layout} {kind.__name__}")  # noqa: S311
                folder = linked(base, place / "damaged")
                damage = kind(folder, rng)
                yield name, layout, kind.__name__, damage, outcome(source, folder, damage)
                shutil.rmtree(folder)


def prepare(place: Path, layouts: list[str]) -> dict[tuple[str, str], tuple[Path, Path]]:
    """Writes a small checkpoint of each architecture and converts it in each layout."""
    bases = {}
    for name, architecture in bundled().architectures.items():
        if architecture.single:
            continue
        source = place / f"{name}.safetensors"
        write_sample(architecture, source, layout_of(architecture))
        for layout in layouts:
            folder = place / f"{name}-{layout}"
            ckptconv.convert(source, folder, **LAYOUTS[layout])
            bases[name, layout] = (source, folder)
    return bases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        bases = prepare(place, list(LAYOUTS))
        alarms = [key for key, pair in bases.items() if not ckptconv.verify(*pair).passed]
        results = list(trials(bases, place, options.rounds, options.seed))
        alarms += [key for key, pair in bases.items() if not ckptconv.verify(*pair).passed]
    made = Counter(kind for _, _, kind, _, _ in results)
    caught = Counter(kind for _, _, kind, _, why in results if not why)
    for kind, count in made.items():
        print(f"{kind:10} {caught[kind]:4} of {count:4} found and named")  # noqa: T201
    for name, layout, _, damage, why in results:
        if why:
            print(f"MISSED {name} {layout}: {damage.what}: {why}")  # noqa: T201
    print(  # noqa: T201
        f"{sum(caught.values())} of {len(results)} damages found and named, "
        f"{len(alarms)} false alarms on {2 * len(bases)} undamaged folders, "
        f"{time.monotonic() - started:.0f} s"
    )
    return int(bool(alarms) or sum(caught.values()) < len(results))


if __name__ == "__main__":
    sys.exit(main())
