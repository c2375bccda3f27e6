"""The comparison with the reference networks notices what shapes cannot."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from tests.support import oracle
from tests.support.reference import files
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
