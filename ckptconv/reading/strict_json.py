"""JSON from an untrusted source: it notices repeated keys, and its values are safe to print."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


def show(value: object) -> str:
    """Quotes, escapes and shortens a value for a message."""
    return _REPR.repr(value)


@dataclass(frozen=True, slots=True)
class Repeated:
    """A JSON object that repeats these keys."""

    keys: list[str]


def strict_loads(raw: bytes) -> Any:
    """Parses JSON; an object that repeats keys becomes `Repeated`.

    Raises:
        RecursionError: it is nested too deeply.
        ValueError: it is not UTF-8 (UnicodeDecodeError) or not JSON.
    """
    return json.loads(raw.decode(), object_pairs_hook=_unique, parse_int=_parse_int)


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded as UTF-8: JSON can escape half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Repeated:
    found = dict(pairs)
    if len(found) == len(pairs):  # the usual case, made fast
        return found
    return Repeated([key for key, count in Counter(key for key, _ in pairs).items() if count > 1])


def _parse_int(text: str) -> int | float:
    """Reads integers beyond 64 bits and -0 as floats, as the safetensors library does."""
    return float(text) if len(text) > 20 or text == "-0" else int(text)
