"""Devices are found, checked, and blamed in words; models that outgrow a GPU are spread."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckptconv import CkptconvError, load_pipeline
from ckptconv.detection.detect import detect
from ckptconv.errors import DeviceError, UsageError
from ckptconv.inference.device import (
    check_dtype,
    limit_memory,
    memory_errors,
    pick_device,
    spread,
)
from ckptconv.maps.architecture import bundled
from ckptconv.planning.plan import build_plan
from tests.conftest import Sample
from tests.support.pipelines import empty

NOTHING = {"cuda": 0, "mps": 0, "cpu": 1}


def having(monkeypatch: pytest.MonkeyPatch, **counts: int) -> None:
    monkeypatch.setattr("ckptconv.inference.device._counts", lambda: {**NOTHING, **counts})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Test GPU")


@pytest.mark.parametrize(
    ("counts", "device", "reason"),
    [
        ({}, "cpu", "CUDA and MPS find no GPU"),
        ({"mps": 1}, "mps", "the MPS is there"),
        ({"cuda": 2, "mps": 1}, "cuda", "Test GPU is there"),
    ],
)
def test_auto_takes_the_first_that_is_there_and_says_why(
    counts: dict[str, int], device: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    having(monkeypatch, **counts)
    assert pick_device("auto") == (torch.device(device), reason)


def test_a_device_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch, cuda=2)
    assert pick_device("cuda:1") == (torch.device("cuda:1"), "as asked")
    assert pick_device("cpu") == (torch.device("cpu"), "as asked")
    with pytest.raises(DeviceError, match="cuda:2 is not there: CUDA finds 2 GPUs"):
        pick_device("cuda:2")


def test_without_a_gpu_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch)
    for name in ("cuda", "mps"):
        with pytest.raises(
            DeviceError, match=f"{name} is not there: {name.upper()} finds no GPU"
        ) as e:
            pick_device(name)
        assert "device='cpu'" in e.value.hint


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cuda:x"])
def test_an_unknown_device_is_wrong_usage(name: str) -> None:
    with pytest.raises(UsageError, match="is unknown"):
        pick_device(name)


def test_a_dtype_that_the_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ("fp16", "bf16", "fp32"):
        check_dtype(torch.device("cpu"), dtype)

    def lacking(*_: Any) -> None:
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.functional, "conv2d", lacking)
    with pytest.raises(DeviceError, match="the CPU does not compute in fp16") as caught:
        check_dtype(torch.device("cpu"), "fp16")
    assert "dtype='fp16'" in caught.value.hint


def test_a_dtype_is_checked_before_anything_is_read(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def lacking(device: torch.device, dtype: str) -> None:
        asked.append((device.type, dtype))
        raise DeviceError("the CPU does not compute in it")

    monkeypatch.setattr("ckptconv.inference.pipeline.check_dtype", lacking)
    monkeypatch.setattr("ckptconv.inference.pipeline.fill", None)
    for dtype in (None, "bf16"):
        with pytest.raises(DeviceError, match="does not compute"):
            load_pipeline(sample("sdxl"), device="cpu", dtype=dtype)
    assert asked == [("cpu", "fp16"), ("cpu", "bf16")]


@pytest.mark.parametrize("able", [True, False])
def test_an_older_gpu_lacks_bf16_only(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    having(monkeypatch, cuda=1)
    monkeypatch.setattr(torch.cuda, "device", memory_nothing)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    for dtype in ("fp16", "fp32"):
        check_dtype(torch.device("cuda"), dtype)
    if able:
        check_dtype(torch.device("cuda"), "bf16")
    else:
        with pytest.raises(DeviceError, match="Test GPU does not compute in bf16"):
            check_dtype(torch.device("cuda"), "bf16")


class memory_nothing:  # noqa: N801  (stands for torch.cuda.device)
    """A context that does nothing."""

    def __init__(self, _device: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(("name", "index"), [("cuda", 2), ("cuda:1", 1), ("cpu", None)])
def test_memory_is_limited_on_the_device_in_use(
    name: str, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[float, int]] = []
    total = SimpleNamespace(total_memory=8 * 10**9)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: total)
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda *words: limits.append(words), raising=False
    )
    limit_memory(torch.device(name), 2 * 10**9)
    assert limits == ([] if index is None else [(0.25, index)])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_is_an_error_with_a_hint(error: Exception) -> None:
    with pytest.raises(DeviceError, match="out of memory while testing") as caught:  # noqa: SIM117
        with memory_errors("testing", "buy more"):
            raise error
    assert caught.value.hint == "buy more"
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shape"), FileNotFoundError("x"), KeyError("y")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), memory_errors("testing", ""):
        raise error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offload": "model"}, "offload needs a GPU, and the device is cpu"),
        ({"device_map": "balanced"}, "a device map needs CUDA, not cpu"),
        ({"offload": "disk"}, "offload 'disk' is unknown"),
        ({"device_map": "auto"}, "device map 'auto' is unknown"),
        ({"offload": "model", "device_map": "balanced"}, "exclude each other"),
    ],
)
def test_placements_that_cannot_be(arguments: dict[str, str], message: str, sample: Sample) -> None:
    with pytest.raises(CkptconvError, match=message):
        load_pipeline(sample("sd1"), device="cpu", **arguments)  # type: ignore[arg-type]


def test_a_lack_of_memory_while_loading(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("ckptconv.inference.pipeline.fill", full)
    with pytest.raises(DeviceError, match="out of memory while loading") as caught:
        load_pipeline(sample("sd1"), device="cpu")
    assert "offload='model'" in caught.value.hint


def sdxl() -> dict[str, torch.nn.Module]:
    """The modules of SDXL in full size, on the meta device."""
    made = build_plan(detect(bundled().architectures["sdxl"].layout()))
    return {name: empty(made, name) for name in ("unet", "vae", "text_encoder_2")}


def test_a_model_that_outgrows_one_gpu_is_spread() -> None:
    modules = sdxl()
    room = {0: 5_000_000_000, 1: 5_000_000_000}
    placed = spread(modules, torch.float16, room)
    assert placed["vae"] == placed["text_encoder_2"] == {"": 0}
    used = dict.fromkeys(room, 0)
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            parts = [p for p in placed[name] if p == "" or key == p or key.startswith(p + ".")]
            assert len(parts) == 1, key
            used[placed[name][parts[0]]] += parameter.numel() * 2
    assert all(0.2 * room[gpu] < used[gpu] < 0.85 * room[gpu] for gpu in room)
    inside = [part for part in placed["unet"] if part.startswith("up_blocks.0.")]
    assert not inside, "a block that the library keeps whole is split"


@pytest.mark.slow
def test_a_model_that_outgrows_all_gpus_is_refused() -> None:
    rooms: list[dict[int, int]] = [
        {0: 2_000_000_000, 1: 2_000_000_000},
        {0: 1_000_000_000, 1: 9_000_000_000},  # the first has no room for what stays whole
        {0: 7_000_000_000},  # nothing would be left to compute in
    ]
    for room in rooms:
        with pytest.raises(DeviceError, match="out of memory: free on the GPUs are"):
            spread(sdxl(), torch.float16, room)


def test_on_one_gpu_with_room_everything_is_whole() -> None:
    placed = spread(sdxl(), torch.float16, {0: 80_000_000_000})
    assert {gpu for parts in placed.values() for gpu in parts.values()} == {0}
