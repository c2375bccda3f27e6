"""Walks a small file of every architecture, in every spelling, all the way.

    python -m tests.walk [ARCHITECTURE ...]

converts each, compares the folder with that of the usual spelling, verifies it with the file and
alone, turns it back, and loads the file. It prints what it did, and ends at the first difference.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

import ckptconv
from ckptconv.maps.architecture import bundled
from ckptconv.planning.step import ASIDE
from ckptconv.sample import layout_of, write_sample
from tests.support.relatives import assert_equal, round_trip
from tests.support.spellings import spelled


def all_the_way(tensors: Mapping[str, Tensor], want: Path, folder: Path) -> None:
    """Does with a file all that can be done, and asserts that nothing differs.

    Args:
        tensors: of the file.
        want: the folder of the same model, converted from a file in the usual spelling.
        folder: for the file, and what becomes of it.
    """
    file, out = folder / "it.safetensors", folder / "out"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    ckptconv.convert(file, out, overwrite=True)
    for path in want.rglob("*"):
        here = out / path.relative_to(want)
        if path.suffix == ".safetensors" and ASIDE not in path.parts:
            assert_equal(load_file(here), load_file(path))
        elif path.is_file() and ASIDE not in path.parts:
            assert here.read_bytes() == path.read_bytes(), path
    round_trip(file, out)
    plan = ckptconv.plan(file)
    if not plan.detection.require()[0].single:
        loaded = ckptconv.load_pipeline(file, device="cpu", components=dict.fromkeys(plan.absent))
        for name in {"unet", "vae"} - {*plan.absent}:
            weights = load_file(out / name / "diffusion_pytorch_model.safetensors")
            assert_equal(dict(getattr(loaded, name).state_dict()), weights)


def main(names: list[str]) -> None:
    for name, architecture in bundled().architectures.items():
        if names and name not in names:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            file, want = Path(scratch, "usual.safetensors"), Path(scratch, "want")
            write_sample(architecture, file, layout_of(architecture, dtype="fp16"))
            ckptconv.convert(file, want)
            others = spelled(load_file(file))
            for spelling, tensors in others.items():
                sys.stdout.write(f"{name}: {spelling}\n")
                sys.stdout.flush()
                all_the_way(tensors, want, Path(scratch))
        seconds = time.monotonic() - started
        sys.stdout.write(f"{name}: {len(others)} spellings, {seconds:.0f} s\n")


if __name__ == "__main__":
    main(sys.argv[1:])
