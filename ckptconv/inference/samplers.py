"""Samplers by the names that web UIs give them, as schedulers of diffusers.

The tables are those of "Schedulers" in the documentation of diffusers:
https://huggingface.co/docs/diffusers/api/schedulers/overview
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Setting = Mapping[str, Any]

SAMPLERS: Mapping[str, tuple[str, Setting]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ SDE": ("DPMSolverSinglestepScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "PLMS": ("PNDMScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
"""By sampler, its class and settings."""

SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Settings that choose how noise levels are spaced: a sampler without a schedule has none."""

SCHEDULES: Mapping[str, Setting] = {
    "": {},
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True, "timestep_spacing": "linspace"},
    "Beta": {"use_beta_sigmas": True, "timestep_spacing": "linspace"},
    "SGM Uniform": {"timestep_spacing": "trailing"},
    "Simple": {"timestep_spacing": "trailing"},
}
"""By the word that may follow the name of a sampler, such as `DPM++ 2M Karras`, its settings."""

NAMED: Mapping[str, tuple[str, Setting]] = {
    f"{sampler} {schedule}".strip(): (cls, {**settings, **spacing})
    for sampler, (cls, settings) in SAMPLERS.items()
    for schedule, spacing in SCHEDULES.items()
}
"""Both tables, by the whole name."""
