"""The configuration files of the x4 upscaler's and unCLIP's folders, and what they mean.

Written down from stabilityai/stable-diffusion-x4-upscaler, stable-diffusion-2-1-unclip (H) and
stable-diffusion-2-1-unclip-small (L): from memory, and from what the original configurations
(github.com/Stability-AI/stablediffusion) and diffusers' own conversion say; no copies were found.
`upcast_attention` of unCLIP, which is that of 2.1, is the least certain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptconv.maps.architecture import bundled
from tests.conftest import made, shapes
from tests.support.published import FOLDERS, FOUR_LEVELS, HEADERS, UNET, Values, meaning
from tests.support.reference import files

if TYPE_CHECKING:
    from ckptconv.reading.tensor import Header

VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2}
SD2_VAE = FOLDERS["sd21"]["vae"]
DDPM = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
SCHEDULER = {
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
UNCLIP_UNET = {
    **UNET,
    **FOUR_LEVELS,
    "attention_head_dim": [5, 10, 20, 20],
    "class_embed_type": "projection",
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
UNCLIP: dict[str, Values] = {
    "vae": SD2_VAE,
    "text_encoder": FOLDERS["sd21"]["text_encoder"],
    "tokenizer": FOLDERS["sd21"]["tokenizer"],
    "feature_extractor": {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 224},
    },
    "image_noising_scheduler": {**DDPM, "beta_schedule": "squaredcos_cap_v2"},
    "scheduler": {
        **{k: v for k, v in SCHEDULER.items() if k != "clip_sample"},
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "skip_prk_steps": True,
    },
    "model_index": {
        "_class_name": "StableUnCLIPImg2ImgPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
}
PUBLISHED: dict[str, dict[str, Values]] = {
    **FOLDERS,
    "sd2-unclip-h": {
        **UNCLIP,
        "unet": {**UNCLIP_UNET, "projection_class_embeddings_input_dim": 2048},
        "image_encoder": {
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "projection_dim": 1024,
        },
        "image_normalizer": {"embedding_dim": 1024},
    },
    "sd2-unclip-l": {
        **UNCLIP,
        "unet": {**UNCLIP_UNET, "projection_class_embeddings_input_dim": 1536},
        "image_encoder": {
            "dropout": 0.0,
            "hidden_act": "quick_gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        },
        "image_normalizer": {"embedding_dim": 768},
    },
    "x4-upscaler": {
        "unet": {
            **UNET,
            "attention_head_dim": 8,
            "block_out_channels": [256, 512, 512, 1024],
            "cross_attention_dim": 1024,
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
            "in_channels": 7,
            "num_class_embeds": 1000,
            "only_cross_attention": [True, True, True, False],
            "sample_size": 128,
            "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
            "use_linear_projection": True,
        },
        "vae": {
            **VAE,
            "block_out_channels": [128, 256, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "sample_size": 256,
            "scaling_factor": 0.08333,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
        "text_encoder": FOLDERS["sd21"]["text_encoder"],
        "tokenizer": FOLDERS["sd21"]["tokenizer"],
        "low_res_scheduler": {**DDPM, "beta_schedule": "scaled_linear"},
        "scheduler": {
            **SCHEDULER,
            "_class_name": "DDIMScheduler",
            "beta_end": 0.02,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.0001,
        },
        "model_index": {
            "_class_name": "StableDiffusionUpscalePipeline",
            "low_res_scheduler": ["diffusers", "DDPMScheduler"],
            "max_noise_level": 350,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    },
}


def header(name: str) -> Header:
    """Returns the header of the file of a published folder, with the statistics that it lacks."""
    if name in HEADERS:
        return HEADERS[name]
    architecture = bundled().architectures[name.removesuffix("-h").removesuffix("-l")]
    tensors = shapes(architecture.layout(architecture.tasks[0].name))
    if name == "sd2-unclip-l":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("embedder.")}
        tensors |= files.layout({"embedder.model.": files.FILES[name]["embedder.model."]})
        tensors |= {f"noise_augmentor.data_{part}": (1, 768) for part in ("mean", "std")}
        tensors |= {"model.diffusion_model.label_emb.0.0.weight": (1280, 1536)}
    return made(tensors)


def understood(component: str, values: Any) -> Any:
    """Returns a configuration as the class that reads it understands it."""
    if component == "image_encoder":
        import transformers

        filled = transformers.CLIPVisionConfig(**values).to_dict()
        own = ("architectures", "dtype", "transformers_version")
        return {k: v for k, v in filled.items() if k not in own}
    if component in ("feature_extractor", "image_normalizer"):
        return {k: v for k, v in values.items() if k != "_class_name"}
    return meaning(component, values)
