"""What several test files share: published headers, made-up ones, and small checkpoints."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

import ckptconv
from ckptconv.maps.architecture import bundled
from ckptconv.reading.header import header_from_json
from ckptconv.reading.tensor import Header, Tensor
from ckptconv.sample import layout_of, write_sample
from tests.mutations import linked
from tests.support import outputs
from tests.support.checkpoints import midget

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# The suite runs in two processes: threads of torch on top of them would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Under `nohup`, the programs that tests stop with SIGHUP would inherit that it is ignored.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

HEADERS = Path(__file__).parent / "headers"
PUBLISHED = sorted(path.stem for path in HEADERS.glob("*.json"))


@functools.cache
def published(name: str) -> Header:
    """Returns the header of a published checkpoint, one of PUBLISHED."""
    return header_from_json(HEADERS / f"{name}.json")


def made(
    tensors: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None
) -> Header:
    """Returns a header of float16 tensors with these shapes, of a file that is nowhere."""
    path = Path("made.safetensors")
    infos = {key: Tensor(path, key, "F16", shape, 0, 0) for key, shape in tensors.items()}
    return Header(path, infos, metadata or {}, 0, 0)


def shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a header, to alter and to give to `made`."""
    return {key: info.shape for key, info in header.tensors.items()}


@pytest.fixture(scope="session", autouse=True)
def _every_json_has_its_schema() -> Iterator[None]:
    """Holds all that any test prints with `--json` to its schema."""
    from ckptconv.commands import shared

    document = shared.document

    def checked(*args: Any) -> Any:
        found = document(*args)
        outputs.check(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "document", checked)
        yield


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


class Folder(Protocol):
    """The fixture `folder`: `folder(architecture)`."""

    def __call__(self, name: str) -> Path: ...


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives a checkpoint of 1 MB that converts, but is too narrow to run. Tests share it."""
    return midget(tmp_path_factory.mktemp("small") / "small.safetensors")


@pytest.fixture(scope="session")
def folder(small: Path, sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Gives the folder that a sample, or `small`, converts to. Tests share it, too."""
    converted: dict[str, Path] = {}

    def convert(name: str) -> Path:
        if name not in converted:
            converted[name] = tmp_path_factory.mktemp("folder") / name
            ckptconv.convert(small if name == "small" else sample(name), converted[name])
        return converted[name]

    return convert


class Copy(Protocol):
    """The fixture `copy`: `copy(architecture)`."""

    def __call__(self, name: str) -> Path: ...


@pytest.fixture
def copy(folder: Folder, tmp_path: Path) -> Copy:
    """Gives a copy of what `folder` gives, to alter: its files are links, so replace them whole."""

    def link(name: str) -> Path:
        return linked(folder(name), tmp_path / "copy")

    return link
