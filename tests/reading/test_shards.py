"""A checkpoint in several files is read as one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.errors import FileRefused
from tests.support.relatives import assert_equal

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.conftest import Sample


def in_shards(file: Path, folder: Path) -> Path:
    """Splits a checkpoint over three files and returns their index."""
    folder.mkdir()
    parts: list[dict[str, Tensor]] = [{}, {}, {}]
    for n, (key, value) in enumerate(load_file(file).items()):
        parts[n % 3][key] = value
    index: dict[str, str] = {}
    for n, part in enumerate(parts, 1):
        name = f"model-{n:05}-of-00003.safetensors"
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def test_a_checkpoint_in_several_files_converts_as_one(sample: Sample, tmp_path: Path) -> None:
    index = in_shards(sample("sd2"), tmp_path / "parts")
    ckptconv.convert(index, tmp_path / "out")
    ckptconv.convert(sample("sd2"), tmp_path / "want")
    for file in (tmp_path / "want").rglob("*.safetensors"):
        assert_equal(
            load_file(tmp_path / "out" / file.relative_to(tmp_path / "want")), load_file(file)
        )
    assert ckptconv.verify(index, tmp_path / "out").passed
    facts = ckptconv.inspect(index).facts
    assert facts["prediction_type"].source == "values", "a few values are read from their own file"


def test_a_part_of_a_checkpoint_is_refused_with_its_index_named(
    sample: Sample, tmp_path: Path
) -> None:
    in_shards(sample("sd1"), tmp_path / "parts")
    with pytest.raises(FileRefused, match="part 2 of 3") as caught:
        ckptconv.inspect(tmp_path / "parts/model-00002-of-00003.safetensors")
    assert "model.safetensors.index.json" in (caught.value.hint or "")
