"""What the tests of an architecture share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.support.properties import Convert
from tests.support.relatives import Converted, Relative, convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Convert]:
    """Gives the file of a relative and its folder. Tests share them: read them, never change."""
    folder = tmp_path_factory.mktemp("relatives")
    made: dict[str, Converted] = {}

    def make(relative: Relative) -> Converted:
        name = str(relative)
        if name not in made:
            made[name] = convert(relative, folder / str(len(made)))
        return made[name]

    yield make
    shutil.rmtree(folder)
