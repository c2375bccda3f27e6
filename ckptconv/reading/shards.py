"""A checkpoint in several files, which an index names."""

from __future__ import annotations

from pathlib import Path

from ..errors import FileRefused
from ..files import read_json
from .header import read_header
from .tensor import Header, Tensor


def open_index(path: Path) -> Header:
    """Returns the shards that an index names as one header.

    Args:
        path: a `.safetensors.index.json`.

    Raises:
        FileRefused: the index and the shards do not agree, or one of them cannot be read.
    """
    shards = read_shards(path)
    metadata: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        metadata |= shard.metadata
        tensors |= shard.tensors
    note = f"the checkpoint lies in {len(shards)} files"
    return Header(path, tensors, metadata, 0, sum(shard.size for shard in shards), (note,))


def read_shards(index: Path) -> tuple[Header, ...]:
    """Returns the headers of the files that an index names, which hold just what it says.

    Raises:
        FileRefused: they do not, or the index is malformed.
        HeaderError: a file is missing or not well-formed.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileRefused(f"{index}: has no weight_map", hint="the index of the shards is damaged")
    names = sorted(set(map(str, weight_map.values())))
    if bad := [name for name in names if Path(name).name != name]:
        raise FileRefused(
            f"{index}: names files outside its folder: {bad[0]}", hint="check the file"
        )
    headers = tuple(read_header(index.parent / name) for name in names)
    held = {key for header in headers for key in header.tensors}
    wrong = sorted(held ^ weight_map.keys())
    if wrong:
        raise FileRefused(
            f"{index}: does not agree with the shards",
            problems=[
                f"{key}: in {'the shards' if key in held else 'the index'} only" for key in wrong
            ],
            hint="copy the folder again from its source",
        )
    return headers
