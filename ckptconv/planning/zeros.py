"""Finds weights that a download never filled: the room that it reserved reads as zeros.

A large weight that is zero throughout is one, unless its layer begins as zeros in training. So is
the last large weight of a file if it ends in zeros: there the download stopped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..dtypes import FLOATS
from ..errors import FileRefused, option
from ..files import Files
from ..reading.tensor import Tensor
from .step import ASIDE, Step

LARGE = 1 << 14
"""Elements. Smaller weights, and biases and norms of any size, may well be zero."""

BLOCK = 1 << 14
"""Bytes at the end of a weight that are looked at first: a weight with another value in them is not
read further."""

CHUNK = 4 << 20

ZERO_AT_FIRST = re.compile(
    r"(^|\.)(proj_out|conv2|conv_out)\.weight$|^controlnet_(down_blocks|mid_block)\b"
)
"""Layers that begin as zeros, by their names in diffusers: a network that was never trained, and a
new ControlNet, hold them so."""


def zero_weights(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[Tensor, str]]:
    """Yields weights that should not be zero, and whether they are `all zero` or end in zeros.

    Args:
        tensors: each after its key in diffusers.
    """
    large = {
        (tensor.file, tensor.start): tensor
        for key, tensor in tensors
        if tensor.dtype in FLOATS
        and len(tensor.shape) > 1
        and tensor.numel >= LARGE
        and not ZERO_AT_FIRST.search(key)
    }
    ordered = [large[place] for place in sorted(large)]
    last = {tensor.file: tensor for tensor in ordered}
    with Files() as files:
        for tensor in ordered:
            if not _is_zero(files, tensor, max(tensor.start, tensor.end - BLOCK)):
                continue
            if _is_zero(files, tensor, tensor.start):
                yield tensor, "all zero"
            elif tensor is last[tensor.file]:
                yield tensor, f"zero in its last {BLOCK:,} bytes and more, where the file ends"


def require_filled(path: Path, steps: Iterable[Step]) -> None:
    """Checks that the weights of a plan are not those of an unfinished download.

    Raises:
        FileRefused: some are zero; all are named.
    """
    sources = [
        (target.key, step.sources[0])
        for step in steps
        for target in step.targets[:1]
        if target.component != ASIDE
    ]
    if found := list(zero_weights(sources)):
        raise FileRefused(
            f"{path}: the file is not whole: {len(found):,} large weights are zero, as an "
            "unfinished download leaves them",
            problems=[
                f"{tensor.name} {list(tensor.shape)} is {how}"
                + (f" in {tensor.file}" if tensor.file != path else "")
                for tensor, how in found
            ],
            hint="let the download finish, or download the file again and compare its SHA-256; if "
            f"the zeros are meant, {option('ignore_zeros', True)} accepts them",
        )


def _is_zero(files: Files, tensor: Tensor, start: int) -> bool:
    """Whether a tensor is zero from an offset of the file on."""
    for at in range(start, tensor.end, CHUNK):
        data = files.read(tensor.file, at, min(CHUNK, tensor.end - at))
        if data != bytes(len(data)):
            return False
    return True
