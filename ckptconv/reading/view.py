"""Files seen otherwise than they lie on the disk: several as one, or under other names.

A view is a `Header` whose tensors keep the offsets that they have in their own files;
`Header.locate` leads back to those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .header import Header, TensorInfo

__all__ = ["files_of", "renamed", "stored"]


def renamed(header: Header, names: Mapping[str, str], note: str) -> Header:
    """Returns a header with other names.

    Args:
        header: of the file.
        names: the new name of each tensor that gets one, by the name in `header`; all differ.
        note: what was done, as a sentence.
    """
    origins = {names.get(key, key): header.locate(key) for key in header.tensors}
    tensors = {names.get(key, key): info for key, info in header.tensors.items()}
    return dataclasses.replace(
        header, tensors=tensors, notes=(*header.notes, note), origins=origins
    )


def files_of(header: Header) -> tuple[Header, ...]:
    """Returns the headers of the files that a header stands for: itself where it is no view."""
    found = {owner.path: owner for owner, _ in header.origins.values()}
    return tuple(found.values()) or (header,)


def stored(header: Header) -> dict[str, TensorInfo]:
    """Returns the tensors of a header by the names that they have in their files."""
    return {header.locate(key)[1]: info for key, info in header.tensors.items()}
