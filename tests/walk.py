"""Walks a small file of every architecture and relative, in every spelling and as GGUF.

    python -m tests.walk [NAME ...]

converts each, compares the folder with that of the usual spelling, verifies it with the file and
alone, turns it back, and loads the file; a GGUF file is converted, compared and verified. It prints
what it did, and ends at the first difference.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

import ckptconv
from ckptconv.maps.architecture import Architecture, bundled
from ckptconv.planning.step import ASIDE
from ckptconv.sample import layout_of, write_sample
from tests.support import gguf_files
from tests.support.checkpoints import metadata
from tests.support.relatives import Relative, assert_equal, round_trip, verified
from tests.support.spellings import spelled

MODULES = [
    path.stem
    for path in sorted(Path(__file__).parent.glob("architectures/test_*.py"))
    if path.stem != "test_relatives"
]
"""Those of `tests/architectures/` that have relatives."""


def all_the_way(tensors: Mapping[str, Tensor], want: Path, folder: Path) -> None:
    """Does with a file all that can be done, and asserts that nothing differs.

    Args:
        tensors: of the file.
        want: the folder of the same model, converted from a file in the usual spelling.
        folder: for the file, and what becomes of it.
    """
    file, out = folder / "it.safetensors", folder / "out"
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, file)
    ckptconv.convert(file, out, overwrite=True)
    same_folder(out, want)
    round_trip(file, out)
    plan = ckptconv.plan(file)
    architecture, _ = plan.detection.require()
    if not architecture.single:
        loaded = ckptconv.load_pipeline(file, device="cpu", components=dict.fromkeys(plan.absent))
        for name in {architecture.main, "vae"} - {*plan.absent}:
            weights = load_file(out / name / "diffusion_pytorch_model.safetensors")
            assert_equal(dict(getattr(loaded, name).state_dict()), weights)


def same_folder(out: Path, want: Path) -> None:
    """Asserts that weights and configurations do not differ."""
    for path in want.rglob("*"):
        here = out / path.relative_to(want)
        if path.suffix == ".safetensors" and ASIDE not in path.parts:
            assert_equal(load_file(here), load_file(path))
        elif path.is_file() and ASIDE not in path.parts:
            assert here.read_bytes() == path.read_bytes(), path


def as_gguf(file: Path, want: Path, folder: Path) -> None:
    """Asserts that the tensors and the metadata become the same folder from a GGUF file."""
    path, out = folder / "it.gguf", folder / "of GGUF"
    entries = metadata(file)
    stored = {key: gguf_files.plain(tensor.numpy()) for key, tensor in load_file(file).items()}
    gguf_files.write(path, stored, entries=entries)
    ckptconv.convert(path, out)
    same_folder(out, want)
    verified(path, out)


def files() -> dict[str, Callable[[Path], None]]:
    """Returns, by name, what writes the file of each architecture and of each relative."""

    def sample(architecture: Architecture, path: Path) -> None:
        write_sample(architecture, path, layout_of(architecture, dtype="fp16"))

    def made(relative: Relative, path: Path) -> None:
        save_file(relative.tensors(), path)

    found = {name: partial(sample, each) for name, each in bundled().architectures.items()}
    modules = (importlib.import_module(f"tests.architectures.{name}") for name in MODULES)
    relatives = (relative for each in modules for relative in each.TestProperties.relatives)
    return {**found, **{str(relative): partial(made, relative) for relative in relatives}}


def main(names: list[str]) -> None:
    for name, write in files().items():
        if names and name not in names:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            file, want = Path(scratch, "usual.safetensors"), Path(scratch, "want")
            write(file)
            ckptconv.convert(file, want)
            others = spelled(load_file(file))
            for spelling, tensors in others.items():
                sys.stdout.write(f"{name}: {spelling}\n")
                sys.stdout.flush()
                all_the_way(tensors, want, Path(scratch))
            as_gguf(file, want, Path(scratch))
        seconds = time.monotonic() - started
        sys.stdout.write(f"{name}: {len(others)} spellings and GGUF, {seconds:.0f} s\n")


if __name__ == "__main__":
    main(sys.argv[1:])
