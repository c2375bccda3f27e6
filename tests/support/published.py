"""The configuration files of the published folders, and how to compare two configurations.

Written down from the files themselves, as far as public copies of them could be found:

- SD 1.5: github.com/HDRJ-One/runwayml-stable-diffusion-v1-5
- SD 1.5 inpainting: github.com/jack-op11/stable-diffusion-inpainting, `unet/config.json` at afeee10
- SD 2.1 base: github.com/jack-op11/stable-diffusion-2-1-base
- SD 2.1: github.com/Vikas-2025/Hugging_face_sta_dif_2.1 (a Flax copy; `upcast_attention` is from
  other copies of the published file)
- SDXL base: the SHA-256 of `unet/config.json`, `text_encoder/config.json` and `model_index.json`
  written with the values below are those that github.com/HDRJ-One/stable-diffusion-xl-base-1.0
  records; the other files as in github.com/PRITHIVSAKTHIUR/AI-Art-Generator-SDXL, which was saved
  from it
- SDXL refiner: from memory, no copy was found; `sample_size` of its VAE is the least certain

Left out: `_diffusers_version`, `_name_or_path`, `transformers_version`, and values that are the
default of the class that reads the file.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.conftest import published

Values = Mapping[str, Any]

NULL = [None, None]
DIFFUSERS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}

UNET = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
}
FOUR_LEVELS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
SD1_UNET = {**UNET, **FOUR_LEVELS, "attention_head_dim": 8, "cross_attention_dim": 768}
SD2_UNET = {
    **UNET,
    **FOUR_LEVELS,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL_UNET = {
    **UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
REFINER_UNET = {
    **SDXL_UNET,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": [
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SDXL_VAE = {**VAE, "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}
TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "vocab_size": 49408,
}
CLIP_L = {
    **TEXT,
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
OPENCLIP_H = {
    **TEXT,
    "architectures": ["CLIPTextModel"],
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
OPENCLIP_BIGG = {
    **TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
SCHEDULE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
PNDM = {**SCHEDULE, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
DDIM = {**SCHEDULE, "_class_name": "DDIMScheduler"}
EULER = {
    **SCHEDULE,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
TOKENIZER = {
    "add_prefix_space": False,
    "bos_token": "<|startoftext|>",
    "do_lower_case": True,
    "eos_token": "<|endoftext|>",
    "errors": "replace",
    "model_max_length": 77,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": "<|endoftext|>",
}
# SD2's tokenizer_config.json says "<|endoftext|>", and the special_tokens_map.json beside it "!",
# which is the one that counted.
PADDED = {**TOKENIZER, "pad_token": "!"}

ONE_ENCODER = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# The folders of SD 1.5 bring a safety checker; a checkpoint does not, so these three entries differ
# by design: {"feature_extractor": CLIPFeatureExtractor, "requires_safety_checker": True,
# "safety_checker": StableDiffusionSafetyChecker}.
UNCHECKED = {"feature_extractor": NULL, "requires_safety_checker": False, "safety_checker": NULL}

FOLDERS: dict[str, dict[str, Values]] = {
    "sd15": {
        "model_index": {
            "_class_name": "StableDiffusionPipeline",
            "scheduler": ["diffusers", "PNDMScheduler"],
            **ONE_ENCODER,
            **UNCHECKED,
        },
        "unet": {**SD1_UNET, "sample_size": 64},
        "vae": {**VAE, "sample_size": 512},
        "text_encoder": CLIP_L,
        "tokenizer": TOKENIZER,
        "scheduler": PNDM,
    },
    "sd15-inpainting": {
        "model_index": {
            "_class_name": "StableDiffusionInpaintPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            **ONE_ENCODER,
            **UNCHECKED,
        },
        "unet": {**SD1_UNET, "in_channels": 9, "sample_size": 64},
        # The published file says 256: the size of the yaml that the converter of the time read,
        # and not one the model was trained at. The value sets the tiles of `enable_vae_tiling`,
        # which 256 makes visible, so ours follows SD 1.5.
        "vae": {**VAE, "sample_size": 512},
        "text_encoder": CLIP_L,
        "tokenizer": TOKENIZER,
        "scheduler": DDIM,
    },
    "sd21": {
        "model_index": {
            "_class_name": "StableDiffusionPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            **ONE_ENCODER,
            # The published folder has a feature extractor, for a safety checker that it lacks.
            **UNCHECKED,
        },
        "unet": {**SD2_UNET, "sample_size": 96, "upcast_attention": True},
        "vae": {**VAE, "sample_size": 768},
        "text_encoder": OPENCLIP_H,
        "tokenizer": PADDED,
        "scheduler": {**DDIM, "prediction_type": "v_prediction"},
    },
    "sd21-base": {
        "model_index": {
            "_class_name": "StableDiffusionPipeline",
            "scheduler": ["diffusers", "PNDMScheduler"],
            **ONE_ENCODER,
            **UNCHECKED,
        },
        "unet": {**SD2_UNET, "sample_size": 64},
        "vae": {**VAE, "sample_size": 768},
        "text_encoder": OPENCLIP_H,
        "tokenizer": PADDED,
        "scheduler": PNDM,
    },
    "sdxl": {
        "model_index": {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            **ONE_ENCODER,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        },
        "unet": SDXL_UNET,
        "vae": SDXL_VAE,
        "text_encoder": CLIP_L,
        "text_encoder_2": OPENCLIP_BIGG,
        "tokenizer": TOKENIZER,
        "tokenizer_2": PADDED,
        "scheduler": EULER,
    },
    "sdxl-refiner": {
        "model_index": {
            "_class_name": "StableDiffusionXLImg2ImgPipeline",
            "force_zeros_for_empty_prompt": False,
            "requires_aesthetics_score": True,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": NULL,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": NULL,
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "unet": REFINER_UNET,
        "vae": SDXL_VAE,
        "text_encoder_2": OPENCLIP_BIGG,
        "tokenizer_2": PADDED,
        "scheduler": EULER,
    },
}

HEADERS = {
    "sd15": published("sd15-emaonly-fp32"),
    "sd15-inpainting": published("sd15-inpainting-fp16"),
    "sd21": published("sd21-768-fp32"),
    "sd21-base": replace(
        published("sd21-768-fp32"), metadata={"modelspec.architecture": "stable-diffusion-v2-512"}
    ),
    "sdxl": published("sdxl-base-fp16"),
    "sdxl-refiner": published("sdxl-refiner-fp16"),
}
"""The header of the file that belongs to each folder."""


def meaning(component: str, values: Values) -> dict[str, Any]:
    """Returns a configuration as the class that reads it understands it: defaults filled in.

    What has no effect is left out, and what can be written in several ways is written in one.
    """
    if component == "model_index":
        return {k: v for k, v in values.items() if v != NULL and k != "_diffusers_version"}
    if component.startswith("tokenizer"):  # decoding is no part of the pipelines
        return {k: v for k, v in values.items() if k != "clean_up_tokenization_spaces"}
    if component.startswith("text_encoder"):
        import transformers

        known = {"t5": transformers.T5Config, "qwen3": transformers.Qwen3Config}
        cls = known.get(values.get("model_type", ""), transformers.CLIPTextConfig)
        filled = cls(**values).to_dict()
        return {k: v for k, v in filled.items() if k not in ("dtype", "transformers_version")}
    import diffusers

    class_name = DIFFUSERS.get(component) or values["_class_name"]
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    filled = {
        name: _plain(values.get(name, parameter.default))
        for name, parameter in parameters.items()
        if name != "self"
    }
    if component == "transformer":  # with null, as many as go in
        filled["out_channels"] = filled.get("out_channels") or filled["in_channels"]
    return {"class": class_name, **(_by_level(filled) if component == "unet" else filled)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _by_level(unet: dict[str, Any]) -> dict[str, Any]:
    """Writes out what a UNet may say once for all levels, and blanks it where nothing reads it."""
    levels = len(unet["block_out_channels"])
    attention = ["CrossAttn" in kind for kind in unet["down_block_types"]]
    attention[-1] = True  # the middle block takes the values of the last level
    for name in ("attention_head_dim", "cross_attention_dim", "transformer_layers_per_block"):
        value = unet[name]
        per_level = value if isinstance(value, list) else [value] * levels
        unet[name] = [v if a else None for v, a in zip(per_level, attention, strict=True)]
    return {**unet, "upcast_attention": bool(unet["upcast_attention"])}
