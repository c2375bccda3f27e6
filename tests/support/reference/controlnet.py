"""The ControlNet in its original layout, in plain torch.

``ControlNet(config).state_dict()`` has exactly the keys that follow ``control_model.`` in published
files: the input side and the middle of a UNet, one 1x1 convolution behind each of their blocks
(``zero_convs`` and ``middle_block_out``), and a small network for the hint.
"""

from typing import NamedTuple

from torch import Tensor, nn

from tests.support.reference import unet
from tests.support.reference.unet import Trunk, UNetConfig, run

HINT_CHANNELS = (16, 16, 32, 32, 96, 96, 256)
"""Outputs of the hint's convolutions but the last, in every published file. The third, fifth and
seventh halve the resolution, so that the hint meets the latents of an image of its size."""


class ControlOutput(NamedTuple):
    """What a ControlNet adds to a UNet, at full strength.

    Attributes:
        down: One tensor for each input block, to be added to its output where a skip takes it.
        middle: What is added to the output of the middle.
    """

    down: tuple[Tensor, ...]
    middle: Tensor


def hint_block(channels: int, out_channels: int) -> nn.Sequential:
    """Return the network that brings a hint to the size of the latents.

    Args:
        channels: Channels of the hint.
        out_channels: Channels of the UNet's first level.

    Returns:
        Eight convolutions at the even places 0 to 14, SiLU between them.
    """
    layers: list[nn.Module] = []
    for i, out in enumerate((*HINT_CHANNELS, out_channels)):
        stride = 2 if i in (2, 4, 6) else 1
        layers += [nn.Conv2d(channels, out, 3, padding=1, stride=stride), nn.SiLU()]
        channels = out
    return nn.Sequential(*layers[:-1])


def zero_conv(channels: int) -> nn.Sequential:
    """Return a 1x1 convolution in a container of its own; training starts it at zero."""
    return nn.Sequential(nn.Conv2d(channels, channels, 1))


class ControlNet(Trunk):
    """The original ControlNet.

    Args:
        config: The hyper-parameters of the UNet that it steers; ``output_depth`` is unused.
        hint_channels: Channels of the hint.
    """

    def __init__(self, config: UNetConfig, hint_channels: int = 3) -> None:
        super().__init__(config)
        self.input_hint_block = hint_block(hint_channels, config.model_channels)
        self.zero_convs = nn.ModuleList(zero_conv(channels) for channels in self.skips)
        self.middle_block_out = zero_conv(self.channels)

    def forward(
        self,
        x: Tensor,
        hint: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
    ) -> ControlOutput:
        """Compute the residuals for a UNet.

        Args:
            x: Noisy latents, shape [B, in_channels, H, W].
            hint: Image that steers, shape [B, hint_channels, 8 H, 8 W].
            timesteps: Shape [B].
            context: Text embedding, shape [B, T, context_dim].
            y: See ``Trunk.embed``.

        Returns:
            A tensor for each input block, and one for the middle.
        """
        emb = self.embed(timesteps, y)
        h, down = x, []
        for i, (block, conv) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            h = run(block, h, emb, context)
            if i == 0:
                h = h + self.input_hint_block(hint)
            down.append(conv(h))
        if self.middle_block is not None:
            h = run(self.middle_block, h, emb, context)
        return ControlOutput(tuple(down), self.middle_block_out(h))


CONTROL_SD1 = unet.SD15
CONTROL_SD2 = unet.SD21
CONTROL_SDXL = unet.SDXL
TINY_CONTROL_SD1 = unet.TINY_SD1
TINY_CONTROL_SD2 = unet.TINY_SD2
TINY_CONTROL_SDXL = unet.SHALLOW_SDXL
