"""Loads folders with diffusers and transformers alone, and hears what the libraries complain of."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)

from ckptconv.files import read_json
from ckptconv.libraries import tied
from tests.support.checkpoints import raw

MODELS = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "controlnet": diffusers.ControlNetModel,
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
    "depth_estimator": transformers.DPTForDepthEstimation,
    "image_encoder": transformers.CLIPVisionModelWithProjection,
    "image_normalizer": StableUnCLIPImageNormalizer,
}


def class_of(folder: Path) -> Any:
    """Returns the class that the configuration of a component names."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name") or config["architectures"][0]
    if name == StableUnCLIPImageNormalizer.__name__:
        return StableUnCLIPImageNormalizer
    return getattr(diffusers, name, None) or getattr(transformers, name)


_TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class _Complaints(logging.Handler):
    """Collects what the libraries warn of, but for what this installation lacks."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "requires torchvision" not in record.getMessage():
            self.lines.append(record.getMessage())


@contextmanager
def listening() -> Iterator[list[str]]:
    """Gives the complaints of the libraries, as they come."""
    handler = _Complaints()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:  # another test of this process may have made the library quiet
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    yield handler.lines
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def load(folder: Path, **options: Any) -> Any:
    """Loads a pipeline."""
    return DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]  # theirs is untyped
        folder, local_files_only=True, **options
    )


def model(folder: Path, cls: Any, **options: Any) -> Any:
    """Loads a model, and checks that no key is missing or unexpected."""
    module, info = cls.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, **options
    )
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    return module


def check_weights(module: Any, folder: Path) -> None:
    """Checks that a model holds what its folder does, bit for bit."""
    files = [raw(file) for file in folder.glob("*.safetensors")]
    # transformers 5 leaves `text_model.` out of a CLIPTextModel's names
    stored = {k.removeprefix("text_model."): v for file in files for k, v in file.items()}
    twins = tied(module)
    state = {k: v for k, v in module.state_dict().items() if k not in twins}
    held = {k.removeprefix("text_model."): v for k, v in state.items()}
    assert held.keys() == stored.keys()
    for key, (dtype, shape, data) in stored.items():
        value = held[key]
        assert tuple(value.shape) == shape
        wanted = torch.frombuffer(bytearray(data), dtype=_TORCH[dtype])
        assert torch.equal(value.flatten(), wanted.to(value.dtype))
