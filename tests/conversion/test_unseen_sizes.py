"""FLUX, Chroma, SD3 and Z-Image in sizes that nobody published, whole and in pieces."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import ckptconv
from ckptconv.configs.config import configs
from ckptconv.detection.detect import detect
from ckptconv.planning.plan import build_plan
from tests.conftest import made
from tests.support.checkpoints import raw, raw_folder, save
from tests.support.reference import flux, mmdit, qwen3, t5, text, vae, z_image
from tests.support.reference.files import Parts, layout

HEAD = 64
"""Width of a head of every network but FLUX's transformer, whose are twice as wide."""


QUICK: dict[str, Any] = {"deadline": None, "database": None, "phases": [Phase.generate]}
"""To shrink what fails would take minutes, and it is small as it is."""


@dataclass(frozen=True)
class Model:
    """The networks of a file, by prefix, and what its configurations must say."""

    parts: Parts
    expected: Mapping[str, int]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return layout(self.parts)


@st.composite
def models(draw: st.DrawFn, family: str) -> Model:
    """Draws widths, depths and numbers of heads."""
    size = st.integers(1, 3)
    words = replace(
        t5.TINY_T5, width=8 * draw(st.integers(2, 20)), layers=draw(size), heads=draw(size)
    )
    clip = replace(text.TINY_CLIP, width=HEAD * draw(size), layers=draw(st.integers(2, 4)))
    clip = replace(clip, projection=clip.width)
    encoders: Parts = {"text_encoders.t5xxl.transformer.": partial(t5.T5, words)}
    expected = {"transformer.joint_attention_dim": words.width}
    autoencoder = partial(vae.Vae, replace(vae.TINY_VAE_16, channels=32))
    clip_l = "text_encoders.clip_l.transformer."
    transformer: Callable[[], nn.Module]
    if family == "z-image":
        shared, heads = draw(size), draw(size)
        language = replace(qwen3.TINY_QWEN3, width=words.width, layers=draw(size), vocabulary=99)
        language = replace(language, shared=shared, heads=shared * draw(size))
        image = replace(z_image.TINY_Z_IMAGE, layers=draw(size), refiners=draw(size))
        image = replace(image, width=2 * HEAD * heads, text_width=words.width)
        encoders = {"text_encoders.qwen3_4b.transformer.": partial(qwen3.Qwen3, language)}
        expected = {"transformer.cap_feat_dim": words.width, "transformer.n_heads": heads}
        expected |= {"transformer.n_refiner_layers": image.refiners}
        expected |= {"text_encoder.num_key_value_heads": shared}
        expected |= {"text_encoder.num_attention_heads": language.heads}
        transformer, prefix = partial(z_image.ZImage, image), "vae."
    elif family == "sd3":
        large = replace(text.TINY_OPENCLIP, width=HEAD * draw(size), layers=3)
        large = replace(large, projection=large.width)
        encoders[clip_l] = partial(text.ClipTextAsPooled, clip)
        encoders["text_encoders.clip_g.transformer."] = partial(text.ClipTextWithProjection, large)
        depth, normed = draw(st.integers(2, 4)), draw(st.booleans())
        alone = draw(st.integers(0, depth - 1)) if normed else 0
        network = mmdit.MmDitConfig(
            depth=depth,
            edge=draw(st.integers(2, 9)),
            text_width=words.width,
            pooled_width=clip.width + large.width,
            normed=normed,
            alone=alone,
        )
        expected |= {"transformer.num_layers": depth, "transformer.num_attention_heads": depth}
        expected |= {"transformer.pos_embed_max_size": network.edge}
        transformer = partial(mmdit.MmDit, network)
        prefix = "first_stage_model."
    else:
        heads, double, single = draw(size), draw(size), draw(size)
        config = replace(
            flux.TINY_CHROMA if family == "chroma" else flux.TINY_DEV,
            width=2 * HEAD * heads,
            double=double,
            single=single,
            text_width=words.width,
        )
        if family == "chroma":
            config = replace(config, approximator=8 * draw(size), approximator_layers=draw(size))
        else:
            encoders[clip_l] = partial(text.ClipText, clip)
            config = replace(config, pooled_width=clip.width, guidance=draw(st.booleans()))
        expected |= {"transformer.num_attention_heads": heads, "transformer.num_layers": double}
        expected |= {"transformer.num_single_layers": single}
        transformer, prefix = partial(flux.Flux, config), "vae."
    return Model({"model.diffusion_model.": transformer, prefix: autoencoder, **encoders}, expected)


FAMILIES = ("flux", "chroma", "sd3", "z-image")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, **QUICK)
@given(data=st.data())
def test_sizes_are_measured_and_every_step_turns_back(family: str, data: st.DataObject) -> None:
    model = data.draw(models(family))
    shapes = model.shapes()
    plan = build_plan(detect(made(shapes)))
    plan.require_complete(strict=True)
    assert plan.detection.require()[0].name == family
    built = configs(plan)
    for place, value in model.expected.items():
        component, _, entry = place.partition(".")
        assert built[component].values[entry] == value, place
    assert {
        step.sources[0].name: step.op.backward([t.shape for t in step.targets], None)
        for step in plan.steps
        if step.targets
    } == shapes


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, **QUICK)
@given(data=st.data())
def test_a_model_comes_back_bit_for_bit_whole_and_in_pieces(
    family: str, data: st.DataObject
) -> None:
    model = data.draw(models(family))
    random = np.random.default_rng(1)
    tensors = {
        key: ("F16", shape, random.standard_normal(shape).astype(np.float16).tobytes())
        for key, shape in model.shapes().items()
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        whole = save(tensors, folder / "whole.safetensors")
        ckptconv.convert(whole, folder / "out", strict=True)
        found = ckptconv.verify(whole, folder / "out")
        assert found.passed, found.as_data()
        ckptconv.export(folder / "out", folder / "back.safetensors")
        assert raw(folder / "back.safetensors") == tensors
        (folder / "pieces").mkdir()
        for number, prefix in enumerate(model.parts):
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            save(own, folder / "pieces" / f"{number}.safetensors")
        ckptconv.convert(folder / "pieces", folder / "again", assemble=True, strict=True)
        ours, theirs = (raw_folder(folder / name) for name in ("again", "out"))
        # of a donor, nothing is kept aside, such as its position ids
        assert ours == {k: v for k, v in theirs.items() if not k.startswith("ckptconv/")}
