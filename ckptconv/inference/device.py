"""Where a pipeline runs: devices, dtypes, several GPUs, and what to say when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..errors import DeviceError, UsageError, option
from ..libraries import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import nn

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
            hint=f"take {option('device', 'cpu')}, or see in the documentation of PyTorch how to "
            "install it for your GPU; `python -m torch.utils.collect_env` shows what it finds",
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

    from ..dtypes import CASTS, torch_dtype

    if device.type == "cuda":  # asked, not tried: loading the convolution library takes long
        with torch.cuda.device(device):
            able = dtype != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probe = torch.ones(1, 1, 1, 1, device=device, dtype=torch_dtype(CASTS[dtype]))
        try:
            torch.nn.functional.conv2d(probe, probe)
            able = True
        except (RuntimeError, TypeError):
            able = False
    if not able:
        raise DeviceError(
            f"{_title(device)} does not compute in {dtype}",
            hint=f"take {option('dtype', 'fp16')} or fp32",
        )


def less_memory() -> str:
    """Returns what to try when memory runs out."""
    return (
        f"take {option('offload', 'model')}, or {option('offload', 'sequential')} for the least "
        f"memory; {option('dtype', 'fp16')} or bf16 halves the weights of an fp32 file"
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
        if not is_out_of_memory(error):
            raise
        first = str(error).partition("\n")[0].strip() or type(error).__name__
        what = f"out of memory while {doing}"
        raise DeviceError(what, problems=[first], hint=hint, code="out-of-memory") from error


def free_memory() -> dict[int, int]:
    """Returns the free bytes of every CUDA GPU, by its index."""
    import torch

    return {n: torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count())}


def limit_memory(device: torch.device, most: int) -> None:
    """Lets this process take no more of a GPU; what it computes fails instead."""
    import torch

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = min(1.0, most / total)
        torch.cuda.set_per_process_memory_fraction(share, device.index)  # None: the current one


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
    from accelerate import infer_auto_device_map  # type: ignore[import-untyped]  # it has none

    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
        for name, module in modules.items()
    }
    largest, first = max(sizes, key=lambda name: sizes[name]), min(room)
    left = {gpu: int(free * (1 - SPARE)) for gpu, free in room.items()}
    left[first] -= sum(sizes.values()) - sizes[largest]
    share = min(1.0, sizes[largest] / max(1, sum(left.values())))
    whole = list(getattr(modules[largest], "_no_split_modules", None) or ())
    for part in (share, 1.0):  # blocks stay whole, so equal shares may not hold them
        limits: dict[int | str, int] = {gpu: int(part * free) for gpu, free in left.items()}
        # accelerate keeps room for a layer that waits in main memory on the first device, unless
        # that is MPS; here no layer waits.
        limits["mps"] = 0
        split = infer_auto_device_map(modules[largest], limits, whole, dtype)
        if min(left.values()) >= 0 and set(split.values()) <= room.keys():
            return {name: {"": first} for name in sizes} | {largest: dict(split)}
    free = ", ".join(f"{nbytes:,}" for nbytes in room.values())
    raise DeviceError(
        f"out of memory: free on the GPUs are {free} bytes, and the "
        f"weights need {sum(sizes.values()):,}, in blocks that stay whole, with some to spare",
        hint=f"take a smaller {option('dtype')}, or {option('offload', 'sequential')} on one GPU",
    )


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
