"""MiDaS's DPT-Hybrid depth estimator in its original layout, in plain torch.

``Dpt(config).state_dict()`` has exactly the keys that follow ``depth_model.model.`` in SD 2's
depth-to-image files. A residual network with weight-standardised convolutions turns the image into
patches for a vision transformer; features of two of its stages and of two of the transformer's
layers are fused, coarsest first, into a map of inverse depth.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.reference.text import attention


@dataclass(frozen=True)
class DptConfig:
    """Hyper-parameters; the defaults are those of ``dpt_hybrid``, as published.

    Attributes:
        stem: Channels after the first convolution. All group norms have 32 groups.
        stages: Channels of the residual stages; a bottleneck is a quarter as wide.
        depths: Blocks of each stage.
        width: Width of the transformer; a head is 64 wide.
        layers: Number of transformer layers.
        hooks: The two layers, from 0, whose output is used.
        grid: Patches along an edge of the image; a patch is 16 pixels wide.
        neck: Channels that the outputs of the two layers are brought to.
        fusion: Channels of the fused features.
        head: Channels before the last convolution.
        classes: Outputs of the transformer's classifier, which is in the file and never used.
    """

    stem: int = 64
    stages: tuple[int, int, int] = (256, 512, 1024)
    depths: tuple[int, int, int] = (3, 4, 9)
    width: int = 768
    layers: int = 12
    hooks: tuple[int, int] = (8, 11)
    grid: int = 24
    neck: tuple[int, int] = (768, 768)
    fusion: int = 256
    head: int = 32
    classes: int = 1000


def pad_same(x: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    """Pad so that a window leaves 1 / stride of the pixels, rounded up; the odd one goes last.

    Args:
        x: Feature map, shape [B, C, H, W].
        kernel: Edge of the window, in pixels.
        stride: Step of the window, in pixels.
        value: What to pad with.

    Returns:
        Feature map, shape [B, C, H', W'].
    """
    sides: list[int] = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return functional.pad(x, sides, value=value)


class StdConv(nn.Conv2d):
    """Convolution whose weights are brought to mean 0 and variance 1 per output channel."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, out_channels, kernel, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / (variance + 1e-8).sqrt()
        x = pad_same(x, self.kernel_size[0], self.stride[0], 0.0)
        return functional.conv2d(x, weight, stride=self.stride)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-5)


class Shortcut(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = StdConv(channels, out_channels, 1, stride)
        self.norm = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class Bottleneck(nn.Module):
    """Three convolutions, normed after; the first block of a stage widens its shortcut, too."""

    def __init__(self, channels: int, out_channels: int, stride: int, first: bool) -> None:
        super().__init__()
        inner = out_channels // 4
        if first:
            self.downsample = Shortcut(channels, out_channels, stride)
        self.conv1, self.norm1 = StdConv(channels, inner, 1), _norm(inner)
        self.conv2, self.norm2 = StdConv(inner, inner, 3, stride), _norm(inner)
        self.conv3, self.norm3 = StdConv(inner, out_channels, 1), _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.norm1(self.conv1(x)))
        h = functional.relu(self.norm2(self.conv2(h)))
        h = self.norm3(self.conv3(h))
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        return functional.relu(h + shortcut)


class Stem(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = StdConv(3, channels, 7, stride=2)
        self.norm = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = pad_same(functional.relu(self.norm(self.conv(x))), 3, 2, -math.inf)
        return functional.max_pool2d(h, 3, stride=2)


class Stage(nn.Module):
    def __init__(self, channels: int, out_channels: int, depth: int, stride: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Bottleneck(channels, out_channels, stride, first=True),
            *(Bottleneck(out_channels, out_channels, 1, first=False) for _ in range(depth - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


class Backbone(nn.Module):
    def __init__(self, config: DptConfig) -> None:
        super().__init__()
        self.stem = Stem(config.stem)
        widths = (config.stem, *config.stages)
        self.stages = nn.ModuleList(
            Stage(widths[i], widths[i + 1], config.depths[i], 1 if i == 0 else 2) for i in range(3)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the output of each stage, at 1/4, 1/8 and 1/16 of the image."""
        x, outputs = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class PatchEmbed(nn.Module):
    def __init__(self, config: DptConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.proj = nn.Conv2d(config.stages[-1], config.width, 1)


class VitAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out: Tensor = self.proj(attention(q, k, v, self.heads))
        return out


class VitMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class VitBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VitAttention(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = VitMlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class HybridVit(nn.Module):
    def __init__(self, config: DptConfig) -> None:
        super().__init__()
        self.hooks = config.hooks
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.randn(1, config.grid**2 + 1, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VitBlock(config.width) for _ in range(config.layers))
        # The classifier and the norm before it: trained with the transformer, unused for depth.
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the feature maps of the first two stages and the tokens of the two layers."""
        maps = self.patch_embed.backbone(x)
        patches = self.patch_embed.proj(maps[-1]).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), patches], dim=1)
        tokens, outputs = tokens + self.pos_embed, []
        for block in self.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        return maps[:2], [outputs[hook] for hook in self.hooks]


class Readout(nn.Module):
    """Mixes the class token into every patch, and lays the patches out as a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(2 * width, width), nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, 1:]
        mixed = self.project(torch.cat([patches, tokens[:, :1].expand_as(patches)], dim=-1))
        edge = math.isqrt(patches.shape[1])
        out: Tensor = mixed.transpose(1, 2).unflatten(2, (edge, edge))
        return out


def reassemble(width: int, channels: int, *more: nn.Module) -> nn.Sequential:
    # The readout lays out the map itself; the Identities keep the convolution at place 3.
    project = nn.Conv2d(width, channels, 1)
    return nn.Sequential(Readout(width), nn.Identity(), nn.Identity(), project, *more)


class Pretrained(nn.Module):
    def __init__(self, config: DptConfig) -> None:
        super().__init__()
        self.model = HybridVit(config)
        fine, coarse = config.neck
        self.act_postprocess3 = reassemble(config.width, fine)
        halve = nn.Conv2d(coarse, coarse, 3, stride=2, padding=1)
        self.act_postprocess4 = reassemble(config.width, coarse, halve)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return four feature maps, at 1/4, 1/8, 1/16 and 1/32 of the image."""
        maps, (fine, coarse) = self.model(x)
        return [*maps, self.act_postprocess3(fine), self.act_postprocess4(coarse)]


class ResidualConvUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(functional.relu(self.conv1(functional.relu(x))))
        return out


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class FeatureFusion(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, 1)
        self.resConfUnit1 = ResidualConvUnit(channels)
        self.resConfUnit2 = ResidualConvUnit(channels)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        out: Tensor = self.out_conv(_double(self.resConfUnit2(x)))
        return out


class Scratch(nn.Module):
    """The fusion, and the convolutions that turn its result into depth."""

    def __init__(self, config: DptConfig) -> None:
        super().__init__()
        channels = (*config.stages[:2], *config.neck)
        for i in range(4):
            rn = nn.Conv2d(channels[i], config.fusion, 3, padding=1, bias=False)
            self.add_module(f"layer{i + 1}_rn", rn)
            self.add_module(f"refinenet{i + 1}", FeatureFusion(config.fusion))
        self.output_conv = nn.Sequential(
            nn.Conv2d(config.fusion, config.fusion // 2, 3, padding=1),
            nn.UpsamplingBilinear2d(scale_factor=2),  # aligns the corners, as `_double` does
            nn.Conv2d(config.fusion // 2, config.head, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.head, 1, 1),
            nn.ReLU(),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        path: Tensor | None = None
        for i in (4, 3, 2, 1):
            finer = self.get_submodule(f"layer{i}_rn")(maps[i - 1])
            fuse = self.get_submodule(f"refinenet{i}")
            path = fuse(finer) if path is None else fuse(path, finer)
        out: Tensor = self.output_conv(path)
        return out


class Dpt(nn.Module):
    """The original depth estimator.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: DptConfig) -> None:
        super().__init__()
        self.config = config
        self.pretrained = Pretrained(config)
        self.scratch = Scratch(config)

    def forward(self, image: Tensor) -> Tensor:
        """Estimate depth.

        Args:
            image: Images in -1 to 1, shape [B, 3, S, S]; S is 16 times ``grid`` pixels.

        Returns:
            Inverse depth up to scale and shift, never negative, shape [B, S, S].
        """
        out: Tensor = self.scratch(self.pretrained(image))
        return out.squeeze(1)


DPT_HYBRID = DptConfig()

# A bottleneck is a quarter of its stage: at 128 a norm's group would be one channel. Depths, layers
# and hooks are as published: no shape tells which layers are used.
TINY_DPT = replace(
    DPT_HYBRID,
    stages=(256, 384, 512),
    width=128,
    grid=4,
    neck=(96, 160),
    fusion=64,
    classes=10,
)
