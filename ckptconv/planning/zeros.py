"""Finds weights that a download never filled: the room that it reserved reads as zeros.

Downloads leave holes anywhere in a file. So a large weight should neither be zero throughout nor in
megabytes of it, unless its layer begins as zeros in training; and the last one of a file should not
end in zeros, where a download stopped.
"""

from __future__ import annotations

import itertools
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

PIECE = 2 << 20
"""Bytes, at least, of the pieces that a larger weight is looked at in."""

BLOCK = 4 << 10
"""Bytes at the end of a piece that are read first: if they are not zero, nothing else of it is."""

ZERO_AT_FIRST = re.compile(
    r"(^|\.)(proj_out|conv2|conv_out)\.weight$|^controlnet_(down_blocks|mid_block)\b"
)
"""Layers that begin as zeros, by their names in diffusers: a network that was never trained, and a
new ControlNet, hold them so."""


def zero_weights(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[Tensor, str]]:
    """Yields weights that should not be zero, and how far they are.

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
            count = max(1, tensor.nbytes // PIECE)
            ends = [tensor.start + tensor.nbytes * n // count for n in range(count + 1)]
            zero = sum(
                end - start
                for start, end in itertools.pairwise(ends)
                if _is_zero(files, tensor, end - BLOCK, end) and _is_zero(files, tensor, start, end)
            )
            if zero == tensor.nbytes:
                yield tensor, "all zero"
            elif zero:
                yield tensor, f"zero in {zero:,} of its {tensor.nbytes:,} bytes"
            elif tensor is last[tensor.file] and _is_zero(
                files, tensor, tensor.end - 4 * BLOCK, tensor.end
            ):
                yield tensor, "zero at its end, where the file ends"


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
            f"{path}: the file is not whole: large weights are zero, {len(found):,} in all, as an "
            "unfinished download leaves them",
            problems=[
                f"{tensor.name} {list(tensor.shape)} is {how}"
                + (f" in {tensor.file}" if tensor.file != path else "")
                for tensor, how in found
            ],
            hint="let the download finish, or download the file again and compare its SHA-256; if "
            f"the zeros are meant, {option('ignore_zeros', True)} accepts them",
            code="zeros",
        )


def _is_zero(files: Files, tensor: Tensor, start: int, end: int) -> bool:
    """Whether the bytes of a tensor are zero between two offsets of its file."""
    start = max(start, tensor.start)
    return files.read(tensor.file, start, end - start) == bytes(end - start)
