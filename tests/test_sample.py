"""Synthetic checkpoints have the keys of the published files, and values that run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ckptconv.detection.detect import inspect
from ckptconv.dtypes import FLOATS
from ckptconv.errors import OutputError, UsageError
from ckptconv.maps.architecture import Architecture, bundled
from ckptconv.planning.plan import build_plan
from ckptconv.reading.header import read_header
from ckptconv.sample import Sample as Spec
from ckptconv.sample import Tensor, _encoded, layout_of, write_sample
from tests.conftest import Sample
from tests.support.checkpoints import metadata, raw

ARCHITECTURES = bundled().architectures
UNET = "model.diffusion_model."


def _few(architecture: Architecture) -> list[Tensor]:
    """Returns some of a sample's tensors, of every kind."""
    return [t for t in layout_of(architecture) if "input_blocks.1." in t[0] or "." not in t[0]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_full_sample_has_the_published_header(name: str) -> None:
    published = ARCHITECTURES[name].layout().tensors
    full = {key: (dtype, shape) for key, dtype, shape in layout_of(ARCHITECTURES[name], full=True)}
    assert full == {key: (info.dtype, info.shape) for key, info in published.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_small_sample_has_the_published_keys_but_for_repeated_layers(name: str) -> None:
    published = ARCHITECTURES[name].layout().tensors
    small = {key: (dtype, shape) for key, dtype, shape in layout_of(ARCHITECTURES[name])}
    for key, (dtype, shape) in small.items():
        assert (dtype, len(shape)) == (published[key].dtype, len(published[key].shape))
        assert all(0 < n <= m for n, m in zip(shape, published[key].shape, strict=True))
    gone = published.keys() - small.keys()
    containers = bundled().typed(Spec, f"{name}/sample").repeats
    assert all(any(f"{word}." in key for word in containers) for key in gone)


@pytest.mark.parametrize(
    ("name", "task"),
    [(a.name, t.name) for a in ARCHITECTURES.values() for t in a.tasks if a.shows(t)],
)
def test_a_sample_is_what_it_was_asked_to_be_and_converts(
    name: str, task: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    layout = layout_of(ARCHITECTURES[name], task=task, dtype="fp16")
    write_sample(ARCHITECTURES[name], path, layout)
    detection = inspect(path)
    architecture, found = detection.require()
    assert (architecture.name, found.name) == (name, task)
    build_plan(detection).require_complete()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["sd1"]
    layout = _few(architecture)
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for path, seed in zip(paths, (5, 5, 6), strict=True):
        assert write_sample(architecture, path, layout, seed=seed) == path.stat().st_size
    assert paths[0].read_bytes() == paths[1].read_bytes()
    one, other = raw(paths[0]), raw(paths[2])
    assert one.keys() == other.keys()
    changed = {key for key in one if one[key] != other[key]}
    assert changed == {key for key in one if key.startswith(UNET)}  # schedules stay


def test_values_are_finite_of_a_sensible_scale_and_unlike_each_other(sample: Sample) -> None:
    tensors = load_file(sample("sd1", dtype="fp16"))
    assert all(np.isfinite(value).all() for value in tensors.values())
    weights = [
        value.astype(np.float32)
        for key, value in tensors.items()
        if key.startswith(UNET) and value.ndim > 1 and value.size > 2000
    ]
    assert len(weights) > 100
    for value in weights:
        fan_in = value[0].size
        assert 0.8 < value.std() * fan_in**0.5 < 1.2
    assert len({value.tobytes() for value in weights}) == len(weights)


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", "F16"), ("bf16", "BF16"), ("fp32", "F32")])
def test_dtype_is_that_of_the_weights_and_not_of_the_buffers(dtype: str, stored: str) -> None:
    found = {key: kind for key, kind, _ in layout_of(ARCHITECTURES["sd1"], dtype=dtype)}
    assert found["alphas_cumprod"] == "F32"
    assert found["cond_stage_model.transformer.text_model.embeddings.position_ids"] == "I64"
    weights = {kind for key, kind in found.items() if key.startswith((UNET, "first_stage_model."))}
    assert weights == {stored} < FLOATS


def test_bf16_values_are_the_fp32_ones_rounded(tmp_path: Path) -> None:
    import torch

    architecture = ARCHITECTURES["sd1"]
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    layout = [t for t in _few(architecture) if t[0].startswith(UNET)]
    write_sample(architecture, wide, layout)
    write_sample(architecture, narrow, [(key, "BF16", shape) for key, _, shape in layout])
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 65504, 1e-40], np.float32)
    assert (
        _encoded(ties, "BF16")
        == torch.from_numpy(ties).bfloat16().view(torch.uint8).numpy().tobytes()
    )
    rounded = raw(narrow)
    for key, (_, _, data) in raw(wide).items():
        value = torch.frombuffer(bytearray(data), dtype=torch.float32).bfloat16()
        assert rounded[key][2] == value.view(torch.uint8).numpy().tobytes()


def test_ema_adds_a_copy_of_every_tensor_of_the_unet_with_its_own_values(sample: Sample) -> None:
    tensors = raw(sample("sd1", ema=True))
    own = {key: value for key, value in tensors.items() if key.startswith(UNET)}
    for key, (dtype, shape, data) in own.items():
        copy = tensors["model_ema." + key.removeprefix("model.").replace(".", "")]
        assert copy[:2] == (dtype, shape)
        assert copy[2] != data
    assert tensors["model_ema.decay"][:2] == ("F32", ())
    assert tensors["model_ema.num_updates"][:2] == ("I32", ())
    assert len([key for key in tensors if key.startswith("model_ema.")]) == len(own) + 2


def test_the_noise_schedule_is_that_of_diffusers(sample: Sample) -> None:
    import diffusers

    schedulers: Any = diffusers  # theirs are untyped
    tensors = load_file(sample("sd1"))
    published = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = schedulers.DDPMScheduler(**published)
    kept = scheduler.alphas_cumprod.double().numpy()
    betas = scheduler.betas.double().numpy()
    before = np.append(1.0, kept[:-1])
    for key, wanted in {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": kept**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - kept) ** 0.5,
        "log_one_minus_alphas_cumprod": np.log(1 - kept),
        "sqrt_recip_alphas_cumprod": (1 / kept) ** 0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / kept - 1) ** 0.5,
        "posterior_mean_coef1": betas * before**0.5 / (1 - kept),
        "posterior_mean_coef2": (1 - before) * (1 - betas) ** 0.5 / (1 - kept),
    }.items():
        assert tensors[key].shape == (1000,)
        assert np.allclose(tensors[key], wanted, rtol=1e-4)
    variance = [float(scheduler._get_variance(t)) for t in range(1000)]
    assert np.allclose(tensors["posterior_variance"][1:], variance[1:], rtol=1e-4)
    log = np.log(np.maximum(tensors["posterior_variance"].astype(np.float64), 1e-20))
    assert np.allclose(tensors["posterior_log_variance_clipped"], log, rtol=1e-4)
    sigmas = load_file(sample("sdxl"))["denoiser.sigmas"].astype(np.float64)
    theirs = schedulers.EulerDiscreteScheduler(**published).sigmas.numpy()[:-1][::-1]
    assert np.allclose(sigmas, theirs, rtol=2e-3)  # the file holds float16


def test_the_metadata_are_those_of_a_published_file(sample: Sample) -> None:
    said = metadata(sample("sdxl"))
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata(sample("sd1")) == {}


def test_progress_ends_with_the_size(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    architecture = ARCHITECTURES["sd1"]
    path = tmp_path / "s.safetensors"
    size = write_sample(
        architecture, path, _few(architecture), progress=lambda *pair: calls.append(pair)
    )
    assert calls[-1] == (size, size)
    assert size == read_header(path).size
    assert {total for _, total in calls} == {size}


def test_a_task_or_dtype_that_is_unknown_is_refused() -> None:
    with pytest.raises(UsageError, match="sdxl has no task 'depth-to-image'") as caught:
        layout_of(ARCHITECTURES["sdxl"], task="depth-to-image")
    assert caught.value.hint == "its tasks are text-to-image, inpainting, instruct-pix2pix"
    with pytest.raises(UsageError, match="dtype 'fp64' is unknown") as caught:
        layout_of(ARCHITECTURES["sdxl"], dtype="fp64")
    assert caught.value.hint == "it is one of fp16, bf16, fp32, fp8"


def test_a_file_that_is_there_is_replaced_on_demand_only(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["sd1"]
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists") as caught:
        write_sample(architecture, path, _few(architecture))
    assert "overwrite=True replaces it" in caught.value.hint
    assert path.read_bytes() == b"precious"
    write_sample(architecture, path, _few(architecture), overwrite=True)
    assert read_header(path).size == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "said"),
    [("/dev/null/s.safetensors", "null: is not a folder"), ("x" * 300, "File name too long")],
)
def test_a_place_that_cannot_be_written_is_refused(name: str, said: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES["sd1"]
    with pytest.raises(OutputError, match=said):
        write_sample(architecture, tmp_path / name, _few(architecture))
    assert not any(tmp_path.iterdir())


def test_a_failure_midway_leaves_nothing(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["sd1"]
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"precious")

    def fail(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sample(architecture, path, _few(architecture), overwrite=True, progress=fail)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert path.read_bytes() == b"precious"
