"""A folder given in place of a checkpoint is named for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckptconv
from ckptconv.errors import FileRefused
from tests.support.shell import run

SNAPSHOT = "models--org--name/snapshots/0123abc"


@pytest.mark.parametrize(
    ("files", "given", "what", "hint"),
    [
        (
            [],
            ".",
            "this is a folder without a checkpoint",
            "give one .safetensors, .ckpt or .gguf file",
        ),
        (
            ["one.ckpt"],
            ".",
            "this is a folder that holds one checkpoint",
            "give {folder}/one.ckpt",
        ),
        (
            ["b.safetensors", "a.safetensors"],
            ".",
            "this is a folder that holds 2 checkpoints\n  - a.safetensors\n  - b.safetensors\n",
            "give one of them, or a pattern of several in quotes: '{folder}/*.safetensors'",
        ),
        (
            [f"m-0000{n}-of-00002.safetensors" for n in (1, 2)] + ["m.safetensors.index.json"],
            ".",
            "this is a folder that holds one checkpoint",
            "give {folder}/m.safetensors.index.json",
        ),
        (
            ["model_index.json", "unet/config.json"],
            ".",
            "this is a diffusers folder, so it is converted already",
            "`ckptconv verify {folder}` checks it, `ckptconv export {folder} FILE` makes",
        ),
        (
            [f"{SNAPSHOT}/model_index.json", f"{SNAPSHOT}/xl.safetensors"],
            "models--org--name",
            "this is the cache of models--org--name, and 0123abc in it is a diffusers folder",
            f"for the checkpoint in it, give {{folder}}/{SNAPSHOT}/xl.safetensors",
        ),
        (
            [f"{SNAPSHOT}/xl.safetensors"],
            SNAPSHOT,
            "this is a folder that holds one checkpoint",
            f"give {{folder}}/{SNAPSHOT}/xl.safetensors",
        ),
        (
            ["config.json", "diffusion_pytorch_model.safetensors"],
            ".",
            "this is a folder of one component in the diffusers layout",
            "give {folder}/diffusion_pytorch_model.safetensors",
        ),
    ],
)
def test_what_a_folder_is_and_what_to_give(
    files: list[str], given: str, what: str, hint: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FileRefused) as caught:
        ckptconv.plan(tmp_path / given)
    assert what in str(caught.value)
    assert f"hint: {hint.format(folder=tmp_path)}" in str(caught.value) or (
        hint.format(folder=tmp_path) in caught.value.hint
    )


@pytest.mark.parametrize("command", ["inspect FILE", "plan FILE", "convert FILE OUT"])
def test_every_command_names_it(command: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").touch()
    places = {"FILE": tmp_path, "OUT": tmp_path / "out"}
    told = run(*(places.get(word, word) for word in command.split()), code=3)
    assert "a diffusers folder, so it is converted already" in told.stderr
