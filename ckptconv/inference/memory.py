"""Which settings keep a pipeline within an amount of memory.

Weights are counted in the headers. For what layers compute there is an allowance, which
`tests/inference/test_memory.py` compares with what the networks of every family allocate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..dtypes import BITS, CASTS, COMPUTED, FLOATS, FP8, nbytes
from ..errors import DeviceError, UsageError, option
from ..planning.precision import dtype_of
from .generation import Settings, scale_of
from .model import Model
from .pipeline import NETWORKS, with_fp32
from .quantized import keeps_blocks

if TYPE_CHECKING:
    from PIL import Image

NETWORK = 20_000
"""Numbers that a UNet or transformer allocates for each position of the latents, guidance included.
Counted: 16,700 in SD1, 14,900 in FLUX.1, 10,400 in SD3, 10,100 in SDXL."""

DECODER = 1_000
"""Numbers that a VAE allocates for each pixel that it decodes. Counted: 768 in all families."""

TILE = 512
"""Width of the tiles in which a VAE decodes, in pixels, with VAE tiling."""

BESIDE = {"cpu": 1_500_000_000, "cuda": 800_000_000, "mps": 800_000_000}
"""Bytes that Python and the libraries take, or the driver and the kernels on a GPU."""

NARROW = "bf16"
"""What weights in fp32 become where they do not fit: it has their range."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a pipeline; None and False leave a thing out."""

    dtype: str
    storage: str | None = None
    offload: str | None = None
    tiling: bool = False

    def __str__(self) -> str:
        parts: dict[str, object] = {
            f"weights in {self.storage}": self.storage,
            f"{self.offload} offload": self.offload,
        }
        parts["VAE tiling"] = self.tiling
        return ", ".join([self.dtype, *(text for text, value in parts.items() if value)])


WAYS = (
    Setting(""),
    Setting("", tiling=True),
    Setting("", offload="model"),
    Setting("", offload="model", tiling=True),
    Setting("", storage=FP8, tiling=True),
    Setting("", storage=FP8, offload="model", tiling=True),
    Setting("", offload="sequential", tiling=True),
    Setting("", storage=FP8, offload="sequential", tiling=True),
)
"""From the fastest to the smallest, for every dtype; fp8 comes after what costs no precision. The
last is no smaller than the one before it, so it is chosen only where fp8 is asked for."""

LACKS = {"cpu": ("offload", "{} offload needs a GPU"), "mps": ("storage", "MPS has no {}")}
"""By device, the field of a setting that it cannot have, and why."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a component is.

    Attributes:
        loaded: bytes as loaded.
        numbers: of its tensors.
        narrow: those that fp8 stores.
        largest: those of the largest tensor.
    """

    loaded: int = 0
    numbers: int = 0
    narrow: int = 0
    largest: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """What is to run.

    Attributes:
        sizes: by component.
        dtype: that the sizes are loaded in.
        pixels: of the image.
        scale: pixels along the edge of one position of the latents.
        upcast: the VAE computes in fp32 where all else is fp16.
        device: `cuda`, `mps` or `cpu`.
        fp8: whether weights may be kept in it; not beside a LoRA.
    """

    sizes: Mapping[str, Size]
    dtype: str
    pixels: int
    scale: int = 8
    upcast: bool = False
    device: str = "cuda"
    fp8: bool = True


def job_of(model: Model, size: tuple[int, int], device: str) -> Job:
    """Measures a model by its headers.

    Args:
        model: from `open_model`.
        size: width and height of the image.
        device: its type.
    """
    network = next((name for name in NETWORKS if name in model.blueprints), "")
    found: dict[str, Size] = defaultdict(Size)
    steps = with_fp32(model) if model.dtype == "fp16" else model.steps
    targets = [target for step in steps for target in step.targets]
    kept = {  # that stay quantized; an embedding would be counted too small
        target: step.sources[0].dtype
        for step in steps
        if keeps_blocks(step)
        for target in step.targets
        if target.component == network
    }
    for target in (*targets, *model.identities):
        if target.component not in model.blueprints:
            continue
        count, old = math.prod(target.shape), found[target.component]
        narrow = target.dtype in FLOATS and dtype_of(target, FP8, network) == CASTS[FP8]
        found[target.component] = Size(
            old.loaded + nbytes(count, kept.get(target, target.dtype)),
            old.numbers + count,
            old.narrow + count * narrow,
            max(old.largest, count),
        )
    blocks = model.entry("vae/block_out_channels") or [0] * 4
    upcast = bool(model.entry("vae/force_upcast"))
    pixels = size[0] * size[1]
    return Job(dict(found), model.dtype, pixels, 2 ** (len(blocks) - 1), upcast, device)


def size_of_result(
    model: Model, settings: Settings, images: Mapping[str, Image.Image]
) -> tuple[int, int]:
    """Returns the width and height of the image that settings make."""
    times = scale_of(str(model.index.get("_class_name")))
    edge = 8 * (model.entry("unet/sample_size") or 128)  # of a transformer, its pipeline says 128
    image = images.get("image")
    return settings.size or (
        (image.width * times, image.height * times) if image and times else (edge, edge)
    )


def peak(setting: Setting, job: Job) -> int:
    """Estimates the bytes that are on the device at once, at most."""
    width = BITS[COMPUTED[setting.dtype]] // 8
    weights = {
        name: size.loaded
        if setting.dtype == job.dtype and not setting.storage
        else size.numbers * width - (size.narrow * (width - 1) if setting.storage else 0)
        for name, size in job.sizes.items()
    }
    decoded = min(job.pixels, TILE * TILE) if setting.tiling else job.pixels
    decoding = width
    if setting.dtype == "fp16" and job.upcast:
        decoding = 4
        weights["vae"] = weights.get("vae", 0) * 2
    computed = dict.fromkeys(NETWORKS, NETWORK * job.pixels // job.scale**2 * width)
    computed["vae"] = DECODER * decoded * decoding
    most = max(n for name, n in computed.items() if name in job.sizes or name == "vae")
    if setting.offload == "sequential":
        weighing = max(size.largest for size in job.sizes.values()) * width + most
    elif setting.offload:
        weighing = max(n + computed.get(name, 0) for name, n in weights.items())
    else:
        weighing = sum(weights.values()) + most
    return weighing + BESIDE[job.device]


def choose(job: Job, room: int, asked: Setting | None = None) -> tuple[Setting, str]:
    """Chooses the fastest setting that fits.

    Args:
        job: what is to run.
        room: bytes of memory.
        asked: what the caller decided, of which None and False and an empty dtype leave the choice.

    Returns:
        The setting, and why it was chosen.

    Raises:
        DeviceError: none fits; the smallest is named.
        UsageError: the device lacks what was asked for.
    """
    lacking, why = LACKS.get(job.device, ("", ""))
    if asked and (value := getattr(asked, lacking, None)):
        raise UsageError(
            f"{why.format(value)}, and the device is {job.device}",
            hint=f"leave out {option(lacking)}",
        )
    tried: list[tuple[int, Setting]] = []
    for setting in _candidates(job, asked or Setting("")):
        needed = peak(setting, job)
        if needed <= room:
            why = f"takes about {_gb(needed)} of {_gb(room)}"
            if tried:
                more, nearest = min(tried, key=lambda each: each[0])
                why += f"; {nearest} would take {_gb(more)}"
            return setting, why
        tried.append((needed, setting))
    needed, setting = min(tried, key=lambda each: each[0])
    enough = math.ceil(needed / 1e8) / 10
    raise DeviceError(
        f"{_gb(room)} of memory is too little: the smallest setting, {setting}, takes about "
        f"{_gb(needed)}",
        hint=f"{option('memory', f'{enough:g}GB')} would do; a smaller {option('size')} takes less",
    )


def tile_vae(pipe: Any) -> None:
    """Lets the VAE of a pipeline decode in tiles, which by default are as large as an image."""
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size = TILE
    pipe.vae.tile_latent_min_size = TILE // 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def _candidates(job: Job, asked: Setting) -> Iterator[Setting]:
    first = asked.dtype or job.dtype
    dtypes = (first, NARROW) if first == "fp32" and not asked.dtype else (first,)
    for dtype in dtypes:
        for way in WAYS:
            wanted = replace(way, dtype=dtype, tiling=way.tiling or asked.tiling)
            costly = way.offload or way.storage
            lacking, _ = LACKS.get(job.device, ("", ""))
            lacks = getattr(way, lacking, None) or (way.storage and not job.fp8)
            if lacks or (costly and dtype != dtypes[-1]):
                continue
            if all(
                not getattr(asked, name) or getattr(asked, name) == getattr(way, name)
                for name in ("storage", "offload")
            ):
                yield wanted


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
