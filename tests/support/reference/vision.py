"""The image encoders of unCLIP in their original layout, in plain torch.

``Embedder(...).state_dict()`` has exactly the keys that follow ``embedder.model.`` in published
files: the whole CLIP model in OpenAI's names for ViT-L, the OpenCLIP model without its text
transformer for ViT-H. Only ``visual`` is ever run.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tests.support.reference.text import (
    CLIP_L,
    OPENCLIP_H,
    OpenClipText,
    OpenClipTransformer,
    TextConfig,
)


@dataclass(frozen=True)
class VisionConfig:
    """Hyper-parameters of an image encoder; the defaults are those of CLIP ViT-L/14.

    Attributes:
        width: Width of the hidden states.
        layers: Number of transformer layers.
        heads: Number of attention heads; no shape tells it.
        activation: Activation of the feed-forward.
        projection: Width of the image embedding.
        patch: Edge of a patch, in pixels.
        grid: Patches along an edge of the image.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int = 768
    patch: int = 14
    grid: int = 16

    @property
    def causal(self) -> bool:
        """Whether a patch sees no later one."""
        return False


class Visual(nn.Module):
    """A CLIP vision transformer.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv1 = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(config.grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-5)
        self.transformer = OpenClipTransformer(config)
        self.ln_post = nn.LayerNorm(width, eps=1e-5)
        # Used as x @ P, so [width, projection]: the transpose of a linear layer's weight.
        self.proj = nn.Parameter(torch.randn(width, config.projection))

    def forward(self, image: Tensor) -> Tensor:
        """Encode images.

        Args:
            image: Normalised images, shape [B, 3, S, S]; S is ``grid`` times ``patch`` pixels.

        Returns:
            Image embedding, shape [B, projection], not normalised.
        """
        patches = self.conv1(image).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(image.shape[0], 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding
        _, x = self.transformer(self.ln_pre(x))
        out: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return out


class Embedder(OpenClipText):
    """A CLIP model as unCLIP files hold it; run ``visual``.

    Args:
        config: Hyper-parameters of the image encoder.
        text: Hyper-parameters of the text tower, which is in the file and never used.
        text_transformer: Whether the text tower's layers are there (ViT-L) or left out (ViT-H).
    """

    def __init__(self, config: VisionConfig, text: TextConfig, *, text_transformer: bool) -> None:
        super().__init__(text)
        self.visual = Visual(config)
        if not text_transformer:
            del self.transformer


VIT_L = VisionConfig()
VIT_H = VisionConfig(width=1280, layers=32, activation="gelu", projection=1024)
TEXT_L = CLIP_L
TEXT_H = OPENCLIP_H

# Heads keep their published width, 64 and 80. The projection fits unet.TINY_UNCLIP.
TINY_VIT_L = replace(VIT_L, width=128, layers=3, heads=2, projection=96, grid=4)
TINY_VIT_H = replace(VIT_H, width=160, layers=3, heads=2, projection=96, grid=4)
TINY_TEXT_L = replace(TEXT_L, width=64, layers=1, projection=96, vocabulary=50)
TINY_TEXT_H = replace(TEXT_H, width=64, layers=1, projection=96, vocabulary=50)
