"""An architecture with a component of a class that ours do not use: a folder of data, no Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptconv
from ckptconv.maps.architecture import KeyMaps, bundled
from ckptconv.verification.map_checks import check_maps
from tests.support.checkpoints import raw

ARCH = """
title: Tiny autoencoder (TAESD)
single: tiny_vae
root: enc.layers.0.weight
prefix: [taesd., ""]
detect:
  - {has: dec.layers.0.weight}
  - {rank: enc.layers.0.weight, is: 4}
tasks:
  tiny autoencoder: {pipeline: AutoencoderTiny}
components:
  tiny_vae:
    library: diffusers
    sources:
      - {prefix: taesd., map: taesd/taesd}
      - {prefix: "", map: taesd/taesd}
    config:
      _class_name: AutoencoderTiny
      decoder_block_out_channels: [16, 16]
      encoder_block_out_channels: !dim ["encoder.layers.*.conv.0.weight", 0]
      in_channels: !dim [encoder.layers.0.weight, 1]
      latent_channels: !dim [decoder.layers.0.weight, 1]
      num_decoder_blocks: [1, 1]
      num_encoder_blocks: [1, 1]
      upsampling_scaling_factor: 2
"""
MAP = """
blocks:
  enc.layers: encoder.layers
  dec.layers: decoder.layers
"""
SAMPLE = "divides: {}\n"
CONFIG = {
    "encoder_block_out_channels": (16, 16),
    "decoder_block_out_channels": (16, 16),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


def tiny() -> Any:  # its classes are untyped
    import diffusers

    return diffusers.AutoencoderTiny


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Gives a file of random weights under the original names."""
    torch.manual_seed(0)
    model = tiny()(**CONFIG)
    names = {
        key: key.replace("encoder.", "taesd.enc.").replace("decoder.", "taesd.dec.")
        for key in model.state_dict()
    }
    path = tmp_path / "taesd.safetensors"
    save_file({names[key]: value for key, value in model.state_dict().items()}, path)
    return path


@pytest.fixture
def maps(tmp_path: Path, checkpoint: Path) -> KeyMaps:
    """Gives key maps with the new architecture in a folder of its own."""
    folder = tmp_path / "maps" / "taesd"
    folder.mkdir(parents=True)
    (folder / "arch.yaml").write_text(ARCH)
    (folder / "taesd.yaml").write_text(MAP)
    (folder / "sample.yaml").write_text(SAMPLE)
    tensors = {key: [dtype, list(shape)] for key, (dtype, shape, _) in raw(checkpoint).items()}
    (folder / "layout.json").write_text(json.dumps({"metadata": {}, "tensors": tensors}))
    return KeyMaps([tmp_path / "maps", *bundled().folders])


def test_a_component_of_a_new_class_takes_no_python(
    checkpoint: Path, maps: KeyMaps, tmp_path: Path
) -> None:
    assert "AutoencoderTiny" not in bundled().model_classes
    architecture, task = ckptconv.inspect(checkpoint, maps=maps).require()
    assert (architecture.name, task.name) == ("taesd", "tiny autoencoder")
    assert ckptconv.plan(checkpoint, maps=maps).lossless
    out, back = tmp_path / "out", tmp_path / "back.safetensors"
    report = ckptconv.convert(checkpoint, out, maps=maps)
    assert report.configs["tiny_vae"].values["encoder_block_out_channels"] == [16, 16]
    for source in (checkpoint, None):
        found = ckptconv.verify(source, out, maps=maps)
        assert found.passed, found
        assert {check.kind for check in found.checks} >= {"weights", "config"}
    ckptconv.export(out, back, maps=maps)
    assert raw(back) == raw(checkpoint)
    model = tiny().from_pretrained(out)
    assert model(torch.zeros(1, 3, 16, 16)).sample.shape == (1, 3, 16, 16)


@pytest.mark.slow
def test_its_maps_pass_the_check(maps: KeyMaps) -> None:
    own, ours = maps.folders
    for needed in ("shared", "foreign.yaml"):
        (own / needed).symlink_to(ours / needed)
    checks = [c for c in check_maps(KeyMaps([own])) if c.component in ("maps", "taesd")]
    assert {check.kind for check in checks} == {"map", "layout", "sample"}
    assert [problem for check in checks for problem in check.problems] == []
