"""Finds the weights of a component in a folder that diffusers or transformers reads."""

from __future__ import annotations

from pathlib import Path

from ..errors import FileRefused
from ..files import read_json
from .header import Header, read_header

__all__ = ["component_headers", "read_shards"]

STEMS = ("diffusion_pytorch_model", "model")


def component_headers(folder: Path) -> tuple[Header, ...]:
    """Returns the headers of a component's weight files: one, or one per shard.

    A file without variant is preferred; otherwise the only variant there is.

    Raises:
        FileRefused: there are no weights in the safetensors format, several variants, or a shard
            is missing.
        HeaderError: a file is not well-formed.
    """
    plain = [folder / f"{stem}.safetensors" for stem in STEMS]
    plain += [folder / f"{stem}.safetensors.index.json" for stem in STEMS]
    variants = sorted(p for stem in STEMS for p in folder.glob(f"{stem}.safetensors.index.*.json"))
    if not variants:
        variants = sorted(
            p for s in STEMS for p in folder.glob(f"{s}.*.safetensors") if "-of-" not in p.name
        )
    found = [path for path in plain if path.is_file()] or variants
    if not found:
        pickles = [p.name for p in folder.glob("*.bin")] if folder.is_dir() else []
        what = f"its weights are pickles ({pickles[0]})" if pickles else "it holds no weights"
        raise FileRefused(
            f"{folder}: {what}; needed a .safetensors file",
            hint="load it with diffusers and save it again with safe_serialization=True"
            if pickles
            else "give the folder of one component, with its config.json",
        )
    if len(found) > 1:
        raise FileRefused(
            f"{folder}: holds several sets of weights: {', '.join(p.name for p in found)}",
            hint="leave one of them in the folder",
        )
    if found[0].suffix == ".safetensors":
        return (read_header(found[0]),)
    return read_shards(found[0])


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
