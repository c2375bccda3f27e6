"""Are the tensors of a component those that its class expects, built from its own config.json?"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from ...files import read_range
from ...folder.names import CONFIG_FILES
from ...folder.read import Part
from ...planning.plan import Slot
from ...reading.header import FLOATS, Header
from ..classes import Expected, Unbuildable, expected
from ..result import Check, Problem

__all__ = ["check_weights"]

POSITION_IDS = ".embeddings.position_ids"
"""Saved by old releases of transformers, read by none of today's."""
INTEGERS = {"I64": "q", "I32": "i"}


def check_weights(
    name: str, part: Part, library: str, class_name: str, headers: Mapping[str, Header]
) -> Check:
    """Compares names, shapes and kinds of dtype with a model on the meta device.

    Args:
        name: of the component.
        part: the component of the folder.
        library: of the class.
        class_name: of the model.
        headers: of the weight files, by path.
    """
    problems = [Problem(str(part.folder.name), text) for text in part.problems]
    notes = [f"{file} is another variant: it was not checked" for file in part.unread]
    if part.config is None or not part.tensors:
        return Check(name, "weights", tuple(problems), tuple(notes))
    try:
        model = expected(library, class_name, part.config)
    except Unbuildable as error:
        problems.append(Problem(CONFIG_FILES["model"], str(error)))
        return Check(name, "weights", tuple(problems), tuple(notes))
    problems += _names(part, model, headers)
    problems += _shapes(part, model, class_name)
    kinds = {slot.dtype for slot in part.tensors.values() if slot.dtype in FLOATS}
    if len(kinds) > 1:
        notes.append(f"the weights have several dtypes: {', '.join(sorted(kinds))}")
    extent = f"{len(model.shapes):,} tensors, as {class_name} expects them"
    return Check(name, "weights", tuple(problems), tuple(notes), extent)


def _names(part: Part, model: Expected, headers: Mapping[str, Header]) -> Iterator[Problem]:
    for key in model.shapes:
        if key not in part.tensors:
            yield Problem(key, "is missing: the class expects it")
    for key, slot in part.tensors.items():
        if key.endswith(POSITION_IDS) and key not in model.shapes:
            yield from _position_ids(slot, headers[slot.place])
        elif key not in model.shapes:
            yield Problem(slot.key, "is left over: the class has no such tensor")


def _shapes(part: Part, model: Expected, class_name: str) -> Iterator[Problem]:
    for key, shape in model.shapes.items():
        slot = part.tensors.get(key)
        if slot and slot.shape != shape:
            what = f"has shape {list(slot.shape)}, {class_name} expects {list(shape)}"
            yield Problem(slot.key, what)
        if slot and (slot.dtype in FLOATS) == (key in model.integers):
            what = "integers" if key in model.integers else "floats"
            yield Problem(slot.key, f"has dtype {slot.dtype}, the class expects {what}")


def _position_ids(slot: Slot, header: Header) -> Iterator[Problem]:
    """Old releases do read the positions: they must be 0, 1, 2, ..."""
    info = header.tensors[slot.key]
    letter = INTEGERS.get(info.dtype)
    if not letter or info.shape[:-1] not in ((), (1,)) or not 0 < info.numel <= 4096:
        what = f"is {info.dtype} of shape {list(info.shape)}, expected I64 of shape [1, positions]"
        yield Problem(slot.key, what)
        return
    data = read_range(header.path, info.start, info.nbytes)
    values = struct.unpack(f"<{info.numel}{letter}", data)
    if values != tuple(range(info.numel)):
        yield Problem(slot.key, f"holds {values[:3]}..., expected 0, 1, 2, ...")
