"""The comparison with the reference networks notices what shapes cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

import ckptconv
from ckptconv.maps.architecture import KeyMaps, bundled
from tests.support import oracle
from tests.support.reference import files, flux, z_image
from tests.support.relatives import Converted, Relative, convert


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return convert(Relative("VAE", {"": files.VAE}), tmp_path_factory.mktemp("oracle"))


def test_the_oracle_notices_a_swap_that_shapes_cannot(
    autoencoder: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(cls: Any, folder: Any) -> Any:
        model = loaded(cls, folder)
        attention = model.encoder.mid_block.attentions[0]
        attention.to_q, attention.to_v = attention.to_v, attention.to_q
        return model

    autoencoder.compare()
    loaded = oracle.loaded
    monkeypatch.setattr(oracle, "loaded", swapped)
    with pytest.raises(AssertionError):
        autoencoder.compare()


def test_a_network_without_a_comparison_is_no_success(autoencoder: Converted) -> None:
    with pytest.raises(NotImplementedError, match="no comparison for Conv2d"):
        oracle.compare(autoencoder.network("").get_submodule("quant_conv"), autoencoder.folder)


def test_a_key_that_is_left_over_is_noticed(autoencoder: Converted) -> None:
    with pytest.raises(AssertionError, match="missing_keys"):
        oracle.loaded(diffusers.ControlNetModel, autoencoder.folder)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    made: dict[str, Converted] = {}

    def convert_once(row: str) -> Converted:
        if row not in made:
            relative = Relative(row, NETWORKS[row][0])
            made[row] = convert(relative, tmp_path_factory.mktemp("oracle"))
        return made[row]

    return convert_once


NETWORKS = {  # by row, the file and the maps that it takes
    "FLUX.1 dev": (
        files.transformer_alone(flux.TINY_DEV, ""),
        ("flux/transformer", "shared/maps/flux-blocks"),
    ),
    "Z-Image and Z-Image-Turbo": (
        files.z_image_alone(z_image.TINY_Z_IMAGE, ""),
        ("z-image/transformer",),
    ),
}
FLUX = {  # mistakes that neither a name nor a shape gives away: what takes the place of what
    "shift and scale stay in their order": (
        "{swap_halves: norm_out.linear.weight}",
        "norm_out.linear.weight",
    ),
    "their biases do": ("{swap_halves: norm_out.linear.bias}", "norm_out.linear.bias"),
    "queries and keys": ("attn.to_q.weight", "attn.to_k.weight"),
    "those of the text": ("attn.add_q_proj.weight", "attn.add_k_proj.weight"),
    "queries and values, of biases": ("attn.to_q.bias", "attn.to_v.bias"),
    "norms of queries and keys": ("norm_q.weight", "norm_k.weight"),
    "those of the text's": ("norm_added_q.weight", "norm_added_k.weight"),
    "modulation of image and text": ("norm1.linear", "norm1_context.linear"),
    "feed-forward of image and text": (".ff.net.2", ".ff_context.net.2"),
    "time and guidance": ("timestep_embedder", "guidance_embedder"),
}


Z_IMAGE = {
    "queries and keys": ("attention.to_q.weight", "attention.to_k.weight"),
    "keys and values": ("attention.to_k.weight", "attention.to_v.weight"),
    "norms of queries and keys": ("attention.norm_q", "attention.norm_k"),
    "norms before and after attention": (": attention_norm1", ": attention_norm2"),
    "norms before and after the feed-forward": (": ffn_norm1", ": ffn_norm2"),
    "padding of image and text": (": x_pad_token", ": cap_pad_token"),
}
MISTAKES = [
    pytest.param(row, *pair, id=f"{row}, {mistake}")
    for row, mistakes in zip(NETWORKS, (FLUX, Z_IMAGE), strict=True)
    for mistake, pair in mistakes.items()
]


@pytest.mark.parametrize(("row", "one", "other"), MISTAKES)
def test_the_oracle_notices_a_mistake_in_the_maps(
    row: str, one: str, other: str, transformer: Callable[[str], Converted], tmp_path: Path
) -> None:
    (ours,) = bundled().folders
    for name in NETWORKS[row][1]:
        text = (ours / f"{name}.yaml").read_text(encoding="utf-8")
        wrong = text.replace(one, "??").replace(other, one).replace("??", other)
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / f"{name}.yaml").write_text(wrong, encoding="utf-8")
    out, made = tmp_path / "out", transformer(row)
    ckptconv.convert(made.file, out, maps=KeyMaps([tmp_path, ours]))
    oracle.compare(made.network(""), made.folder)
    with pytest.raises(AssertionError):
        oracle.compare(made.network(""), out)
