"""Says what a folder is that somebody gave in place of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from ..errors import FileRefused, option

INDEX = ".safetensors.index.json"
CHECKPOINTS = (INDEX, ".safetensors", ".ckpt", ".pt", ".pth", ".gguf")


def not_a_file(folder: Path) -> FileRefused:
    """Returns the error that names the folder for what it is, and what to give instead.

    Raises:
        OSError: the folder cannot be listed.
    """
    snapshots = sorted(folder.glob("snapshots/*/"), key=lambda place: place.stat().st_mtime)
    place = snapshots[-1] if snapshots else folder
    found = sorted(path for path in place.iterdir() if path.name.endswith(CHECKPOINTS))
    found = [path for path in found if path.name.endswith(INDEX)] or found  # rather than its shards
    hint = f"give {found[0]}" if found else "give one .safetensors, .ckpt or .gguf file"
    if (place / "model_index.json").is_file():
        what = "a diffusers folder, so it is converted already"
        also = f"; for the checkpoint in it, {hint}" if found else ""
        hint = (
            f"`ckptconv verify {place}` checks it, `ckptconv export {place} FILE` makes a "
            f"checkpoint of it, `ckptconv generate {place}` runs it{also}"
        )
    elif (place / "config.json").is_file():
        what = "a folder of one component in the diffusers layout"
    elif len(found) > 1:
        what = f"a folder that holds {len(found)} checkpoints"
        hint = (
            f"give one of them, or a pattern of several in quotes: '{place / '*'}.safetensors'; "
            f"`convert` with {option('assemble', True)} puts those together that make one model"
        )
    else:
        what = "a folder that holds one checkpoint" if found else "a folder without a checkpoint"
    cache = f"the cache of {folder.name}, and {place.name} in it is " if snapshots else ""
    problems = [path.name for path in found] if len(found) > 1 else []
    said = f"{folder}: this is {cache}{what}"
    return FileRefused(said, problems=problems, hint=hint, code="unreadable")
