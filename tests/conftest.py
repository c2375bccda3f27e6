"""What several test files share: the small checkpoints, written once a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pytest

from ckptconv.architecture import bundled
from ckptconv.sample import layout_of, write_sample

if TYPE_CHECKING:
    from pathlib import Path


class Sample(Protocol):
    """The fixture `sample`: `sample(architecture, **choices of layout_of)`."""

    def __call__(
        self,
        name: str,
        *,
        task: str | None = None,
        full: bool = False,
        dtype: str | None = None,
        ema: bool = False,
    ) -> Path: ...


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Gives the path of a small checkpoint. Tests share it: read the file, never change it."""
    folder = tmp_path_factory.mktemp("samples")
    written: dict[tuple[object, ...], Path] = {}

    def write(
        name: str,
        *,
        task: str | None = None,
        full: bool = False,
        dtype: str | None = None,
        ema: bool = False,
    ) -> Path:
        wanted = (name, task, full, dtype, ema)
        if wanted not in written:
            architecture = bundled().architectures[name]
            path = folder / f"{name}-{len(written)}.safetensors"
            tensors = layout_of(architecture, task=task, full=full, dtype=dtype, ema=ema)
            write_sample(architecture, path, tensors)
            written[wanted] = path
        return written[wanted]

    return write
