"""Finds the weights of a component in a folder that diffusers or transformers reads."""

from __future__ import annotations

from pathlib import Path

from ..errors import FileRefused
from ..reading.header import read_header
from ..reading.shards import read_shards
from ..reading.tensor import Header

STEMS = ("diffusion_pytorch_model", "model")


def component_headers(folder: Path) -> tuple[Header, ...]:
    """Returns the headers of a component's weight files: one, or one per shard.

    Files without a variant are preferred to those of the only variant there is.

    Raises:
        FileRefused: there are no weights in the safetensors format, several variants, or a shard
            is missing or malformed.
    """
    plain = [folder / f"{stem}.safetensors{end}" for end in ("", ".index.json") for stem in STEMS]
    found = [path for path in plain if path.is_file()]
    for pattern in ("{}.safetensors.index.*.json", "{}.*.safetensors"):
        variants = (path for stem in STEMS for path in folder.glob(pattern.format(stem)))
        found = found or sorted(path for path in variants if "-of-" not in path.name)
    if not found:
        pickles = [path.name for path in folder.glob("*.bin")] if folder.is_dir() else []
        what = f"its weights are pickles ({pickles[0]})" if pickles else "it holds no weights"
        raise FileRefused(
            f"{folder}: {what}; needed a .safetensors file",
            hint="load it with diffusers and save it again with safe_serialization=True"
            if pickles
            else "give the folder of one component, with its config.json",
        )
    if len(found) > 1:
        raise FileRefused(
            f"{folder}: holds several sets of weights: {', '.join(path.name for path in found)}",
            hint="leave one of them in the folder",
        )
    return read_shards(found[0]) if found[0].suffix == ".json" else (read_header(found[0]),)
