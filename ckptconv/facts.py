"""What names and shapes cannot tell, such as the prediction type, and which witness decided.

The witnesses of a fact stand in `arch.yaml`, in order; the first that has an answer decides. Each
is a mapping with one of the words below, and the answer: `value` (if the test holds), `otherwise`
(if it does not; without it the next witness is asked).

    {metadata: NAME, values: {text: value}}   an entry of the header's metadata
    {key: NAME, value: v}                     a marker tensor
    {task: [NAME, ...], value: v}             the task that the input channels tell
    {last_of: NAME, below: x, value: v}       the last value of a tensor
    {spread_of: NAME, above: x, value: v}     the standard deviation of a small tensor
    {assume: v, because: sentence}            no evidence at all; must be last
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import MapError
from .reading.header import DTYPE_BITS, Header

__all__ = ["Fact", "find_fact"]

FEW = 4096
"""Elements that a witness may read at most: it looks, it does not load."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A decided fact.

    Attributes:
        name: such as `prediction_type`.
        value: what was decided.
        source: `option`, `original config`, `metadata`, `marker`, `task`, `values` or `assumed`.
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


def _assume(name: str, witness: Mapping[str, Any], _header: Header, _task: str) -> Fact:
    return Fact(name, witness["assume"], "assumed", witness["because"])


def _judged(name: str, witness: Mapping[str, Any], holds: bool, detail: str) -> Fact | None:
    if holds:
        return Fact(name, witness["value"], "values", detail)
    if "otherwise" in witness:
        return Fact(name, witness["otherwise"], "values", detail)
    return None


def _few_values(header: Header, key: str) -> list[float]:
    """Returns the values of a small float tensor; none if it is missing or no number somewhere."""
    info = header.tensors.get(key)
    if not info or info.numel > FEW or header.data_start == 0:
        return []
    with header.path.open("rb") as file:
        file.seek(info.start)
        data = file.read(info.nbytes)
    if len(data) * 8 != info.numel * DTYPE_BITS[info.dtype]:
        return []
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
    "assume": _assume,
}
