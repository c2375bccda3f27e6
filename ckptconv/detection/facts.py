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
from typing import Any

from ..errors import MapError
from ..files import Files
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

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
"""A word of a name, such as each of those in `dreamshaperXL_v21TurboDPMSDE`."""


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
    """What a report notes of a file that looks like another: if a phrase, key or fact says so."""

    text: str = field(metadata=word("hint"))
    words: tuple[str, ...] = ()
    keys: tuple[str, ...] = field(default=(), metadata=word("has"))
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hints:
    """`shared/hints.yaml`: the hints, and the entries of the metadata that they look into."""

    metadata: tuple[str, ...]
    hints: tuple[Hint, ...]


def find_fact(name: str, witnesses: Iterable[Witness], header: Header, task: str) -> Fact:
    """Asks the witnesses in order and returns the first answer.

    Raises:
        MapError: none of them has an answer.
    """
    for witness in witnesses:
        if found := _answer(witness, header, task):
            return Fact(name, *found)
    raise MapError(f"fact {name!r}: no witness has an answer", hint="end the list with 'assume'")


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
    for hint in known.hints:
        found = (
            f"{where} says {phrase!r}"
            for phrase in hint.words
            for where, text in spoken.items()
            if f" {phrase} " in text
        )
        key = first_match(header.tensors, hint.keys)
        together = " and ".join(f"{n} is {f.value}" for n, f in facts.items() if n in hint.facts)
        if evidence := (
            next(found, None)
            or (f"the file holds the key {key}" if key else "")
            or (together if hold(hint.facts, facts) else "")
        ):
            yield f"{evidence}: {hint.text}"


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
        case InMetadata(name, values):
            if (text := header.metadata.get(name)) is not None and text in values:
                return values[text], "metadata", f"the metadata says {name} = {text}"
        case Marker(key, value):
            if key in header.tensors:
                return value, "marker", f"the file holds the key {key}"
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
        case Assumed(value, because):
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
    if info.dtype == "BF16":  # the upper half of a float32
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    letter = {"F64": "d", "F32": "f", "BF16": "f", "F16": "e"}.get(info.dtype)
    values = list(struct.unpack(f"<{info.numel}{letter}", data)) if letter else []
    return values if all(map(math.isfinite, values)) else []
