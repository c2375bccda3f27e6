"""Files seen otherwise than they lie on the disk: several as one, or under other names.

A view is a `Header` whose tensors keep the offsets that they have in their own files;
`Header.locate` leads back to those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from .folder import read_shards
from .header import Header, TensorInfo

__all__ = ["files_of", "open_index", "renamed", "stored"]


def open_index(path: Path) -> Header:
    """Returns the shards that an index names as one header.

    Args:
        path: a `.safetensors.index.json`.

    Raises:
        FileRefused: the index and the shards do not agree, or one of them cannot be read.
    """
    shards = read_shards(path)
    origins = {key: (shard, key) for shard in shards for key in shard.tensors}
    metadata: dict[str, str] = {}
    for shard in shards:
        metadata |= shard.metadata
    return Header(
        path,
        {key: shard.tensors[key] for key, (shard, _) in origins.items()},
        metadata,
        0,
        sum(shard.size for shard in shards),
        (f"the checkpoint lies in {len(shards)} files",),
        origins,
    )


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
