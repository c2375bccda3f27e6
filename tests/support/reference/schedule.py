"""The noise schedules that files hold as buffers, in plain torch.

They are computed on the CPU even where a network is only laid out: on the meta device, arithmetic
imports torch's compiler, which takes seconds.
"""

import math

import torch
from torch import Tensor, nn

from tests.support.reference.unet import timestep_embedding


def scaled_linear(start: float, end: float, steps: int = 1000) -> Tensor:
    """Return variances evenly spaced in the square root.

    Args:
        start: First variance: 0.00085 in SD 1 and SD 2, 1e-4 in the x4 upscaler.
        end: Last variance: 0.012 in SD 1 and SD 2, 0.02 in the x4 upscaler.
        steps: Number of steps.

    Returns:
        Float64 tensor of shape [steps].
    """
    roots = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64, device="cpu")
    return roots**2


def squared_cosine(steps: int = 1000) -> Tensor:
    """Return variances under which the signal falls as a squared cosine; at most 0.999.

    Args:
        steps: Number of steps.

    Returns:
        Float64 tensor of shape [steps].
    """
    times = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
    kept = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - kept[1:] / kept[:-1]).clamp(max=0.999)


class Schedule(nn.Module):
    """The buffers of a noise schedule, float32.

    Args:
        betas: Variances, shape [steps].
        posterior: Whether the four of the reverse process are there, as in a diffusion model's own
            schedule, whose keys have no prefix.
    """

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(self, betas: Tensor, *, posterior: bool) -> None:
        super().__init__()
        kept = (1 - betas).cumprod(dim=0)
        before = torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
        buffers = {
            "betas": betas,
            "alphas_cumprod": kept,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": kept.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - kept).log(),
            "sqrt_recip_alphas_cumprod": (1 / kept).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / kept - 1).sqrt(),
        }
        if posterior:
            variance = betas * (1 - before) / (1 - kept)
            buffers |= {
                "posterior_variance": variance,
                "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
                "posterior_mean_coef1": betas * before.sqrt() / (1 - kept),
                "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - kept),
            }
        for name, values in buffers.items():
            self.register_buffer(name, values.float())

    def noised(self, x: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Return something with noise.

        Args:
            x: Tensor of shape [B, ...].
            level: Integer noise levels, shape [B].
            noise: Standard normal noise, the shape of ``x``.

        Returns:
            Tensor of the shape of ``x``.
        """
        shape = (-1, *[1] * (x.ndim - 1))
        signal = self.sqrt_alphas_cumprod[level].view(shape)
        return signal * x + self.sqrt_one_minus_alphas_cumprod[level].view(shape) * noise


class NoiseAugmentation(Schedule):
    """Noise on an image embedding: what unCLIP files hold behind ``noise_augmentor.``.

    The mean and the deviation of the data are in no file: those of ViT-L come in one of their own,
    those of ViT-H are 0 and 1.
    """

    def __init__(self) -> None:
        super().__init__(squared_cosine(), posterior=False)

    def forward(
        self,
        x: Tensor,
        level: Tensor,
        noise: Tensor,
        mean: Tensor | float = 0.0,
        std: Tensor | float = 1.0,
    ) -> Tensor:
        """Return the vector behind ``label_emb``.

        Args:
            x: Image embedding, shape [B, W].
            level: Integer noise levels, shape [B].
            noise: Standard normal noise, shape [B, W].
            mean: Mean of the data, shape [W], or one number.
            std: Standard deviation of the data, shape [W], or one number.

        Returns:
            The embedding with noise, then the embedded level: shape [B, 2 W].
        """
        noised = self.noised((x - mean) / std, level, noise) * std + mean
        return torch.cat([noised, timestep_embedding(level, x.shape[1]).to(x.dtype)], dim=1)
