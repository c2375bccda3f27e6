"""The configuration files of the folders of unCLIP, the x4 upscaler and FLUX, and what they mean.

Written down from stabilityai/stable-diffusion-x4-upscaler, stable-diffusion-2-1-unclip (H) and
stable-diffusion-2-1-unclip-small (L): from memory, and from what the original configurations
(github.com/Stability-AI/stablediffusion) and diffusers' own conversion say; no copies were found.
`upcast_attention` of unCLIP, which is that of 2.1, is the least certain. So are those of
black-forest-labs/FLUX.1-dev and FLUX.1-schnell and of lodestones/Chroma1-HD, of which Chroma's
scheduler is the least certain. That of Tongyi-MAI/Z-Image-Turbo is from copies in public
repositories; its tokenizer is left out, which no file gives.
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
FLUX_VAE = {
    **FOLDERS["sdxl"]["vae"],
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
FLUX_TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
T5 = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}
T5_TOKENIZER = {
    "add_prefix_space": True,
    "eos_token": "</s>",
    "extra_ids": 100,
    "legacy": True,
    "model_max_length": 512,
    "pad_token": "<pad>",
    "tokenizer_class": "T5TokenizerFast",
    "unk_token": "<unk>",
}
FLOW_MATCH = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
QWEN3_4B = {
    "architectures": ["Qwen3Model"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
FLUX: dict[str, Values] = {
    "transformer": FLUX_TRANSFORMER,
    "vae": FLUX_VAE,
    "text_encoder": FOLDERS["sd15"]["text_encoder"],
    "text_encoder_2": T5,
    "tokenizer": FOLDERS["sd15"]["tokenizer"],
    "tokenizer_2": T5_TOKENIZER,
    "scheduler": FLOW_MATCH,
    "model_index": {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
}
PUBLISHED: dict[str, dict[str, Values]] = {
    **FOLDERS,
    "flux-dev": FLUX,
    "flux-schnell": {
        **FLUX,
        "transformer": {**FLUX_TRANSFORMER, "guidance_embeds": False},
        "scheduler": {**FLOW_MATCH, "shift": 1.0, "use_dynamic_shifting": False},
    },
    "chroma": {
        "transformer": {
            **{
                entry: value
                for entry, value in FLUX_TRANSFORMER.items()
                if entry not in ("guidance_embeds", "pooled_projection_dim")
            },
            "_class_name": "ChromaTransformer2DModel",
            "approximator_hidden_dim": 5120,
            "approximator_layers": 5,
            "approximator_num_channels": 64,
        },
        "vae": FLUX_VAE,
        "text_encoder": T5,
        "tokenizer": T5_TOKENIZER,
        "scheduler": {**FLOW_MATCH, "shift": 1.0, "use_dynamic_shifting": False},
        "model_index": {
            "_class_name": "ChromaPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "ChromaTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    },
    "z-image-turbo": {
        "transformer": {
            "_class_name": "ZImageTransformer2DModel",
            "all_f_patch_size": [1],
            "all_patch_size": [2],
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "cap_feat_dim": 2560,
            "dim": 3840,
            "in_channels": 16,
            "n_heads": 30,
            "n_kv_heads": 30,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "norm_eps": 1e-05,
            "qk_norm": True,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
        },
        "vae": FLUX_VAE,
        "text_encoder": QWEN3_4B,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": False,
        },
        "model_index": {
            "_class_name": "ZImagePipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3Model"],
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    },
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


VARIANTS = ("h", "l", "dev", "schnell", "turbo")
"""Ends of names of folders behind that of their architecture."""


def header(name: str) -> Header:
    """Returns the header of the file of a published folder, with the statistics that it lacks."""
    if name in HEADERS:
        return HEADERS[name]
    known = bundled().architectures
    architecture = next(a for n, a in known.items() if name in (n, *(f"{n}-{v}" for v in VARIANTS)))
    tensors = shapes(architecture.layout(architecture.tasks[0].name))
    if name == "flux-schnell":
        tensors = {k: s for k, s in tensors.items() if ".guidance_in." not in k}
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
