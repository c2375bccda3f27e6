"""Composes what people's files have at random, and asks whether anything differs without a word.

    python -m tests.composed --minutes 10 --seed 0

takes a small file of some architecture, changes what it holds (dtypes, missing parts), converts
that as the usual file, then spells it otherwise, adds strays, wraps it, saves it as a PyTorch
checkpoint or breaks it, and converts that. The weights and configurations must be those of the
usual file, the folder must pass its verification, and the way back must be exact; a broken file
must be refused in words. It prints what came of it, and exits with 1 if there was a finding.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckptconv
from ckptconv.errors import CkptconvError
from ckptconv.maps.architecture import bundled
from ckptconv.planning.step import ASIDE
from ckptconv.sample import layout_of, write_sample
from tests.support.spellings import VAE, spelled

Tensors = dict[str, Tensor]
Change = Callable[[Tensors, random.Random], Tensors]

ARCHITECTURES = (
    "sd1",
    "sd2",
    "sdxl",
    "sdxl-refiner",
    "koala-700m",
    "x4-upscaler",
    "controlnet-sd1",
)
UNET_OF = ("model.diffusion_model.", "control_model.")
STRAYS = (
    "lora_unet_down_blocks_0_attentions_0.alpha",
    "cond_stage_model.logit_scale",
    "trainer.counters.x",
    "first_stage_model.logvar",
    "model.diffusion_model.input_blocks.1.0.in_layers.9.weight",
    "conditioner.embedders.3.model.visual.proj",
    "mystery",
)


def mixed_dtypes(tensors: Tensors, rng: random.Random) -> Tensors:
    """Casts some floats."""
    dtype = rng.choice([torch.float32, torch.bfloat16])
    return {
        key: tensor.to(dtype) if tensor.is_floating_point() and rng.random() < 0.3 else tensor
        for key, tensor in tensors.items()
    }


def without_a_part(tensors: Tensors, rng: random.Random) -> Tensors:
    """Leaves out the VAE or a text encoder."""
    prefix = rng.choice([VAE, "cond_stage_model.", "conditioner.embedders.0."])
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}


CONTENTS: tuple[Change, ...] = (mixed_dtypes, without_a_part)
"""What changes the model."""


def spell(tensors: Tensors, rng: random.Random) -> Tensors:
    """Spells it otherwise."""
    others = spelled(tensors)
    return others[rng.choice(sorted(others))] if others else tensors


def strays(tensors: Tensors, rng: random.Random) -> Tensors:
    """Adds keys that belong to nothing."""
    names = rng.sample(STRAYS, rng.randint(1, 3))
    added = {name: torch.randn(rng.choice([(), (3,), (4, 4)])) for name in names}
    return {**added, **tensors}


def twin(tensors: Tensors, rng: random.Random) -> Tensors:
    """Adds another spelling of a tensor, with the same bytes."""
    usual = [key for key in tensors if key.startswith(VAE) and ".attn_1.q." in key]
    if not usual:
        return tensors
    key = rng.choice(usual)
    return {**tensors, key.replace(".attn_1.q.", ".attn_1.to_q."): tensors[key].clone()}


HARMLESS: tuple[Change, ...] = (spell, spell, strays, twin)
"""What changes names, and nothing that is computed."""


def hole(tensors: Tensors, rng: random.Random) -> Tensors:
    """Takes a weight of the UNet away."""
    own = [
        k for k in tensors if k.startswith(UNET_OF) and k.endswith(("proj_in.weight", "conv.bias"))
    ]
    gone = rng.choice(own)
    return {key: tensor for key, tensor in tensors.items() if key != gone}


def unlike_twin(tensors: Tensors, rng: random.Random) -> Tensors:
    """Adds another spelling of a tensor, with other bytes."""
    added = twin(tensors, rng)
    return {k: v if k in tensors else torch.ones_like(v) * 7 for k, v in added.items()}


BREAKING: tuple[Change, ...] = (hole, unlike_twin)
"""What must be refused."""


class Difference(Exception):
    """Something differs, and nobody was told."""


def save(tensors: Tensors, folder: Path, rng: random.Random) -> Path:
    """Saves a file as one of the programs that people use."""
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if rng.random() < 0.6:
        save_file(tensors, folder / "it.safetensors")
        return folder / "it.safetensors"
    if rng.random() < 0.5:
        tensors = {
            key: tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
            for key, tensor in tensors.items()
        }
    more = {"hyper_parameters": Namespace(lr=1), "epoch": 3} if rng.random() < 0.5 else {}
    torch.save({"state_dict": tensors, **more}, folder / "it.ckpt")
    return folder / "it.ckpt"


def weights(folder: Path) -> dict[str, Tensors]:
    """Returns the tensors of a folder by file, but for what is kept aside."""
    return {
        path.relative_to(folder).as_posix(): load_file(path)
        for path in sorted(folder.rglob("*.safetensors"))
        if ASIDE not in path.relative_to(folder).parts
    }


def texts(folder: Path) -> dict[str, bytes]:
    """Returns the configurations of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".safetensors" and ASIDE not in path.parts
    }


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def equal(ours: Tensors, theirs: Tensors) -> bool:
    """Whether names, dtypes, shapes and bits are the same."""
    return ours.keys() == theirs.keys() and all(
        (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape)
        and torch.equal(
            ours[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
        for key, tensor in theirs.items()
    )


def attempt(tensors: Tensors, rng: random.Random, folder: Path) -> tuple[str, bool]:
    """Tries a composition. Returns what was done, and whether the file was taken."""
    contents = rng.sample(CONTENTS, rng.randint(0, 2))
    names = [change.__name__ for change in contents]
    for change in contents:
        tensors = change(tensors, rng)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "usual.safetensors")
    ckptconv.convert(folder / "usual.safetensors", folder / "usual")
    given = tensors
    for change in rng.sample(HARMLESS, rng.randint(1, 3)):
        given, names = change(given, rng), [*names, change.__name__]
    broken = ""
    if rng.random() < 0.25:
        change = rng.choice(BREAKING)
        changed = change(tensors, rng)
        broken = change.__name__ if changed.keys() != tensors.keys() else ""
        given, names = (changed, [*names, broken]) if broken else (given, names)
    file = save(given, folder, rng)
    what = f"{' + '.join(names)} as {file.suffix}"
    try:
        ckptconv.convert(file, folder / "out")
    except CkptconvError as error:
        if not broken:
            raise Difference(f"{what}: refused: {error}") from error
        return what, False
    if broken:
        raise Difference(f"{what}: was taken")
    ours, theirs = weights(folder / "out"), weights(folder / "usual")
    if ours.keys() != theirs.keys() or not all(equal(ours[n], theirs[n]) for n in theirs):
        raise Difference(f"{what}: the weights differ")
    if texts(folder / "out") != texts(folder / "usual"):
        raise Difference(f"{what}: the configurations differ")
    if rng.random() < 0.3 and not (found := ckptconv.verify(file, folder / "out")).passed:
        raise Difference(f"{what}: does not verify: {found.as_data()}")
    ckptconv.export(folder / "out", folder / "back.safetensors")
    if not equal(load_file(folder / "back.safetensors"), given):
        raise Difference(f"{what}: the way back is not exact")
    return what, True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    done: Counter[bool] = Counter()
    findings: list[str] = []
    end = time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for name in ARCHITECTURES:
            files[name] = Path(scratch, f"{name}.safetensors")
            architecture = bundled().architectures[name]
            write_sample(architecture, files[name], layout_of(architecture, dtype="fp16"))
        for number in itertools.count():
            if time.monotonic() > end:
                break
            rng = random.Random(f"{options.seed} {number}")  # noqa: S311
            name = rng.choice(ARCHITECTURES)
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                try:
                    _, taken = attempt(load_file(files[name]), rng, Path(folder))
                    done[taken] += 1
                except Exception as error:  # noqa: BLE001  (every other one is a finding)
                    known = isinstance(error, Difference)
                    text = str(error) if known else traceback.format_exc()
                    findings.append(f"{options.seed} {number} {name}: {text}")
                    sys.stderr.write(findings[-1] + "\n")
    sys.stdout.write(
        f"{done[True]:,} taken, {done[False]:,} refused, findings: {len(findings):,}\n"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
