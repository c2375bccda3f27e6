"""How weights are laid out in files, and what may become of a destination."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.conversion.write import Packaging, parse_size
from ckptconv.errors import OutputError, UsageError
from tests.conftest import Folder
from tests.support.checkpoints import raw, raw_folder


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("500 MiB", 500 * 2**20),
        (" 7kb ", 7000),
        ("3KiB", 3072),
        ("2gib", 2**31),
        ("12", 12),
        ("1.5GB", 1_500_000_000),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "0", "0GB", "-5GB", "5XB", "GB", "1.GB", "0.5", "5 G B", "9" * 13]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert "such as 5GB" in caught.value.hint


@pytest.mark.parametrize("variant", ["a/b", "../up", "fp16.old", "ü", " "])
def test_a_variant_that_no_file_name_can_hold_is_refused(variant: str) -> None:
    with pytest.raises(UsageError, match="cannot stand in a file name"):
        Packaging.of(variant, None)


def test_a_variant_stands_in_the_names_of_the_weights(small: Path, tmp_path: Path) -> None:
    report = ckptconv.convert(small, tmp_path / "out", variant="fp16")
    assert [name for name in report.files if name.endswith(".safetensors")] == [
        "ckptconv/dropped.safetensors",
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]


@pytest.mark.parametrize(("variant", "limit"), [("", 100_000), ("fp16", 3_000)])
def test_shards_hold_every_tensor_once_and_the_index_says_where(
    variant: str, limit: int, small: Path, folder: Folder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ckptconv.convert(small, out, variant=variant, max_shard_size=limit)
    dot = f".{variant}" if variant else ""
    for component, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        index = json.loads((out / component / f"{stem}.safetensors.index{dot}.json").read_text())
        shards = sorted((out / component).glob("*.safetensors"))
        assert [path.name for path in shards] == [
            f"{stem}{dot}-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)
        ]
        assert len(shards) > 2
        found = {path.name: raw(path) for path in shards}
        assert index["weight_map"] == {key: name for name, held in found.items() for key in held}
        whole = raw(folder("small") / component / f"{stem}.safetensors")
        assert {key: value for held in found.values() for key, value in held.items()} == whole
        sizes = [[len(data) for _, _, data in held.values()] for held in found.values()]
        assert index["metadata"] == {"total_size": sum(map(sum, sizes))}
        assert all(0 < sum(held) <= limit or len(held) == 1 for held in sizes)


def test_weights_that_fit_one_shard_have_no_index(small: Path, tmp_path: Path) -> None:
    report = ckptconv.convert(small, tmp_path / "out", max_shard_size=10**9)
    assert "unet/diffusion_pytorch_model.safetensors" in report.files
    assert not any("index.json" in name and "/" in name for name in report.files)


def _make(kind: str, out: Path, folder: Folder) -> None:
    """Puts something at the destination that --overwrite must leave alone."""
    if kind == "a file":
        out.write_text("precious")
    elif kind == "a folder of the user":
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
    elif kind == "a diffusers folder from elsewhere":
        shutil.copytree(folder("small"), out)
        shutil.rmtree(out / "ckptconv")
    elif kind in RECORDS:
        (out / "ckptconv").mkdir(parents=True)
        (out / "ckptconv" / "source.json").write_text(RECORDS[kind])
    elif kind == "a link to a converted folder":
        out.symlink_to(folder("small"))
    else:
        out.symlink_to("nowhere")


def _state(path: Path) -> tuple[int, int, int]:
    """Tells whether a path is still the same thing, and untouched."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_mtime_ns


RECORDS = {
    "a folder with a record of something else": '{"files": ["ckptconv/source.json"]}',
    "a folder with a record that lists nothing": '{"ckptconv_version": "0.1.0"}',
    "a folder with a damaged record": '{"ckptconv_version": ',
}
KINDS = [
    *("a file", "a folder of the user", "a diffusers folder from elsewhere"),
    *("a link to a converted folder", "a link to nowhere", *RECORDS),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_at_the_destination_stays(
    kind: str, overwrite: bool, small: Path, folder: Folder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _make(kind, out, folder)
    before = _state(out)
    with pytest.raises(OutputError) as caught:
        ckptconv.convert(small, out, overwrite=overwrite)
    stays = "is not a converted folder that lists its files, so overwrite=True does not remove it"
    assert stays in caught.value.message
    assert _state(out) == before
    assert _names(tmp_path) == ["out"]


def test_a_converted_folder_is_replaced_on_demand(
    small: Path, folder: Folder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ckptconv.convert(small, out, only=["vae"])
    with pytest.raises(OutputError, match="exists"):
        ckptconv.convert(small, out)
    assert _names(out) == ["ckptconv", "vae"]
    ckptconv.convert(small, out, overwrite=True)
    assert raw_folder(out) == raw_folder(folder("small"))
    assert _names(tmp_path) == ["out"]


STRANGERS = ["notes.txt", "samples/1.png", "lora/my.safetensors", "unet/mine.json", "unet/link"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_converted_folder_with_files_of_the_user_stays(
    overwrite: bool, small: Path, folder: Folder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder("small"), out)
    for name in STRANGERS[:-1]:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")
    (out / STRANGERS[-1]).symlink_to(tmp_path)
    (out / ".DS_Store").touch()
    with pytest.raises(OutputError, match="holds what ckptconv did not write") as caught:
        ckptconv.convert(small, out, overwrite=overwrite)
    assert list(caught.value.problems) == sorted(STRANGERS)
    assert caught.value.hint == "move these files elsewhere, or choose another name"
    assert all((out / name).exists() for name in STRANGERS)
    for name in STRANGERS:
        (out / name).unlink()
    ckptconv.convert(small, out, overwrite=True)
    assert raw_folder(out) == raw_folder(folder("small"))


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": 50_000, "variant": "fp16"}, {"only": ["vae"]}]
)
def test_the_record_lists_every_file(options: dict[str, Any], small: Path, tmp_path: Path) -> None:
    report = ckptconv.convert(small, tmp_path / "out", **options)
    listed = json.loads((tmp_path / "out" / "ckptconv" / "source.json").read_text())["files"]
    assert listed == sorted(report.files)
    assert listed == sorted(
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    )


def test_an_empty_folder_is_replaced_on_demand(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        ckptconv.convert(small, tmp_path / "out")
    ckptconv.convert(small, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.parametrize("role", ["source", "donor"])
def test_a_folder_that_holds_an_input_is_not_replaced(
    role: str, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ckptconv.convert(small, out)
    inside = out / "models" / "inside.safetensors"
    inside.parent.mkdir()
    shutil.copyfile(small, inside)
    given: dict[str, Any] = {"path": inside} if role == "source" else {"path": small, "vae": inside}
    with pytest.raises(OutputError, match="holds the input") as caught:
        ckptconv.convert(**given, out=out, overwrite=True)
    assert str(inside) in str(caught.value)
    assert inside.is_file()


@pytest.mark.parametrize("name", ["v1.5.safetensors", "v1.5.ckpt", "v1.5.safetensors.index.json"])
def test_without_a_destination_the_folder_goes_next_to_the_file(
    name: str, small: Path, tmp_path: Path
) -> None:
    source = tmp_path / name
    if name.endswith("json"):
        shutil.copyfile(small, tmp_path / "whole")
        source.write_text(json.dumps({"weight_map": dict.fromkeys(raw(small), "whole")}))
    else:
        shutil.copyfile(small, source)
    assert ckptconv.convert(source, configs_only=True).out == tmp_path / "v1.5"
    assert (tmp_path / "v1.5" / "model_index.json").is_file()


def test_a_name_that_is_too_long_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        ckptconv.convert(small, tmp_path / ("x" * 300))


def test_the_index_that_makes_a_folder_load_is_written_last(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = Path.write_bytes

    def spy(self: Path, data: bytes) -> int:
        written.append(self.name)
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", spy)
    ckptconv.convert(small, tmp_path / "out")
    assert len(written) > 8
    assert written.index("model_index.json") == len(written) - 1
