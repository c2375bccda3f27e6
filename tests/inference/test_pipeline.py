"""A pipeline loaded from the file is that of the converted folder, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv import CkptconvError, load_pipeline
from ckptconv.errors import FileRefused, Incomplete, UsageError
from ckptconv.maps.architecture import bundled
from tests.conftest import Folder, Sample
from tests.support.checkpoints import rewritten
from tests.support.pipelines import TASKS, assert_same, modules, tensors
from tests.support.qwen import tokenizers

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
}
"""Of the attention in a VAE, before release 0.17 of diffusers: many donors still have them."""


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Gives what the libraries warn of; their loggers pass nothing on by themselves.

    Without torchvision, diffusers itself says on its import what only commands keep quiet.
    """
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "accelerate")]
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: "requires torchvision" not in record.getMessage())
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "task"), [(name, task.name) for name, task in TASKS])
def test_every_task_is_bit_identical_to_the_converted_folder(
    architecture: str, task: str, sample: Sample, tmp_path: Path, said: list[str]
) -> None:
    file = sample(architecture, task=task)
    given: dict[str, Any] = {**tokenizers(architecture, tmp_path)}
    ckptconv.convert(file, tmp_path / "out", **given)
    ours = load_pipeline(file, device="cpu", **given)
    assert_same(ours, load_pipeline(tmp_path / "out", device="cpu"))
    assert said == [], "a library found something wrong with a configuration"
    known = {t.name: t.pipeline for t in bundled().architectures[architecture].tasks}
    assert type(ours).__name__ == known[task]
    assert {
        tensor.device for module in modules(ours).values() for _, tensor in tensors(module)
    } == {CPU}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("sd1", "fp16"),
        ("sdxl", "fp32"),
        ("sdxl-refiner", "bf16"),
        *(("flux", dtype) for dtype in ("fp16", "fp32", "bf16")),
        ("chroma", "fp16"),
        ("z-image", "bf16"),
    ],
)
def test_a_cast_is_bit_identical_to_the_converted_folder(
    architecture: str, dtype: str, sample: Sample, tmp_path: Path
) -> None:
    file = sample(architecture)
    given: dict[str, Any] = {**tokenizers(architecture, tmp_path)}
    ckptconv.convert(file, tmp_path / "out", dtype=dtype, **given)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    ours = load_pipeline(file, device="cpu", dtype=dtype, **given)
    t5 = architecture in ("flux", "chroma") and dtype == "fp16"  # some of its layers stay wide
    held = {p.dtype for m in modules(ours).values() for p in m.parameters()}
    assert held == ({kind, torch.float32} if t5 else {kind})
    # Not through `load_pipeline`, so that no fault of ours can hide on both sides.
    theirs = type(ours).from_pretrained(tmp_path / "out", torch_dtype=kind, local_files_only=True)
    assert_same(ours, theirs)


@pytest.mark.slow
def test_the_ema_copy_is_loaded_if_asked(sample: Sample, tmp_path: Path) -> None:
    file = sample("sd1", ema=True)
    ckptconv.convert(file, tmp_path / "out", ema=True)
    ours = load_pipeline(file, device="cpu", ema=True)
    assert_same(ours, load_pipeline(tmp_path / "out", device="cpu"))
    plain = load_pipeline(file, device="cpu")
    assert not torch.equal(ours.unet.conv_in.weight, plain.unet.conv_in.weight)


@pytest.mark.slow
@pytest.mark.parametrize("own", [name for name, task in bundled().pipelines.items() if task.also])
def test_the_same_weights_do_other_tasks(own: str, sample: Sample, tmp_path: Path) -> None:
    architecture, made = next(
        (a, task)
        for a in bundled().architectures.values()
        for task in a.tasks
        if task.pipeline == own
    )
    given: dict[str, Any] = {"device": "cpu", **tokenizers(architecture, tmp_path)}
    given |= {name: values[0] for name, values in made.facts.items()}
    file = sample(architecture.name)
    plain = load_pipeline(file, **given)
    assert type(plain).__name__ == own
    for task, name in bundled().pipelines[own].also.items():
        pipe = load_pipeline(file, task=task, **given)
        assert type(pipe).__name__ == name
        state, same = (getattr(each, architecture.main).state_dict() for each in (pipe, plain))
        assert all(torch.equal(tensor, same[key]) for key, tensor in state.items())
        assert pipe.config.get("requires_safety_checker") in (None, False)
        for key in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"):
            if key in architecture.index and key in pipe.config:
                assert pipe.config[key] == architecture.index[key]


@pytest.mark.parametrize(
    ("architecture", "made", "asked"),
    [
        ("sd1", "inpainting", "text-to-image"),
        ("sdxl", "instruct-pix2pix", "inpainting"),
        ("sdxl-refiner", "image-to-image", "text-to-image"),
    ],
)
def test_a_task_that_the_weights_cannot_do_is_refused(
    architecture: str, made: str, asked: str, sample: Sample
) -> None:
    with pytest.raises(UsageError, match=f"made for {made}, and cannot do {asked}") as caught:
        load_pipeline(sample(architecture, task=made), device="cpu", task=asked)
    assert caught.value.hint.startswith(f"they can do {made}")


def test_a_missing_component_is_named_with_what_to_do(sample: Sample, tmp_path: Path) -> None:
    file = rewritten(
        sample("sd1"), tmp_path / "a.safetensors", lambda k: None if k.startswith("first_") else k
    )
    with pytest.raises(Incomplete) as caught:
        load_pipeline(file, device="cpu")
    assert "has no vae, which its pipeline needs" in str(caught.value)
    assert "vae=FILE" in caught.value.hint
    assert load_pipeline(file, device="cpu", components={"vae": None}).vae is None
    donor = tmp_path / "donor.safetensors"
    prefix = "first_stage_model."
    given = {k: 2 * v for k, v in load_file(sample("sd1")).items() if k.startswith(prefix)}
    save_file(given, donor)
    vae = load_pipeline(file, device="cpu", vae=donor).vae
    assert torch.equal(vae.decoder.conv_in.weight, given[f"{prefix}decoder.conv_in.weight"])


@pytest.mark.slow
def test_ready_components_take_the_place_of_the_files(sample: Sample) -> None:
    base = load_pipeline(sample("sdxl"), device="cpu")
    shared = {"vae": base.vae, "text_encoder_2": base.text_encoder_2, "scheduler": base.scheduler}
    refiner = load_pipeline(sample("sdxl-refiner"), device="cpu", components=shared)
    assert {name: refiner.components[name] for name in shared} == shared
    with pytest.raises(UsageError, match="has no component tokeniser"):
        load_pipeline(sample("sdxl-refiner"), device="cpu", components={"tokeniser": None})


def test_only_some_components(sample: Sample) -> None:
    pipe = load_pipeline(sample("sd1"), device="cpu", only=["unet", "scheduler"])
    held = {name for name, value in pipe.components.items() if value is not None}
    assert held == {"unet", "scheduler"}


def test_a_donor_folder_with_old_names_loads_as_diffusers_does(
    sample: Sample, folder: Folder, tmp_path: Path
) -> None:
    donor = tmp_path / "vae"
    donor.mkdir()
    (donor / "config.json").write_bytes((folder("sd1") / "vae" / "config.json").read_bytes())
    new = {k: 2 * v for k, v in load_file(folder("sd1") / "vae" / WEIGHTS).items()}
    old = dict(new)
    for name, old_name in OLD_NAMES.items():
        old = {key.replace(name, old_name): value for key, value in old.items()}
    assert len(old.keys() & new.keys()) == len(new) - 16
    save_file(old, donor / "diffusion_pytorch_model.fp16.safetensors")
    vae = load_pipeline(sample("sd1"), device="cpu", vae=donor).vae
    assert vae.state_dict().keys() == new.keys()
    assert all(torch.equal(tensor, new[key]) for key, tensor in vae.state_dict().items())
    assert not vae.training


def test_the_original_configuration_wins_and_is_reported(
    sample: Sample, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    yaml = tmp_path / "v1.yaml"
    yaml.write_text("model: {params: {scale_factor: 0.5, parameterization: v}}")
    pipe = load_pipeline(sample("sd1"), device="cpu", original_config=yaml)
    assert pipe.vae.config.scaling_factor == 0.5
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert "v1.yaml says vae.scaling_factor = 0.5, not 0.18215" in caplog.text


def test_choices_reach_the_scheduler(sample: Sample) -> None:
    pipe = load_pipeline(
        sample("sdxl"), device="cpu", prediction_type="v_prediction", zero_terminal_snr=True
    )
    config = pipe.scheduler.config
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"] is True
    assert config["timestep_spacing"] == "trailing"


def test_keys_that_no_map_knows_stop_nobody(sample: Sample, tmp_path: Path) -> None:
    file = tmp_path / "more.safetensors"
    save_file({**load_file(sample("sd1")), "extra.weight": torch.ones(2)}, file)
    assert load_pipeline(file, device="cpu").unet is not None


@pytest.mark.slow
def test_a_folder_loads_in_its_own_dtype_and_variant(
    folder: Folder, sample: Sample, tmp_path: Path
) -> None:
    plain = load_pipeline(folder("sdxl"), device="cpu")
    assert {p.dtype for m in modules(plain).values() for p in m.parameters()} == {torch.float16}
    out = tmp_path / "variant"
    ckptconv.convert(sample("sdxl"), out, variant="fp16")
    assert_same(load_pipeline(out, device="cpu"), plain)
    pipe = load_pipeline(out, device="cpu", task="inpainting", components={"vae": None})
    assert type(pipe).__name__ == "StableDiffusionXLInpaintPipeline"
    assert pipe.vae is None


def test_a_folder_takes_no_choices_of_a_conversion(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="zero_terminal_snr: for a checkpoint only"):
        load_pipeline(folder("sd1"), device="cpu", zero_terminal_snr=False)
    with pytest.raises(FileRefused, match=r"holds no model_index\.json"):
        load_pipeline(tmp_path, device="cpu")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(FileRefused, match="has no pipeline NoSuchPipeline"):
        load_pipeline(broken, device="cpu")
    (broken / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    with pytest.raises(FileRefused, match="diffusers cannot load the folder"):
        load_pipeline(broken, device="cpu")


def test_what_is_no_checkpoint_is_refused_as_ever(tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_a.lora_down.weight": torch.ones(1, 1)}, lora)
    with pytest.raises(CkptconvError, match="this is a LoRA"):
        load_pipeline(lora, device="cpu")


def test_why_a_device_was_taken_is_logged(
    sample: Sample, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ckptconv.inference.device._counts", lambda: {"cuda": 0, "mps": 0, "cpu": 1}
    )
    with caplog.at_level(logging.INFO, "ckptconv"):
        load_pipeline(sample("sd1"))
    assert "device cpu: CUDA and MPS find no GPU" in caplog.text
