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
