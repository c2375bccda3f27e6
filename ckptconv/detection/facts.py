"""What names and shapes cannot tell, such as the prediction type, and which witness decided.

The witnesses of a fact are listed in `arch.yaml`; the first that has an answer decides. Some files
tell more of their training in passing, by what they are called: `notes_of` finds it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FileRefused, MapError, option
from ..files import Files, open_regular
from ..maps.evidence import (
    Assumed,
    Default,
    Facts,
    InMetadata,
    LastValue,
    Marker,
    OfTask,
    PublishedSize,
    SpreadOfValues,
    Witness,
)
from ..maps.schema import word
from ..reading.tensor import Header

FEW = 4096
"""Elements that a witness may read at most: it looks, it does not load."""

LETTERS = {"F64": ("d", 0), "F32": ("f", 0), "BF16": ("f", 2), "F16": ("e", 0), "F8_E5M2": ("e", 1)}
"""How `struct` reads a float, and how many bytes it lacks at its lower end."""

IN_A_BYTE = {
    "F8_E4M3": (3, 7, b"\x7f\xff"),
    "F8_E4M3FNUZ": (3, 8, b"\x80"),
    "F8_E5M2FNUZ": (2, 16, b"\x80"),
}
"""The bits of a fraction, the bias of the exponent, and the bytes that are no number. The dtypes
below 8 bits and E8M0, which holds scales, are of no tensor that is looked at."""

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
"""A word of a name, such as each of those in `dreamshaperXL_v21TurboDPMSDE`."""


OPTION = re.compile(r"\{(?P<name>\w+)=(?P<value>[\w-]+)\}")
"""An option in the text of a hint."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A decided fact.

    Attributes:
        name: such as `prediction_type`.
        value: what was decided.
        source: `option`, `original config`, `metadata`, `marker`, `task`, `values`, `structure`
            (the keys that are there, and those that are not) or `assumed`.
        detail: the evidence as a sentence.
    """

    name: str
    value: Any
    source: str
    detail: str


@dataclass(frozen=True, slots=True)
class Hint:
    """What a report notes of a file that looks like another, if a phrase or a key says so.

    The facts must hold, too; where there are neither phrases nor keys, they are the evidence. Of
    the hints of one kind, only the first applies. In `text`, `{NAME=VALUE}` stands for an option.
    """

    text: str = field(metadata=word("hint"))
    kind: str
    words: tuple[str, ...] = ()
    keys: tuple[str, ...] = field(default=(), metadata=word("has"))
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hints:
    """`shared/hints.yaml`: the hints, and the entries of the metadata that they look into."""

    metadata: tuple[str, ...]
    hints: tuple[Hint, ...]


def find_fact(name: str, witnesses: Iterable[Witness], header: Header, task: str) -> Fact:
    """Asks the witnesses in order and returns the first answer that the file allows.

    Raises:
        MapError: none of them has an answer.
    """
    witnesses = tuple(witnesses)
    possible = choices(witnesses, header, task)
    for witness in witnesses:
        found = _answer(witness, header, task)
        if found and (not possible or found[0] in possible):
            return Fact(name, *found)
    raise MapError(f"fact {name!r}: no witness has an answer", hint="end the list with 'assume'")


def choices(witnesses: Iterable[Witness], header: Header, task: str) -> tuple[Any, ...]:
    """Returns the values that only metadata and options can tell apart; none if it is not known."""
    known = [w for w in witnesses if not isinstance(w, InMetadata)]
    if not any(isinstance(w, Assumed) and w.others for w in known):
        return ()
    answers = ((w, found) for w in known if (found := _answer(w, header, task)))
    witness, found = next(answers)
    return (found[0], *(witness.others if isinstance(witness, Assumed) else ()))


def hold(wanted: Facts, facts: Mapping[str, Fact]) -> bool:
    """Tells whether every fact has one of the values that are wanted of it."""
    return all(name in facts and facts[name].value in wanted[name] for name in wanted)


def values_of(header: Header, key: str) -> list[float]:
    """Returns the values of a small float tensor, such as the mean of the latents.

    Args:
        header: of the file.
        key: name of the tensor.

    Returns:
        The values in order, each of a float32 with no more digits than tell it from its
        neighbours; none if the tensor is missing, large, or no number somewhere.
    """
    values = _few_values(header, key)
    single = bool(values) and header.tensors[key].dtype == "F32"
    return [_shortest(value) for value in values] if single else values


def notes_of(header: Header, facts: Mapping[str, Fact], known: Hints) -> Iterator[str]:
    """Yields what the name of a file, its metadata, a key or the facts together hint at.

    Args:
        header: of the file.
        facts: that were decided, by name.
        known: the hints.
    """
    texts = {f"the name {header.path.name}": header.path.name}
    texts |= {f"the metadata {k}": header.metadata.get(k, "") for k in known.metadata}
    spoken = {where: f" {' '.join(WORD.findall(text))} ".lower() for where, text in texts.items()}
    noted = set()
    for hint in known.hints:
        if hint.kind in noted or not hold(hint.facts, facts):
            continue
        found = (
            f"{where} says {phrase!r}"
            for phrase in hint.words
            for where, text in spoken.items()
            if f" {phrase} " in text
        )
        evidence = next(found, "")
        if not evidence and (key := first_match(header.tensors, hint.keys)):
            evidence = f"the file holds the key {key}"
        if not evidence and not hint.words and not hint.keys:
            evidence = " and ".join(f"{name} is {facts[name].value}" for name in hint.facts)
        if evidence:
            noted.add(hint.kind)
            yield f"{evidence}: {OPTION.sub(_option, hint.text)}"


def _option(found: re.Match[str]) -> str:
    """Spells an option of a hint for whoever reads it."""
    return option(found["name"], True if found["value"] == "true" else found["value"])


def config_beside(path: Path) -> str:
    """Returns a hint at the original configuration that lies beside a file; empty if none does.

    Web UIs take the yaml of the file's name for it, so that is how people keep it.

    Args:
        path: of the file.
    """
    beside = path.with_suffix(".yaml")
    try:
        with open_regular(beside) as (file, _):
            text = file.read(1 << 16)
    except FileRefused:
        return ""
    if not any(word in text for word in (b"unet_config", b"network_config")):
        return ""
    use = option("original_config", str(beside))
    return f"{beside.name} lies beside the file and looks like its configuration: {use} reads it"


def first_match(keys: Iterable[str], patterns: Iterable[str]) -> str | None:
    """Returns the first key that a pattern matches: `*` at either end stands for any text."""
    whole = {pattern for pattern in patterns if "*" not in pattern}
    starts = tuple(p.removesuffix("*") for p in patterns if p.endswith("*"))
    ends = tuple(p.removeprefix("*") for p in patterns if p.startswith("*"))
    found = (k for k in keys if k in whole or k.startswith(starts) or k.endswith(ends))
    return next(found, None) if patterns else None


def _answer(witness: Witness, header: Header, task: str) -> tuple[Any, str, str] | None:
    """Returns the value, the source and the detail of a fact; None if the witness cannot tell."""
    match witness:
        case InMetadata(names, values):
            for entry in names:
                text = header.metadata.get(entry, "")
                said = text.strip().lower()
                if found := [value for word, value in values.items() if word.lower() == said]:
                    return found[0], "metadata", f"the metadata says {entry} = {text}"
        case Marker(key, value):
            if name := first_match(header.tensors, [key]):
                return value, "marker", f"the file holds the key {name}"
        case OfTask(tasks, value, because):
            if task in tasks:
                return value, "task", f"{task}: {because or f'the task is {task}'}"
        case LastValue(key, below):
            if numbers := _few_values(header, key):
                detail = f"{key} ends with {numbers[-1]:.3g}"
                return _judged(witness, numbers[-1] < below, detail)
        case SpreadOfValues(key, above):
            if numbers := _few_values(header, key):
                mean = sum(numbers) / len(numbers)
                spread = math.hypot(*(n - mean for n in numbers)) / math.sqrt(len(numbers))
                side = "above" if spread > above else "not above"
                detail = f"the values of {key} spread by {spread:.3g}, {side} {above}"
                return _judged(witness, spread > above, detail)
        case PublishedSize(key, published):
            info = header.tensors.get(key)
            if info and info.numel in published:
                detail = f"{key} has {info.numel:,} elements, as published"
                return published[info.numel], "structure", detail
        case Default(value, because):
            return value, "structure", because
        case Assumed(value, because, _, key, tasks):
            there = not key or first_match(header.tensors, [key])
            if there and (not tasks or task in tasks):
                return value, "assumed", because
    return None


def _judged(
    witness: LastValue | SpreadOfValues, holds: bool, detail: str
) -> tuple[Any, str, str] | None:
    value = witness.value if holds else witness.otherwise
    return None if value is None else (value, "values", detail)


def _shortest(value: float) -> float:
    """Returns a float32 as whoever wrote it down would.

    >>> _shortest(-1.6574000120162964)
    -1.6574
    """
    bits = struct.pack("<f", value)
    decimals = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    return next(decimal for decimal in decimals if struct.pack("<f", decimal) == bits)


def _few_values(header: Header, key: str) -> list[float]:
    """Returns the values of a small float tensor; none if it is missing or no number somewhere."""
    info = header.tensors.get(key)
    if not info or info.numel > FEW or not header.has_data(info):
        return []
    with Files() as files:
        data = bytes(info.read(files))
    values: list[float] = []
    if info.dtype in IN_A_BYTE:
        values = [_in_a_byte(byte, *IN_A_BYTE[info.dtype]) for byte in data]
    elif info.dtype in LETTERS:
        letter, missing = LETTERS[info.dtype]
        width = struct.calcsize(letter) - missing
        wide = (bytes(missing) + data[i : i + width] for i in range(0, len(data), width))
        values = list(struct.unpack(f"<{info.numel}{letter}", b"".join(wide)))
    return values if all(map(math.isfinite, values)) else []


def _in_a_byte(byte: int, fraction_bits: int, bias: int, no_number: bytes) -> float:
    """Returns the value of a float of 8 bits.

    >>> [_in_a_byte(byte, *IN_A_BYTE["F8_E4M3"]) for byte in (0x01, 0x38, 0xFE, 0x7F)]
    [0.001953125, 1.0, -448.0, nan]
    """
    exponent, fraction = divmod(byte & 0x7F, 1 << fraction_bits)
    if exponent:
        fraction += 1 << fraction_bits
    value = math.ldexp(fraction, max(exponent, 1) - bias - fraction_bits)
    return math.nan if byte in no_number else math.copysign(value, 0x7F - byte)
