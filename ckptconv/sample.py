"""Synthetic checkpoints in the original layout: what a CI without weights needs.

A sample has the keys of the published file. In full size it has its shapes too; a small one
divides the widths and leaves out repeated layers, so that it converts and runs in seconds. Values
are random, of a scale at which a forward pass stays finite; noise schedules are the real ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .destination import Destination
from .dtypes import BITS, CASTS, FLOATS, cast_name
from .errors import UsageError
from .maps.architecture import Architecture
from .reading.header import encode_header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape."""

POOL = 1 << 22
"""Random values that are drawn once; every tensor is a stretch of them, from its own offset."""
NARROW = 128
"""Shorter axes are not widths (kernels, latents, positions): a small sample keeps them."""
NOT_WIDTHS = {1000, 49408}
"""Nor are these: the steps of the noise schedule, and the vocabulary."""


@dataclass(frozen=True, slots=True)
class Sample:
    """`sample.yaml`: how to shrink the published layout to a small model."""

    divides: Mapping[str, int]
    metadata: Mapping[str, str] = field(default_factory=dict)
    exact: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    repeats: Mapping[str, int] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)


def layout_of(
    architecture: Architecture,
    *,
    task: str | None = None,
    full: bool = False,
    dtype: str | None = None,
    ema: bool = False,
) -> list[Tensor]:
    """Returns the tensors of a sample.

    Args:
        architecture: which published layout to follow.
        task: name of the task, which sets the UNet's input channels; the published file's by
            default.
        full: the published widths and depths.
        dtype: `fp16`, `bf16`, `fp32` or `fp8` for the weights; the published one by default.
        ema: add an EMA copy of the UNet.

    Raises:
        UsageError: the architecture does not have this task, or the dtype is unknown.
    """
    cast = CASTS[cast_name(dtype)] if dtype else None
    channels = {t.name: t.channels for t in architecture.tasks if architecture.shows(t)}
    roots = {prefix + architecture.root for prefix in architecture.prefixes}
    if task is not None and task not in channels:
        raise UsageError(
            f"{architecture.name} has no task {task!r}", hint=f"its tasks are {', '.join(channels)}"
        )
    spec = _spec(architecture)
    published = architecture.layout(task or "").tensors
    last: dict[str, int] = {}
    for before, index, _ in filter(None, (_layer(k, c) for c in spec.repeats for k in published)):
        last[before] = max(index, last.get(before, 0))
    tensors = []
    for name, info in published.items():
        key, shape, kind = name, info.shape, info.dtype
        prefix = next((p for p in spec.divides if name.startswith(p)), None)
        if prefix is not None and cast and kind in FLOATS:
            kind = cast
        if not full:
            if (kept := _kept(name, spec.repeats, last)) is None:
                continue
            key = kept
            if prefix is not None:
                exact = spec.exact.get(prefix, {})
                shape = tuple(exact.get(n) or _shrunk(n, spec.divides[prefix]) for n in shape)
        if key in roots and task and (count := channels[task]):
            shape = (shape[0], count, *shape[2:])
        tensors.append((key, kind, shape))
    if ema:
        copied = [t for t in tensors if t[0].startswith("model.diffusion_model.")]
        tensors += [
            ("model_ema." + k[len("model.") :].replace(".", ""), d, s) for k, d, s in copied
        ]
        tensors += [("model_ema.decay", "F32", ()), ("model_ema.num_updates", "I32", ())]
    return sorted(tensors)


def write_sample(
    architecture: Architecture,
    path: Path,
    tensors: list[Tensor],
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> int:
    """Writes a sample and returns its size in bytes. The same seed gives the same file.

    Args:
        architecture: whose sample it is.
        path: the file to make.
        tensors: from `layout_of`.
        seed: of the random values.
        overwrite: replace a file that is there.
        progress: is called with bytes written and bytes in all.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    spec = _spec(architecture)
    # Wide dtypes first, so that every tensor is aligned to its elements.
    ordered = sorted(tensors, key=lambda t: -BITS[t[1]])
    beginning, infos = encode_header(ordered, spec.metadata)
    total = max([len(beginning), *(info.end for info in infos.values())])
    with Destination(path, overwrite).new() as hidden, hidden.open("xb") as out:
        done = out.write(beginning)
        for data in _values(ordered, seed, spec.spread):
            done += out.write(data)
            progress(done, total)
    return total


def _spec(architecture: Architecture) -> Sample:
    return architecture.maps.typed(Sample, f"{architecture.name}/sample")


def _kept(key: str, repeats: Mapping[str, int], last: Mapping[str, int]) -> str | None:
    """Returns the name that a key has in a small sample; None if its layer is left out.

    Of the layers of a container the first are kept, and the very last, which may differ.
    """
    for container, count in repeats.items():
        if found := _layer(key, container):
            before, index, after = found
            if count < last[before] + 1:
                if index == last[before] and count > 1:
                    return f"{before}{count - 1}{after}"
                if index >= max(count - 1, 1):
                    return None
    return key


def _layer(key: str, container: str) -> tuple[str, int, str] | None:
    """Returns what stands before and after the index into a container, and the index."""
    before, found, rest = f".{key}".rpartition(f".{container}.")
    index, _, after = rest.partition(".")
    if not (found and index.isdigit()):
        return None
    return f"{before}{found}"[1:], int(index), f".{after}"


def _shrunk(width: int, divisor: int) -> int:
    return width if width < NARROW or width in NOT_WIDTHS else width // divisor


def _values(tensors: list[Tensor], seed: int, spread: Mapping[str, float]) -> Iterator[bytes]:
    import numpy as np

    normal = np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32)
    schedule = _schedule()
    for key, dtype, shape in tensors:
        count = int(np.prod(shape, dtype=np.int64))
        if key in schedule:
            yield _encoded(np.resize(schedule[key], count).astype(np.float32), dtype)
        elif key.endswith("position_ids"):
            yield _encoded(np.arange(count), dtype)
        elif dtype not in FLOATS or key.endswith(("logit_scale", "model_ema.decay")):
            yield _encoded(np.full(count, 4.6052 if "scale" in key else 0.9999), dtype)
        else:
            scale, offset = _scale(key, shape)
            scale = spread.get(key, scale)
            first = zlib.crc32(f"{seed} {key}".encode()) % POOL
            while count:
                part = normal[first : first + count]
                yield _encoded(part * np.float32(scale) + np.float32(offset), dtype)
                count -= len(part)
                first = 0


def _scale(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Returns standard deviation and mean at which activations neither vanish nor explode."""
    if len(shape) <= 1:
        return (0.05, 1.0) if key.endswith("weight") else (0.02, 0.0)
    if "embedding" in key:
        return 0.02, 0.0
    fan_in = 1
    for n in shape[1:]:
        fan_in *= n
    return fan_in**-0.5, 0.0


def _encoded(values: Any, dtype: str) -> bytes:
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32, rounded to nearest, ties to even
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return bytes((bits >> 16).astype(np.uint16).tobytes())
    names = {"F16": "f2", "F32": "f4", "F64": "f8", "I64": "i8", "I32": "i4", "U8": "u1"}
    return bytes(values.astype(f"<{names[dtype]}").tobytes())


def _schedule() -> dict[str, Any]:
    """Returns the buffers of the published noise schedule, as LDM and SGM save them.

    Betas are the squares of 1,000 steps from sqrt(0.00085) to sqrt(0.012); the posterior is that
    of https://arxiv.org/abs/2006.11239, equation 7.
    """
    import numpy as np

    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    before = np.append(1.0, kept[:-1])
    variance = betas * (1 - before) / (1 - kept)
    return {
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "betas": betas,
        "denoiser.sigmas": ((1 - kept) / kept) ** 0.5,
        "log_one_minus_alphas_cumprod": np.log(1 - kept),
        "logvar": np.zeros(1000),
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * before**0.5 / (1 - kept),
        "posterior_mean_coef2": (1 - before) * (1 - betas) ** 0.5 / (1 - kept),
        "posterior_variance": variance,
        "sqrt_alphas_cumprod": kept**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - kept) ** 0.5,
        "sqrt_recip_alphas_cumprod": kept**-0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / kept - 1) ** 0.5,
    }
