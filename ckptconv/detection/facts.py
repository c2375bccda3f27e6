"""What names and shapes cannot tell, such as the prediction type, and which witness decided.

The witnesses of a fact stand in `arch.yaml`, in order; the first that has an answer decides. Each
is a mapping with one of the words below, and the answer: `value` (if the test holds), `otherwise`
(if it does not; without it the next witness is asked).

    {metadata: NAME, values: {text: value}}   an entry of the header's metadata
    {key: NAME, value: v}                     a marker tensor
    {task: [NAME, ...], value: v}             the task that the input channels tell
    {last_of: NAME, below: x, value: v}       the last value of a tensor
    {spread_of: NAME, above: x, value: v}     the standard deviation of a small tensor
    {size_of: NAME, values: {number: value}}  the length of a vector: a published width
    {default: v, because: sentence}           what holds where nothing above says otherwise
    {assume: v, because: sentence}            no evidence at all; must be last

Some files tell more of their training in passing, by what they are called: `hints` finds it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MapError
from ..files import read_range
from ..reading.tensor import Header

__all__ = ["Fact", "find_fact", "hints", "values_of"]

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


def find_fact(name: str, witnesses: Sequence[Mapping[str, Any]], header: Header, task: str) -> Fact:
    """Asks the witnesses in order and returns the first answer.

    Raises:
        MapError: a witness is malformed, or none of them has an answer.
    """
    for witness in witnesses:
        words = [w for w in _WITNESSES if w in witness] if isinstance(witness, Mapping) else []
        if len(words) != 1:
            raise MapError(
                f"fact {name!r}: not a witness: {witness}",
                hint=f"a witness has exactly one of the words {', '.join(_WITNESSES)}",
            )
        try:
            fact = _WITNESSES[words[0]](name, witness, header, task)
        except (KeyError, TypeError) as error:
            raise MapError(f"fact {name!r}: malformed witness {witness}: {error}") from error
        if fact:
            return fact
    raise MapError(f"fact {name!r}: no witness has an answer", hint="end the list with 'assume'")


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


def hints(header: Header, facts: Mapping[str, Fact], known: Mapping[str, Any]) -> Iterator[str]:
    """Yields what the name of a file, its metadata, a key or the facts together hint at.

    Args:
        header: of the file.
        facts: that were decided, by name.
        known: `metadata` names the entries to look into; each of `hints` has `words` (phrases),
            `ends` (of keys) or `facts` (values that hold together), and what it `says`.
    """
    texts = {f"the name {header.path.name}": header.path.name}
    texts |= {f"the metadata {k}": header.metadata.get(k, "") for k in known["metadata"]}
    spoken = {where: f" {' '.join(WORD.findall(text))} ".lower() for where, text in texts.items()}
    for hint in known["hints"]:
        found = (
            f"{where} says {phrase!r}"
            for phrase in hint.get("words", ())
            for where, text in spoken.items()
            if f" {phrase} " in text
        )
        ends = tuple(hint.get("ends", ()))
        keys = (f"the file holds the key {k}" for k in header.tensors if ends and k.endswith(ends))
        wanted = hint.get("facts", {})
        held = [f"{n} is {f.value}" for n, f in facts.items() if wanted.get(n) == f.value]
        together = " and ".join(held) if wanted and len(held) == len(wanted) else None
        if evidence := next(found, None) or next(keys, None) or together:
            yield f"{evidence}: {hint['says']}"


def _metadata(name: str, witness: Mapping[str, Any], header: Header, _task: str) -> Fact | None:
    key = witness["metadata"]
    text = header.metadata.get(key)
    if text not in witness["values"]:
        return None
    return Fact(name, witness["values"][text], "metadata", f"the metadata says {key} = {text}")


def _key(name: str, witness: Mapping[str, Any], header: Header, _task: str) -> Fact | None:
    if witness["key"] not in header.tensors:
        return None
    return Fact(name, witness["value"], "marker", f"the file holds the key {witness['key']}")


def _task(name: str, witness: Mapping[str, Any], _header: Header, task: str) -> Fact | None:
    if task not in witness["task"]:
        return None
    because = witness.get("because", f"the task is {task}")
    return Fact(name, witness["value"], "task", f"{task}: {because}")


def _last_of(name: str, witness: Mapping[str, Any], header: Header, _task: str) -> Fact | None:
    key = witness["last_of"]
    values = _few_values(header, key)
    if not values:
        return None
    return _judged(
        name, witness, values[-1] < witness["below"], f"{key} ends with {values[-1]:.3g}"
    )


def _spread_of(name: str, witness: Mapping[str, Any], header: Header, _task: str) -> Fact | None:
    key = witness["spread_of"]
    values = _few_values(header, key)
    if not values:
        return None
    mean = sum(values) / len(values)
    spread = math.hypot(*(v - mean for v in values)) / math.sqrt(len(values))
    side = "above" if spread > witness["above"] else "not above"
    detail = f"the values of {key} spread by {spread:.3g}, {side} {witness['above']}"
    return _judged(name, witness, spread > witness["above"], detail)


def _size_of(name: str, witness: Mapping[str, Any], header: Header, _task: str) -> Fact | None:
    key = witness["size_of"]
    info = header.tensors.get(key)
    if not info or info.numel not in witness["values"]:
        return None
    detail = f"{key} has {info.numel:,} elements, as published"
    return Fact(name, witness["values"][info.numel], "structure", detail)


def _default(name: str, witness: Mapping[str, Any], _header: Header, _task: str) -> Fact:
    return Fact(name, witness["default"], "structure", witness["because"])


def _assume(name: str, witness: Mapping[str, Any], _header: Header, _task: str) -> Fact:
    return Fact(name, witness["assume"], "assumed", witness["because"])


def _judged(name: str, witness: Mapping[str, Any], holds: bool, detail: str) -> Fact | None:
    if holds:
        return Fact(name, witness["value"], "values", detail)
    if "otherwise" in witness:
        return Fact(name, witness["otherwise"], "values", detail)
    return None


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
    data = read_range(info.file, info.start, info.nbytes)
    if info.dtype == "BF16":  # the upper half of a float32
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    letter = {"F64": "d", "F32": "f", "BF16": "f", "F16": "e"}.get(info.dtype)
    values = list(struct.unpack(f"<{info.numel}{letter}", data)) if letter else []
    return values if all(map(math.isfinite, values)) else []


_WITNESSES: dict[str, Callable[[str, Mapping[str, Any], Header, str], Fact | None]] = {
    "metadata": _metadata,
    "key": _key,
    "task": _task,
    "last_of": _last_of,
    "spread_of": _spread_of,
    "size_of": _size_of,
    "default": _default,
    "assume": _assume,
}
