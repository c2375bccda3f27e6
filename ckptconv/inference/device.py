"""Where a pipeline runs: devices, dtypes, several GPUs, and what to say when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..errors import DeviceError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "check_dtype",
    "free_memory",
    "memory_errors",
    "pick_device",
    "spread",
]

SPARE = 0.15
"""The part of a GPU's free memory that stays free for activations when a model is spread."""


def pick_device(name: str) -> tuple[torch.device, str]:
    """Returns a device and why it was taken.

    Args:
        name: `cuda`, `cuda:1`, `mps`, `cpu`, or `auto` for the first of them that is there.

    Raises:
        UsageError: the name is none of these.
        DeviceError: the machine has no such device.
    """
    import torch

    if name == "auto":
        name = next(kind for kind, count in _counts().items() if count)
        reason = (
            "CUDA and MPS find no GPU"
            if name == "cpu"
            else f"{_title(torch.device(name))} is there"
        )
        return torch.device(name), reason
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in _counts():
        raise UsageError(
            f"device {name!r} is unknown", hint="it is one of auto, cpu, cuda, cuda:1, mps"
        )
    count = _counts()[device.type]
    if (device.index or 0) >= count:
        found = f"finds {count} GPU{'s' * (count > 1)}" if count else "finds no GPU"
        raise DeviceError(
            f"device {name} is not there: {device.type.upper()} {found}",
            hint="take --device cpu, or see in the documentation of PyTorch how to install it for "
            "your GPU; `python -m torch.utils.collect_env` shows what it finds",
        )
    return device, "as asked"


def check_dtype(device: torch.device, dtype: str) -> None:
    """Checks that a device computes in a dtype.

    Args:
        device: from `pick_device`.
        dtype: `fp16`, `bf16` or `fp32`.

    Raises:
        DeviceError: it does not.
    """
    import torch

    from ..dtypes import CASTS as DTYPES
    from ..dtypes import torch_dtype

    if device.type == "cuda":  # asked, not tried: loading the convolution library takes long
        with torch.cuda.device(device):
            able = dtype != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probe = torch.ones(1, 1, 1, 1, device=device, dtype=torch_dtype(DTYPES[dtype]))
        try:
            torch.nn.functional.conv2d(probe, probe)
            able = True
        except (RuntimeError, TypeError):
            able = False
    if not able:
        raise DeviceError(
            f"{_title(device)} does not compute in {dtype}", hint="take --dtype fp16 or fp32"
        )


@contextlib.contextmanager
def memory_errors(doing: str, hint: str) -> Iterator[None]:
    """Turns a lack of memory, on any device, into an error that says what to try.

    Args:
        doing: completes "out of memory while ...".
        hint: what to try.

    Raises:
        DeviceError: the memory ran out.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        first = str(error).partition("\n")[0].strip() or type(error).__name__
        raise DeviceError(f"out of memory while {doing}", problems=[first], hint=hint) from error


def free_memory() -> dict[int, int]:
    """Returns the free bytes of every CUDA GPU, by its index."""
    import torch

    return {n: torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count())}


def spread(
    modules: Mapping[str, nn.Module], dtype: torch.dtype, room: Mapping[int, int]
) -> dict[str, dict[str, int]]:
    """Distributes modules over GPUs: the largest is split, the others lie whole on the first.

    Args:
        modules: by component, on the meta device.
        dtype: of their parameters.
        room: free bytes by the index of the GPU.

    Returns:
        By component, the GPU of each submodule; the name `""` stands for the whole. The
        parts are those that the library keeps whole (`_no_split_modules`), or single layers.

    Raises:
        DeviceError: they do not fit.
    """
    units = {name: dict(_units(module, dtype.itemsize)) for name, module in modules.items()}
    sizes = {name: sum(parts.values()) for name, parts in units.items()}
    largest, first = max(sizes, key=lambda name: sizes[name]), min(room)
    left = {gpu: int(free * (1 - SPARE)) for gpu, free in room.items()}
    left[first] -= sum(size for name, size in sizes.items() if name != largest)
    scale = min(1.0, sizes[largest] / max(1, sum(left.values())))
    shares = {gpu: int(free * scale) for gpu, free in left.items()}
    split = _filled(units[largest], shares, left) or _filled(units[largest], left, left)
    if min(left.values()) < 0 or split is None:
        free = ", ".join(f"{nbytes:,}" for nbytes in room.values())
        raise DeviceError(
            f"out of memory: free on the GPUs are {free} bytes, and the "
            f"weights need {sum(sizes.values()):,}, in blocks that stay whole, with some to spare",
            hint="take a smaller --dtype, or --offload sequential on one GPU",
        )
    return {name: {"": first} for name in sizes} | {largest: split}


def _units(module: nn.Module, width: int) -> Iterator[tuple[str, int]]:
    """Yields names and bytes of the parts of a module that stay whole, in its own order."""
    whole = set(getattr(module, "_no_split_modules", None) or ())

    def walk(part: nn.Module, name: str) -> Iterator[tuple[str, int]]:
        divides = type(part).__name__ not in whole and not list(part.parameters(recurse=False))
        children = list(part.named_children()) if divides else []
        for child, below in children:
            yield from walk(below, f"{name}.{child}" if name else child)
        if not children:
            yield name, sum(p.numel() * width for p in part.parameters())

    yield from walk(module, "")


def _filled(
    units: Mapping[str, int], shares: Mapping[int, int], room: Mapping[int, int]
) -> dict[str, int] | None:
    """Fills the GPUs in turn, each up to its share; None if the units do not fit so."""
    placed: dict[str, int] = {}
    gpus = iter(sorted(room))
    gpu, used = next(gpus), 0
    for name, size in units.items():
        while used >= shares[gpu] or used + size > room[gpu]:
            following = next(gpus, None)
            if following is None:
                return None
            gpu, used = following, 0
        placed[name] = gpu
        used += size
    return placed


def _counts() -> dict[str, int]:
    """Returns how many devices there are of each kind, the preferred kind first."""
    import torch

    mps = torch.backends.mps.is_available()
    return {"cuda": torch.cuda.device_count(), "mps": int(mps), "cpu": 1}


def _title(device: torch.device) -> str:
    import torch

    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"the {device.type.upper()}"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA and XPU have a class for it; the CPU's allocator, MPS and `mmap` have only a text."""
    import torch

    texts = ("out of memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error) for text in texts
    )
