"""A sharded checkpoint: several files, and an index that names them."""

from __future__ import annotations

from pathlib import Path

from ..errors import FileRefused
from ..files import read_json
from .header import read_header
from .tensor import Header, Tensor


def open_index(path: Path) -> Header:
    """Returns the shards of an index as one header; raises as `read_shards` does."""
    shards = read_shards(path)
    metadata: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        metadata |= shard.metadata
        tensors |= shard.tensors
    note = f"the checkpoint lies in {len(shards)} files"
    return Header(path, tensors, metadata, 0, sum(shard.size for shard in shards), (note,))


def read_shards(index: Path) -> tuple[Header, ...]:
    """Returns the headers of the files that an index names.

    FileRefused if the index is malformed or names other tensors, or a file is missing or malformed.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileRefused(f"{index}: has no weight_map", hint="the index of the shards is damaged")
    names = sorted(set(map(str, weight_map.values())))
    if bad := [name for name in names if Path(name).name != name]:
        what = f"{index}: names files outside its folder: {bad[0]}"
        raise FileRefused(what, hint="check the file")
    headers = tuple(read_header(index.parent / name) for name in names)
    held = {key for header in headers for key in header.tensors}
    if wrong := sorted(held ^ weight_map.keys()):
        raise FileRefused(
            f"{index}: does not agree with the shards",
            problems=[f"{k}: in {'the shards' if k in held else 'the index'} only" for k in wrong],
            hint="copy the folder again from its source",
        )
    return headers
