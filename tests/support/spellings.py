"""The spellings in which programs save the same network, as public bug reports show them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from pathlib import Path

import torch
from torch import Size, Tensor

from ckptconv.detection.detect import detect
from ckptconv.planning.plan import Plan, build_plan
from ckptconv.planning.step import ASIDE
from ckptconv.reading.tensor import Header
from ckptconv.reading.tensor import Tensor as Info

Tensors = Mapping[str, Tensor]
Spelling = Callable[[Tensors], dict[str, Tensor]]

DTYPES = {
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
}

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPENCLIP = "cond_stage_model.model."
FIRST = "conditioner.embedders.0.transformer."
SECOND = "conditioner.embedders.1.model."
REFINER = "conditioner.embedders.0.model."

ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def moved(*places: str) -> Spelling:
    """Returns what replaces prefixes, given as pairs of the usual and the other one."""
    pairs = dict(zip(places[::2], places[1::2], strict=True))

    def spell(tensors: Tensors) -> dict[str, Tensor]:
        found = {}
        for key, tensor in tensors.items():
            old = next((prefix for prefix in pairs if key.startswith(prefix)), "")
            found[pairs.get(old, "") + key.removeprefix(old)] = tensor
        return found

    return spell


def wrapped(prefix: str) -> Spelling:
    """Returns what puts a prefix before every key."""
    return lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()}


def vae_attention(names: Mapping[str, str], *, flat: bool = False, bias_axes: int = 1) -> Spelling:
    """Returns what names the layers of the VAE's attention otherwise, perhaps in other shapes."""

    def spell(tensors: Tensors) -> dict[str, Tensor]:
        found = {}
        for key, tensor in tensors.items():
            start, attention, rest = key.partition(".mid.attn_1.")
            layer, _, leaf = rest.rpartition(".")
            if key.startswith((VAE, "encoder.", "decoder.")) and attention and layer in names:
                key = f"{start}{attention}{names[layer]}.{leaf}"
                if leaf == "weight" and flat:
                    tensor = tensor.reshape(tensor.shape[:2])
                if leaf == "bias" and bias_axes == 3:
                    tensor = tensor.reshape(-1, 1, 1)
            found[key] = tensor
        return found

    return spell


def projection_as_linear(tensors: Tensors) -> dict[str, Tensor]:
    """Saves the projection of OpenCLIP as the weight of a linear layer."""
    found = {}
    for key, tensor in tensors.items():
        linear = key in (f"{SECOND}text_projection", f"{REFINER}text_projection")
        found[f"{key}.weight" if linear else key] = tensor.T.contiguous() if linear else tensor
    return found


def openclip_as_transformers(prefix: str, other: str) -> Spelling:
    """Returns what saves an OpenCLIP text tower under the names that transformers uses."""
    layers = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    whole = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "logit_scale": "logit_scale",
    }

    def spell(tensors: Tensors) -> dict[str, Tensor]:
        found = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(prefix)
            if name == key:
                found[key] = tensor
            elif name in whole:
                found[other + whole[name]] = tensor
            elif name == "text_projection":
                found[f"{other}text_projection.weight"] = tensor.T.contiguous()
            elif not name.startswith("transformer.resblocks."):
                found[other + name] = tensor
            else:
                _, _, number, layer = name.split(".", 3)
                start = f"{other}text_model.encoder.layers.{number}."
                if layer.startswith("attn.in_proj_"):
                    leaf = layer.removeprefix("attn.in_proj_")
                    for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                        found[f"{start}self_attn.{letter}_proj.{leaf}"] = part.clone()
                else:
                    module, _, leaf = layer.rpartition(".")
                    found[f"{start}{layers[module]}.{leaf}"] = tensor
        return found

    return spell


def of(kinds: str | Container[str], spell: Spelling) -> Spelling:
    """Returns a spelling of files that have a key, or one of several, alone."""
    kinds = {kinds} if isinstance(kinds, str) else kinds
    return lambda tensors: spell(tensors) if any(key in kinds for key in tensors) else dict(tensors)


def ending(old: str, new: str, *, both: bool = False) -> Spelling:
    """Returns what gives keys another end, or a copy of their tensors under that name."""

    def spell(tensors: Tensors) -> dict[str, Tensor]:
        other = {k: k.removesuffix(old) + new if k.endswith(old) else k for k in tensors}
        found = {other[key]: tensor for key, tensor in tensors.items()}
        return {**tensors, **found} if both else found

    return spell


DIT = {f"{UNET}img_in.weight", f"{UNET}cap_pad_token"}
"""A key of FLUX and Chroma, and one of Z-Image."""

SPELLINGS: Mapping[str, Spelling] = {
    "VAE attention as diffusers names it": vae_attention(ATTENTION),
    "VAE attention as linear layers": vae_attention(ATTENTION, flat=True),
    "VAE attention with biases of three axes": vae_attention(ATTENTION, bias_axes=3),
    "VAE attention with the oldest names": vae_attention(OLD_ATTENTION, flat=True),
    "VAE under vae.": moved(VAE, "vae."),
    "UNet under unet.": of(f"{UNET}input_blocks.0.0.weight", moved(UNET, "unet.")),
    "UNet under diffusion_model.": moved(UNET, "diffusion_model."),
    "UNet and VAE of node editors": moved(UNET, "diffusion_model.", VAE, "vae."),
    "text encoder without transformer.": moved(CLIP, "cond_stage_model."),
    "text encoder under clip_l.": moved(CLIP, "cond_stage_model.clip_l.transformer."),
    "SD1 saved by SGM": moved(CLIP, FIRST),
    "SD2 saved by SGM": moved(OPENCLIP, REFINER),
    "SDXL of node editors": moved(
        FIRST, "text_encoders.clip_l.transformer.", SECOND, "text_encoders.clip_g."
    ),
    "SDXL of node editors, by the names of transformers": lambda tensors: moved(
        FIRST, "text_encoders.clip_l.transformer."
    )(openclip_as_transformers(SECOND, "text_encoders.clip_g.transformer.")(tensors)),
    "SDXL's second encoder alone, by the names of transformers": openclip_as_transformers(
        SECOND, "text_encoders.clip_g.transformer."
    ),
    "projection as a linear layer": projection_as_linear,
    "transformer without a prefix": of(DIT, moved(UNET, "")),
    "transformer and VAE without a prefix": of(DIT, moved(UNET, "", "vae.", "")),
    "transformer's VAE under first_stage_model.": of(DIT, moved("vae.", VAE)),
    "norms with a weight": ending(".scale", ".weight"),
    "T5's embedding by its other name": ending("shared.weight", "encoder.embed_tokens.weight"),
    "T5's embedding by both names": ending(
        "shared.weight", "encoder.embed_tokens.weight", both=True
    ),
    "module.": wrapped("module."),
    "_orig_mod.": wrapped("_orig_mod."),
    "_orig_mod. in the middle": moved(UNET, f"{UNET}_orig_mod."),
    "model.": wrapped("model."),
    "state_dict.": wrapped("state_dict."),
    "any other prefix": wrapped("some.trainer.net."),
}
"""By what they are; each leaves the tensors of a file that does not have them as they are."""


def spelled(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Returns the same file in every spelling that differs."""

    def shapes(each: Tensors) -> dict[str, Size]:
        return {key: tensor.shape for key, tensor in each.items()}

    found = {name: spell(tensors) for name, spell in SPELLINGS.items()}
    return {name: each for name, each in found.items() if shapes(each) != shapes(tensors)}


def plan_of(tensors: Mapping[str, Tensor]) -> Plan:
    """Returns the plan of a file, from its header alone."""
    path = Path("made.safetensors")
    infos = {
        key: Info(path, key, DTYPES[tensor.dtype], tuple(tensor.shape), 0, 0)
        for key, tensor in tensors.items()
    }
    return build_plan(detect(Header(path, infos, {}, 0, 0)))


def written(plan: Plan) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
    """Returns what a plan writes into the folders of components."""
    return {
        (target.component, target.key): (target.dtype, target.shape)
        for step in plan.steps
        for target in step.targets
        if target.component != ASIDE
    }


def assert_same_in_every_spelling(tensors: dict[str, Tensor]) -> None:
    """Asserts, from the header alone, that every spelling of a file gives the same folder."""
    usual = plan_of(tensors)
    others = spelled(tensors)
    assert len(others) >= 5
    for spelling, other in others.items():
        plan = plan_of(other)
        assert plan.detection.require() == usual.detection.require(), spelling
        assert (plan.problems, plan.absent) == ((), usual.absent), spelling
        assert len(plan.unclaimed) == len(usual.unclaimed), spelling
        assert written(plan) == written(usual), spelling
        assert plan.lossless
        assert plan.detection.notes or plan.detection.header.tensors.keys() == other.keys()
