"""Are the tensors of a component those that its class expects, built from its own config.json?"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ...configs.allowed import Unbuildable
from ...dtypes import FLOATS
from ...files import read_range
from ...folder.names import CONFIG_FILES
from ...folder.read import ComponentFolder
from ...reading.tensor import Tensor
from ..classes import Expected, expected
from ..result import Check, Problem

POSITION_IDS = ".embeddings.position_ids"
"""Saved by old releases of transformers, read by none of today's."""
INTEGERS = {"I64": "q", "I32": "i"}


def check_weights(name: str, part: ComponentFolder, library: str, class_name: str) -> Check:
    """Compares names, shapes and kinds of dtype with a model on the meta device."""
    findings: list[Problem | str] = [Problem(part.folder.name, text) for text in part.problems]
    findings += [f"{file} is another variant: it was not checked" for file in part.unread]
    extent = ""
    if part.config is not None and part.tensors:
        try:
            model = expected(library, class_name, part.config)
        except Unbuildable as error:
            findings.append(Problem(CONFIG_FILES["model"], str(error)))
        else:
            findings += [*_names(part, model), *_shapes(part, model, class_name)]
            dtypes = sorted({t.dtype for t in part.tensors.values()} & FLOATS)
            if len(dtypes) > 1:
                findings.append(f"the weights have several dtypes: {', '.join(dtypes)}")
            extent = f"{len(model.shapes):,} tensors, as {class_name} expects them"
    return Check.of(name, "weights", findings, extent)


def _names(part: ComponentFolder, model: Expected) -> Iterator[Problem]:
    for key in model.shapes:
        if key not in part.tensors:
            yield Problem(key, "is missing: the class expects it")
    for key, tensor in part.tensors.items():
        if key in model.shapes:
            continue
        if key.endswith(POSITION_IDS):
            yield from _position_ids(tensor)
        else:
            yield Problem(tensor.name, "is left over: the class has no such tensor")


def _shapes(part: ComponentFolder, model: Expected, class_name: str) -> Iterator[Problem]:
    for key, shape in model.shapes.items():
        if not (tensor := part.tensors.get(key)):
            continue
        if tensor.shape != shape:
            what = f"has shape {list(tensor.shape)}, {class_name} expects {list(shape)}"
            yield Problem(tensor.name, what)
        if (tensor.dtype in FLOATS) == (key in model.integers):
            what = "integers" if key in model.integers else "floats"
            yield Problem(tensor.name, f"has dtype {tensor.dtype}, the class expects {what}")


def _position_ids(tensor: Tensor) -> Iterator[Problem]:
    """Old releases do read the positions: they must be 0, 1, 2, ..."""
    letter = INTEGERS.get(tensor.dtype)
    if not letter or tensor.shape[:-1] not in ((), (1,)) or not 0 < tensor.numel <= 4096:
        found = f"{tensor.dtype} of shape {list(tensor.shape)}"
        yield Problem(tensor.name, f"is {found}, expected I64 of shape [1, positions]")
        return
    data = read_range(tensor.file, tensor.start, tensor.nbytes)
    values = struct.unpack(f"<{tensor.numel}{letter}", data)
    if values != tuple(range(tensor.numel)):
        yield Problem(tensor.name, f"holds {values[:3]}..., expected 0, 1, 2, ...")
