"""Whole files in the original layout: which networks stand behind which prefix.

``layout(FILES["x4-upscaler"])`` is every key and shape of the published file, and
``tensors(networks(TINY_FILES["x4-upscaler"], 1))`` a small file of the same structure.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from tests.support.reference import (
    controlnet,
    dpt,
    flux,
    mmdit,
    qwen3,
    t5,
    text,
    unet,
    vae,
    vision,
    z_image,
)
from tests.support.reference.controlnet import ControlNet
from tests.support.reference.schedule import NoiseAugmentation, Schedule, scaled_linear

Parts = dict[str, Callable[[], nn.Module]]
"""What builds the network behind each prefix."""

SD_BETAS = (0.00085, 0.012)
X4_BETAS = (1e-4, 0.02)
"""First and last variance. The upscaler's diffusion and the noise on its image share theirs."""


def _schedule(betas: tuple[float, float], posterior: bool) -> Schedule:
    return Schedule(scaled_linear(*betas), posterior=posterior)


def _latent(
    network: unet.UNetConfig,
    autoencoder: vae.VaeConfig,
    encoder: text.TextConfig,
    betas: tuple[float, float] = SD_BETAS,
) -> Parts:
    """Return what every relative of SD 2 has; the diffusion's own schedule has no prefix."""
    return {
        "": partial(_schedule, betas, posterior=True),
        "model.diffusion_model.": partial(unet.UNet, network),
        "first_stage_model.": partial(vae.Vae, autoencoder),
        "cond_stage_model.model.": partial(text.OpenClipText, encoder),
    }


def _depth(config: dpt.DptConfig) -> Parts:
    return {"depth_model.model.": partial(dpt.Dpt, config)}


def _image(image: vision.VisionConfig, words: text.TextConfig, *, text_transformer: bool) -> Parts:
    embedder = partial(vision.Embedder, image, words, text_transformer=text_transformer)
    return {"embedder.model.": embedder, "noise_augmentor.": NoiseAugmentation}


_LOW_SCALE: Parts = {"low_scale_model.": partial(_schedule, X4_BETAS, posterior=False)}

FILES: dict[str, Parts] = {
    "sd2-depth": _latent(unet.SD2_DEPTH, vae.VAE, text.OPENCLIP_H) | _depth(dpt.DPT_HYBRID),
    "x4-upscaler": _latent(unet.X4_UPSCALER, vae.X4_VAE, text.OPENCLIP_H, X4_BETAS) | _LOW_SCALE,
    "sd2-unclip-l": _latent(unet.UNCLIP_L, vae.VAE, text.OPENCLIP_H)
    | _image(vision.VIT_L, vision.TEXT_L, text_transformer=True),
    "sd2-unclip-h": _latent(unet.UNCLIP_H, vae.VAE, text.OPENCLIP_H)
    | _image(vision.VIT_H, vision.TEXT_H, text_transformer=False),
    "controlnet-sd1": {"control_model.": partial(ControlNet, controlnet.CONTROL_SD1)},
    "controlnet-sd2": {"control_model.": partial(ControlNet, controlnet.CONTROL_SD2)},
    "controlnet-sdxl": {"control_model.": partial(ControlNet, controlnet.CONTROL_SDXL)},
}

TINY_FILES: dict[str, Parts] = {
    "sd2-depth": _latent(unet.TINY_SD2_DEPTH, vae.TINY_VAE, text.TINY_OPENCLIP)
    | _depth(dpt.TINY_DPT),
    "x4-upscaler": _latent(unet.TINY_X4_UPSCALER, vae.TINY_X4_VAE, text.TINY_X4_OPENCLIP, X4_BETAS)
    | _LOW_SCALE,
    "sd2-unclip-l": _latent(unet.TINY_UNCLIP, vae.TINY_VAE, text.TINY_OPENCLIP)
    | _image(vision.TINY_VIT_L, vision.TINY_TEXT_L, text_transformer=True),
    "sd2-unclip-h": _latent(unet.TINY_UNCLIP, vae.TINY_VAE, text.TINY_OPENCLIP)
    | _image(vision.TINY_VIT_H, vision.TINY_TEXT_H, text_transformer=False),
    "controlnet-sd1": {"control_model.": partial(ControlNet, controlnet.TINY_CONTROL_SD1)},
    "controlnet-sd2": {"control_model.": partial(ControlNet, controlnet.TINY_CONTROL_SD2)},
    "controlnet-sdxl": {"control_model.": partial(ControlNet, controlnet.TINY_CONTROL_SDXL)},
}


VAE = partial(vae.Vae, vae.TINY_VAE)
CLIP = partial(text.ClipText, text.TINY_CLIP)
OPENCLIP = partial(text.OpenClipText, text.TINY_OPENCLIP)
ENCODERS: dict[str, Parts] = {
    "sd1": {"cond_stage_model.transformer.": CLIP},
    "sd2": {"cond_stage_model.model.": OPENCLIP},
    "sdxl": {
        "conditioner.embedders.0.transformer.": CLIP,
        "conditioner.embedders.1.model.": OPENCLIP,
    },
    "refiner": {"conditioner.embedders.0.model.": OPENCLIP},
}
"""The text encoders of a small checkpoint."""


@cache
def unet_alone(config: unet.UNetConfig) -> Parts:
    """Return the part of a file with a UNet and nothing else; the same object for the same UNet."""
    return {"model.diffusion_model.": partial(unet.UNet, config)}


def whole(family: str, config: unet.UNetConfig) -> Parts:
    """Return the parts of a small checkpoint: UNet, VAE and text encoders.

    Args:
        family: A key of ``ENCODERS``.
        config: Hyper-parameters of the UNet.
    """
    return unet_alone(config) | {"first_stage_model.": VAE} | ENCODERS[family]


T5 = partial(t5.T5, t5.TINY_T5)
VAE_16 = partial(vae.Vae, vae.TINY_VAE_16)


@cache
def transformer_alone(config: flux.FluxConfig, prefix: str = "model.diffusion_model.") -> Parts:
    """Return the part of a file with a transformer of FLUX or Chroma and nothing else."""
    return {prefix: partial(flux.Flux, config)}


def all_in_one(config: flux.FluxConfig) -> Parts:
    """Return the parts of a small file of FLUX or Chroma, as node editors put it together.

    Args:
        config: Hyper-parameters of the transformer.
    """
    clip = {"text_encoders.clip_l.transformer.": CLIP} if config.pooled_width else {}
    encoders = clip | {"text_encoders.t5xxl.transformer.": T5}
    return transformer_alone(config) | {"vae.": VAE_16} | encoders


def sd3(config: mmdit.MmDitConfig, *names: str) -> Parts:
    """Return the parts of a small file of Stable Diffusion 3, as published.

    Args:
        config: Hyper-parameters of the transformer.
        names: Of the text encoders in the file: `clip_l`, `clip_g`, `t5xxl`.
    """
    encoders: Parts = {
        "clip_l": partial(text.ClipTextAsPooled, text.TINY_CLIP),
        "clip_g": partial(text.ClipTextWithProjection, text.TINY_OPENCLIP),
        "t5xxl": T5,
    }
    return {
        "model.diffusion_model.": partial(mmdit.MmDit, config),
        "first_stage_model.": VAE_16,
        **{f"text_encoders.{name}.transformer.": encoders[name] for name in names},
    }


def z_image_alone(config: z_image.ZImageConfig, prefix: str = "model.diffusion_model.") -> Parts:
    """Return the part of a file with a transformer of Z-Image and nothing else."""
    return {prefix: partial(z_image.ZImage, config)}


def z_image_whole(config: z_image.ZImageConfig) -> Parts:
    """Return the parts of a small file of Z-Image, as node editors put it together."""
    encoder = {"text_encoders.qwen3_4b.transformer.": partial(qwen3.Qwen3, qwen3.TINY_QWEN3)}
    return z_image_alone(config) | {"vae.": VAE_16} | encoder


FLUX_FILES = {
    "flux1-dev": "model.diffusion_model.",
    "ae": "vae.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "t5xxl_fp16": "text_encoders.t5xxl.transformer.",
}
"""The files that people hold, and what stands before their keys where all are in one."""


Z_IMAGE_FILES = {
    "z_image_turbo_bf16": "model.diffusion_model.",
    "ae": "vae.",
    "qwen_3_4b": "text_encoders.qwen3_4b.transformer.",
}
"""The same of Z-Image."""


def layout(parts: Parts) -> dict[str, tuple[int, ...]]:
    """Return every key of a file with its shape; nothing is allocated.

    Args:
        parts: An entry of ``FILES`` or ``TINY_FILES``, or several merged.

    Returns:
        Shapes by key.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, build in parts.items():
        with torch.device("meta"):
            state = build().state_dict()
        shapes |= {prefix + key: tuple(tensor.shape) for key, tensor in state.items()}
    return shapes


def numbered(config: unet.UNetConfig) -> dict[str, Tensor]:
    """Return the tensors of a UNet that only moves: each holds its own number.

    Args:
        config: Hyper-parameters of the UNet.
    """
    shapes = layout(unet_alone(config))
    return {k: torch.full(s, n, dtype=torch.float16) for n, (k, s) in enumerate(shapes.items(), 1)}


def networks(parts: Parts, seed: int) -> dict[str, nn.Module]:
    """Build the networks of a file with random weights.

    Args:
        parts: An entry of ``TINY_FILES``, or several merged.
        seed: Seed of the first network; each that follows has one more.

    Returns:
        Networks by prefix, float64. Schedules keep their values.
    """
    return {
        prefix: unet.randomise(build(), seed + i).double()
        for i, (prefix, build) in enumerate(parts.items())
    }


def tensors(made: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return what a file of these networks holds.

    Args:
        made: Networks by prefix.

    Returns:
        Contiguous tensors by key.
    """
    return {
        prefix + key: tensor.contiguous()
        for prefix, network in made.items()
        for key, tensor in network.state_dict().items()
    }
