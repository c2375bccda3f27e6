"""Changes to a loaded pipeline: another scheduler, and LoRA files."""

from __future__ import annotations

import difflib
import inspect as python_inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..configs.allowed import scheduler_class
from ..errors import FileRefused, UsageError
from ..options import AdapterFile, adapter_file
from ..planning.adapters import refuse_control
from ..reading.header import read_header
from .generation import Pipeline
from .samplers import NAMED, SAMPLERS, SIGMAS

PUBLISHED = {"skip_prk_steps": True}
"""What the published configurations of these models say, where a scheduler's default is another."""

EDM = "sigma_data"
"""What only schedulers of the EDM formulation take (https://arxiv.org/abs/2206.00364)."""


def read_loras(texts: Iterable[str]) -> list[AdapterFile]:
    """Reads the headers of the LoRA files that `FILE` or `FILE:SCALE` name.

    Raises:
        FileRefused: a file is not a whole, well-formed safetensors file.
        UsageError: a scale is not finite.
    """
    loras = [adapter_file(text) for text in texts]
    for lora in loras:
        read_header(lora.path)  # diffusers would unpickle a PyTorch file
    return loras


def add_loras(pipe: Pipeline, loras: Sequence[AdapterFile]) -> None:
    """Loads LoRA files into a pipeline, by diffusers, each with its scale.

    Raises:
        FileRefused: a file is no LoRA, one for another architecture, or a control adapter.
    """
    names = [f"lora_{n}" for n in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        problems = ["none of its keys is one of the pipeline's layers"]
        cause: Exception | None = None
        network = getattr(pipe, "transformer", None)
        if columns := getattr(getattr(network, "x_embedder", None), "in_features", 0):
            refuse_control(read_header(lora.path), columns)
        try:
            pipe.load_lora_weights(
                str(lora.path.parent),
                weight_name=lora.path.name,
                adapter_name=name,
                local_files_only=True,
            )
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            problems, cause = [line.strip() for line in str(error).splitlines()], error
        if cause or not any(name in there for there in pipe.get_list_adapters().values()):
            raise FileRefused(
                f"{lora.path}: diffusers cannot load it as a LoRA of {type(pipe).__name__}",
                problems=problems,
                hint="give a LoRA that was trained on this architecture",
            ) from cause
    if loras:
        pipe.set_adapters(names, [lora.scale for lora in loras])


def find_scheduler(name: str) -> tuple[Any, dict[str, Any]]:
    """Returns the class of a scheduler that has the noise schedules of these models, and settings.

    Args:
        name: of the class, or what web UIs call the sampler, such as `DPM++ 2M Karras`.

    Raises:
        UsageError: diffusers has no such scheduler, it lacks a library, or does not take the
            settings.
    """
    known = {sampler.lower(): sampler for sampler in NAMED}
    sampler = known.get(" ".join(name.lower().split()), "")
    cls, settings = NAMED.get(sampler, (name, {}))
    found = scheduler_class(cls)
    if not found:
        near = [known[each] for each in difflib.get_close_matches(name.lower(), known, 3, 0.5)]
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(SAMPLERS)}"
        raise UsageError(f"diffusers has no scheduler {name} for these models", hint=hint)
    takes = _takes(found)
    if unfit := ", ".join(sorted(settings.keys() - takes)):
        hint = "give the sampler without the schedule that follows its name"
        raise UsageError(f"{sampler}: {cls} does not take {unfit}", hint=hint)
    plain = dict.fromkeys(SIGMAS if sampler else (), False)
    return found, {k: v for k, v in {**plain, **settings}.items() if k in takes}


def set_scheduler(pipe: Pipeline, scheduler: Any, settings: Mapping[str, Any]) -> list[str]:
    """Puts another scheduler into a pipeline, with the configuration of the one it has.

    Args:
        pipe: to change.
        scheduler: from `find_scheduler`.
        settings: likewise; they win over the configuration.

    Returns:
        Sentences on what it cannot carry over.

    Raises:
        UsageError: one of the two steps through noise levels of the EDM formulation, and the other
            through a schedule of betas; or the settings need a library that is missing.
    """
    config, takes = pipe.scheduler.config, _takes(scheduler)
    if (EDM in config) != (EDM in takes):
        fit = "EDMEulerScheduler or EDMDPMSolverMultistepScheduler"
        raise UsageError(
            f"{scheduler.__name__} cannot step for a model of {type(pipe.scheduler).__name__}",
            hint=f"take {fit}" if EDM in config else f"take another than {fit}",
        )
    unsaid = {k: v for k, v in PUBLISHED.items() if k in takes and k not in config}
    try:
        pipe.scheduler = scheduler.from_config(config, **unsaid, **settings)
    except ImportError as error:
        hint = "install it, or choose another sampler"
        raise UsageError(f"{scheduler.__name__} lacks a library: {error}", hint=hint) from error
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in takes:
        name = scheduler.__name__
        return [f"{name} knows no zero terminal SNR, which the model was trained with"]
    return []


def _takes(scheduler: Any) -> set[str]:
    return set(python_inspect.signature(scheduler).parameters)
