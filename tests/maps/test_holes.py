"""Holes are filled by our own code: nothing that is registered in the process can change them."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

import ckptconv
from ckptconv.maps.holes import HOLES
from tests.conftest import Sample

NAMES = [*HOLES, "dim_or_null", "pick", "oc.env"]
"""The tags of today, and resolvers that earlier versions registered."""


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("architecture", ["sd1", "sd2-unclip"])
def test_hostile_resolvers_change_no_byte_and_ours_are_not_left_behind(
    architecture: str, sample: Sample, tmp_path: Path
) -> None:
    source = sample(architecture)
    before = set(BaseContainer._resolvers)
    ckptconv.convert(source, tmp_path / "one")
    assert set(BaseContainer._resolvers) == before
    for name in NAMES:
        OmegaConf.register_resolver(name, lambda *_: 99, replace=True)
    try:
        ckptconv.convert(source, tmp_path / "two")
    finally:
        OmegaConf.clear_resolvers()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
