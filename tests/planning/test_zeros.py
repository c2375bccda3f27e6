"""Weights that an unfinished download left zero: found, named, and accepted on request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckptconv
from ckptconv.errors import FileRefused
from ckptconv.inference.model import open_model
from ckptconv.options import Options
from ckptconv.planning.zeros import LARGE, zero_weights
from ckptconv.reading.header import encode_header, read_header
from ckptconv.reading.source import open_header
from ckptconv.reading.tensor import Tensor
from tests.conftest import Sample
from tests.reading.test_shards import in_shards
from tests.support.shell import run

UNET = "model.diffusion_model."
NEW = ("proj_out.weight", "out_layers.3.weight", "out.2.weight")
"""The layers of a UNet that begin as zeros."""


def zeroed(source: Path, path: Path, chosen: Callable[[Tensor], bool]) -> list[str]:
    """Writes a copy of a file in which the chosen tensors are holes; returns their names."""
    path.write_bytes(source.read_bytes())
    names = []
    with path.open("r+b") as file:
        for tensor in read_header(path).tensors.values():
            if chosen(tensor):
                file.seek(tensor.start)
                file.write(bytes(tensor.nbytes))
                names.append(tensor.name)
    return names


def test_a_hole_is_refused_until_it_is_accepted(sample: Sample, tmp_path: Path) -> None:
    file, out = tmp_path / "hole.safetensors", tmp_path / "out"
    names = zeroed(sample("sd1"), file, lambda t: t.name.startswith(f"{UNET}middle_block.1."))
    with pytest.raises(FileRefused, match="large weights are zero") as caught:
        ckptconv.convert(file, out)
    named = {problem.partition(" ")[0] for problem in caught.value.problems}
    assert named <= set(names)
    assert f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight" in named
    assert not any(name.endswith((".bias", "proj_out.weight")) for name in named)
    assert "ignore_zeros=True" in caught.value.hint
    with pytest.raises(FileRefused, match="large weights are zero"):
        open_model(file, Options())
    assert "--ignore-zeros accepts them" in run("convert", file, out, code=3).stderr

    run("convert", file, out, "--ignore-zeros")
    assert open_model(file, Options(ignore_zeros=True)).steps
    assert open_model(out, Options(ignore_zeros=True)).steps
    with pytest.raises(FileRefused, match="large weights are zero"):
        open_model(out, Options())
    found = ckptconv.verify(file, out, only="unet")
    assert {(check.component, check.kind) for check in found.checks if check.problems} == {
        ("unet", "zeros")
    }
    assert "mid_block.attentions.0" in found.problems[0]
    accepted = ckptconv.verify(None, out, only="unet", ignore_zeros=True)
    assert accepted.passed
    assert any("large weights are zero" in n for check in accepted.checks for n in check.notes)


def test_a_tail_of_zeros_is_found_inside_the_last_weight(sample: Sample, tmp_path: Path) -> None:
    file = tmp_path / "tail.safetensors"
    file.write_bytes(sample("sd1").read_bytes())
    tensors = read_header(file).tensors.values()
    last = [t for t in tensors if t.numel >= LARGE and not t.name.endswith(NEW)][-1]
    with file.open("r+b") as out:
        out.truncate(last.start + 64)
        out.truncate(sample("sd1").stat().st_size)
    with pytest.raises(FileRefused, match="large weights are zero, 1 in all") as caught:
        ckptconv.convert(file, tmp_path / "out")
    assert f"{last.name} {list(last.shape)} is zero at its end, where" in caught.value.problems[0]


def test_shards_pickles_and_donors_are_looked_at(sample: Sample, tmp_path: Path) -> None:
    whole, hole = sample("sd1"), tmp_path / "hole.safetensors"
    zeroed(whole, hole, lambda tensor: tensor.name.startswith("first_stage_model."))
    torch.save(load_file(hole), tmp_path / "hole.ckpt")
    index = in_shards(hole, tmp_path / "parts")
    cases: list[tuple[Path, dict[str, Any]]] = [
        (tmp_path / "hole.ckpt", {}),
        (index, {}),
        (whole, {"vae": hole}),
    ]
    for file, options in cases:
        with pytest.raises(FileRefused, match="large weights are zero") as caught:
            ckptconv.convert(file, tmp_path / "out", **options)
        assert caught.value.problems[0].startswith("first_stage_model.")
    ckptconv.convert(hole, tmp_path / "out", vae=whole)  # the zeros are not used


def test_a_network_that_was_never_trained_converts(sample: Sample, tmp_path: Path) -> None:
    file = tmp_path / "new.safetensors"
    assert zeroed(sample("sd1"), file, lambda t: t.name.startswith(UNET) and t.name.endswith(NEW))
    ckptconv.convert(file, tmp_path / "out")
    control = tmp_path / "control.safetensors"
    names = ("zero_convs", "middle_block_out", "input_hint_block.14")
    assert zeroed(sample("controlnet-sd1"), control, lambda t: any(n in t.name for n in names))
    ckptconv.convert(control, tmp_path / "control")


@pytest.mark.parametrize(("hole", "found"), [(1, False), (8, True)])
def test_megabytes_of_zeros_inside_a_weight_are_found(
    hole: int, found: bool, tmp_path: Path
) -> None:
    path = tmp_path / "large.safetensors"
    beginning, infos = encode_header([("a", "F16", (16, 1 << 20))], {})
    path.write_bytes(beginning + b"1" * infos["a"].nbytes)
    with path.open("r+b") as file:
        file.seek(infos["a"].start + 13_000_000)
        file.write(bytes(hole << 20))
    told = [how for _, how in zero_weights(read_header(path).tensors.items())]
    assert bool(told) == found
    assert not told or told[0].endswith("of its 33,554,432 bytes")


@pytest.mark.parametrize("ending", [".aria2", ".part", ".crdownload", ".!qB"])
def test_a_download_that_goes_on_is_noted(ending: str, small: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.symlink_to(small)
    assert ckptconv.inspect(file).notes == ckptconv.inspect(small).notes
    (tmp_path / f"model.safetensors{ending}").touch()
    assert f"as model.safetensors{ending} tells" in ckptconv.inspect(file).notes[0]
    assert "has not finished" in run("inspect", file).stdout
    own = tmp_path / f"other{ending}"
    own.symlink_to(small)
    assert f"the download of other{ending} has not finished" in open_header(own).notes[0]
