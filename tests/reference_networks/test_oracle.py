"""The comparison with the reference networks notices what shapes cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest

import ckptconv
from ckptconv.maps.architecture import KeyMaps, bundled
from tests.support import oracle
from tests.support.reference import files, flux
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
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    relative = Relative("FLUX.1 dev", files.transformer_alone(flux.TINY_DEV, ""))
    return convert(relative, tmp_path_factory.mktemp("oracle"))


MISTAKES = {  # of maps, that neither a name nor a shape gives away: what takes the place of what
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


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_notices_a_mistake_in_the_maps_of_flux(
    mistake: str, transformer: Converted, tmp_path: Path
) -> None:
    one, other = MISTAKES[mistake]
    (ours,) = bundled().folders
    for name in ("flux/transformer.yaml", "shared/maps/flux-blocks.yaml"):
        text = (ours / name).read_text(encoding="utf-8")
        wrong = text.replace(one, "??").replace(other, one).replace("??", other)
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(wrong, encoding="utf-8")
    out = tmp_path / "out"
    ckptconv.convert(transformer.file, out, maps=KeyMaps([tmp_path, ours]))
    oracle.compare(transformer.network(""), transformer.folder)
    with pytest.raises(AssertionError):
        oracle.compare(transformer.network(""), out)
