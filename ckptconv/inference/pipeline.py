"""The running pipeline, from a lone checkpoint or from a diffusers folder.

For a checkpoint no folder is written and no Hub is asked: the modules are made from the generated
configurations, and their weights come from the file through the same plan that `convert` runs.
"""

from __future__ import annotations

import inspect as python_inspect
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ..configs.config import Config, model_index
from ..configs.original_config import OriginalConfig
from ..configs.tokenizer import tokenizer_files
from ..conversion.convert import configured, option_for, plan_file
from ..detection.detect import inspect
from ..dtypes import CASTS as DTYPES
from ..dtypes import FLOATS, torch_dtype
from ..errors import DeviceError, FileRefused, Incomplete, UsageError
from ..files import read_json
from ..folder.names import INDEX
from ..folder.weights import component_headers
from ..libraries import quiet, reading, uncollected
from ..maps.architecture import Architecture, KeyMaps, Task, bundled
from ..options import Choices, Options, checked
from ..planning.plan import Plan
from .device import check_dtype, free_memory, memory_errors, pick_device, spread
from .weights import Devices, component_class, empty_module, fill

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

__all__ = ["OFFLOADS", "load_pipeline", "pipeline_class"]

OFFLOADS = {
    "model": "enable_model_cpu_offload",
    "sequential": "enable_sequential_cpu_offload",
}
"""How weights wait in main memory for their turn on the GPU, and the method of diffusers."""

EXACT_IN_FP16 = {"F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
"""Dtypes whose every value is a value of float16."""

LESS_MEMORY = (
    "take --offload model, or --offload sequential for the least memory; --dtype fp16 or bf16 "
    "halves the weights of an fp32 file"
)

log = logging.getLogger(__name__)


@checked
def load_pipeline(
    path: str | Path,
    *,
    device: str = "auto",
    task: str | None = None,
    components: Mapping[str, Any] | None = None,
    offload: str | None = None,
    device_map: str | None = None,
    ignore_unclaimed: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **choices: Unpack[Choices],
) -> Any:
    """Loads a checkpoint, or a diffusers folder, as a pipeline of diffusers.

    Weights of several dtypes, or of fp8, are cast to one that holds all of their values, unless
    `dtype` says otherwise. A folder takes no other option than `dtype`. On the CPU, weights that
    keep their dtype are a view of the file: do not write to it while the pipeline lives.

    Args:
        path: a checkpoint, or a folder with `model_index.json`.
        device: `cuda`, `cuda:1`, `mps`, `cpu`, or `auto` for the first of them that is there; why
            it was taken goes to the log.
        task: one of `TASKS`, such as `text-to-image`, that the weights can do; by default what
            the weights are made for.
        components: ready objects that take the place of the file's, by name, such as a VAE that
            two pipelines share; None leaves a component out.
        offload: `model` or `sequential`: weights wait in main memory for their turn on the GPU.
        device_map: `balanced` spreads a model that outgrows one GPU over all of them.
        ignore_unclaimed: load a file that has keys which no map knows.
        progress: is called with bytes in place and bytes in all, from one thread at a time.
        **choices: see `Options`.

    Returns:
        The `DiffusionPipeline` of that task, untyped because its attributes depend on its class;
        its modules are in eval mode.

    Raises:
        FileRefused: the file, the folder, a donor or the original configuration cannot be used.
        UsageError: the arguments contradict each other or the file.
        DeviceError: the device is missing, too small, or cannot compute in the dtype.
        MapError: a configuration and the weights do not agree: a fault of the key maps.
    """
    path, given, options = Path(path), dict(components or {}), Options.of(choices)
    with uncollected(), memory_errors(f"loading {path}", LESS_MEMORY), quiet():
        place = _placed(device, offload, device_map)
        home = pick_device("cpu")[0] if offload else place
        if path.is_dir():
            pipe = _from_folder(path, task, given, home, device_map, options)
        else:
            made, original = _planned(path, given, options)
            made.require_complete(ignore_unclaimed=ignore_unclaimed)
            pipe = _built(made, original, task, given, home, device_map, options, progress)
        if offload:
            getattr(pipe, OFFLOADS[offload])(device=place)
    return pipe


def pipeline_class(
    path: str | Path, task: str | None = None
) -> tuple[type[DiffusionPipeline], str]:
    """Returns the class that `load_pipeline` would make, and the name of its task.

    Args:
        path: a checkpoint, or a folder with `model_index.json`.
        task: as for `load_pipeline`.

    Raises:
        FileRefused: the file is no known checkpoint, or the folder no pipeline.
        UsageError: the weights cannot do the task.
    """
    path = Path(path)
    own = _own_class(path) if path.is_dir() else _whole(path)[1].pipeline
    with uncollected(), quiet():
        return _class_for(own, task)


def _placed(device: str, offload: str | None, device_map: str | None) -> torch.device:
    """Returns the device that computes, once the arguments agree."""
    if offload not in (None, *OFFLOADS):
        known = ", ".join(OFFLOADS)
        raise UsageError(f"offload {offload!r} is unknown", hint=f"it is one of {known}")
    if device_map not in (None, "balanced"):
        raise UsageError(f"device map {device_map!r} is unknown", hint="it can only be balanced")
    if offload and device_map:
        raise UsageError(
            "offload and device map exclude each other", hint="one is for one GPU, one for several"
        )
    place, reason = pick_device(device)
    log.info("device %s: %s", place, reason)
    if offload and place.type == "cpu":
        raise DeviceError(f"offload needs a GPU, and the device is {place}", hint="leave it out")
    if device_map and place.type != "cuda":
        raise DeviceError(f"a device map needs CUDA, not {place}", hint="leave it out")
    return place


def _class_for(own: str, task: str | None) -> tuple[type[DiffusionPipeline], str]:
    """Returns the class for a task, and the task, of weights that are made for the class `own`."""
    import diffusers

    known = bundled().pipelines.get(own, Task(own, own))
    own_task = known.name
    classes = {own_task: own, **known.also}
    name = classes.get(task or own_task)
    if name is None:
        raise UsageError(
            f"the weights are made for {own_task}, and cannot do {task}",
            hint=f"they can do {', '.join(classes)}",
        )
    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise FileRefused(
            f"diffusers {diffusers.__version__} has no pipeline {name}", hint="upgrade diffusers"
        )
    return found, task or own_task


def _planned(
    path: Path, given: Mapping[str, Any], options: Options
) -> tuple[Plan, OriginalConfig | None]:
    """Returns the plan for what is not given, with all weights in one dtype."""
    if given:
        architecture, _ = _whole(path, options.maps)
        only = architecture.components if options.only is None else options.only
        options = replace(options, only=frozenset(only) - set(given))
    made, original = plan_file(path, options)
    _refuse_single(path, made.detection.require()[0])
    if made.absent:
        supplies = ", ".join(option_for(made, name) for name in made.absent)
        raise Incomplete(
            f"{path}: the file has no {' and no '.join(made.absent)}, which its pipeline needs",
            hint=f"supply what is missing: {supplies}; or, in Python, load_pipeline(..., "
            f"components={{{made.absent[0]!r}: None}}) leaves it out",
        )
    if options.dtype is None and (dtype := _common_dtype(_dtypes(made))):
        log.info("%s: the weights become %s, which holds all of their values", path, dtype)
        made = made.cast(dtype)
    return made, original


def _whole(path: Path, maps: KeyMaps | None = None) -> tuple[Architecture, Task]:
    """Returns the architecture of a checkpoint that is more than one component, and its task."""
    architecture, task = inspect(path, maps=maps).require()
    _refuse_single(path, architecture)
    return architecture, task


def _refuse_single(path: Path, architecture: Architecture) -> None:
    if architecture.single:
        raise FileRefused(
            f"{path}: is no pipeline: it holds a {architecture.single.replace('_', ' ')} alone",
            hint="give the checkpoint that it belongs to; `ckptconv convert` makes a folder of it, "
            "which load_pipeline(..., components=) can take in",
        )


def _dtypes(made: Plan) -> set[str]:
    """Returns the float dtypes of the components' tensors."""
    architecture, _ = made.detection.require()
    slots = [slot for c in architecture.models for slot in made.tensors(c.name).values()]
    return {slot.dtype for slot in slots if slot.dtype in FLOATS}


def _common_dtype(stored: set[str]) -> str | None:
    """Returns what weights of these dtypes are cast to; None if they can stay as they are.

    A pipeline computes in one dtype: no layer takes the output of a layer of another, and in fp8
    there are no layers at all.
    """
    if len(stored) <= 1 and stored <= set(DTYPES.values()):
        return None
    return "fp16" if stored <= EXACT_IN_FP16 else "fp32"


def _built(
    made: Plan,
    original: OriginalConfig | None,
    task: str | None,
    given: Mapping[str, Any],
    device: torch.device,
    device_map: str | None,
    options: Options,
    progress: Callable[[int, int], None],
) -> Any:
    """Makes the pipeline of a plan."""
    import torch

    cls, _ = _class_for(made.detection.require()[1].pipeline, task)
    only = options.only
    built, notes = configured(made, original)
    wanted = {n: c for n, c in built.items() if n not in given and (only is None or n in only)}
    arguments: dict[str, Any] = {
        name: None if isinstance(value, list) else value
        for name, value in model_index(made, built).items()
        if not name.startswith("_")
    }
    arguments |= dict.fromkeys(wanted)
    arguments |= given
    taken = _taken(cls, arguments, given)
    stored = next(iter(_dtypes(made)), "F32")
    check_dtype(device, next(name for name, dtype in DTYPES.items() if dtype == stored))
    donors = {name for name, donor in made.donors.items() if donor.config}
    changed = {step.targets[0].component for step in made.steps if step.changes}
    if lost := ", ".join(sorted(donors & changed)):  # its library loads it, and knows no adapter
        raise UsageError(
            f"an adapter changes {lost}, which comes from a diffusers folder",
            hint="convert the checkpoint with --lora, and load the folder that comes out",
        )
    modules = {
        name: empty_module(config)
        for name, config in wanted.items()
        if config.component.kind == "model" and name not in donors
    }
    devices: dict[str, Devices] = {name: {"": device} for name in modules}
    if device_map:
        devices |= {
            name: {part: torch.device("cuda", gpu) for part, gpu in gpus.items()}
            for name, gpus in spread(modules, torch_dtype(stored), free_memory()).items()
        }
    for note in [*made.notes, *notes, *fill(modules, made, devices, progress)]:
        log.warning("%s", note)
    for name, config in wanted.items():
        if name in donors:
            arguments[name] = _from_donor(config, made, torch_dtype(stored), device)
        elif name in modules:
            arguments[name] = _connected(modules[name], devices[name])
        else:
            arguments[name] = _without_weights(config)
    return cls(**{name: arguments[name] for name in taken})


def _taken(cls: type, arguments: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Returns the arguments that a pipeline takes; which it needs follows from its constructor."""
    parameters = python_inspect.signature(cls).parameters
    if unknown := sorted(given.keys() - parameters.keys()):
        raise UsageError(
            f"{cls.__name__} has no component {', '.join(unknown)}",
            hint=f"its components are {', '.join(parameters)}",
        )
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in arguments
    ]
    if missing:
        raise UsageError(
            f"{cls.__name__} needs {', '.join(missing)}, which ckptconv cannot build yet",
            hint=f"in Python, load_pipeline(..., components={{{missing[0]!r}: ...}}) supplies it",
        )
    return [name for name in parameters if name in arguments]


def _connected(module: torch.nn.Module, devices: Devices) -> torch.nn.Module:
    """Lets the parts of a module that lie on several GPUs pass their outputs on."""
    if len(set(devices.values())) == 1:
        return module
    from accelerate import dispatch_model  # type: ignore[import-untyped]  # it has none

    gpus = {part: device.index for part, device in devices.items()}
    dispatched: torch.nn.Module = dispatch_model(module, gpus, main_device=min(gpus.values()))
    return dispatched


def _from_donor(config: Config, made: Plan, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads a component from a diffusers folder, whose older names only the library knows."""
    name = config.component.name
    folder, headers = Path(made.donors[name].config or ""), made.donors[name].headers
    choices = reading(dtype, [header.path for header in headers])
    return component_class(config).from_pretrained(folder.parent, **choices).to(device).eval()


def _without_weights(config: Config) -> Any:
    """Makes a scheduler, an image processor or a tokenizer."""
    cls = component_class(config)
    if config.component.kind == "scheduler":
        return cls.from_config(dict(config.values))
    if config.component.kind == "processor":
        return cls.from_dict(dict(config.values))
    # The constructor of a tokenizer takes paths before release 5 of transformers, and tables since:
    # only files do for both. They are what `convert` writes, so the tokenizer is the same.
    with tempfile.TemporaryDirectory(prefix="ckptconv-") as folder:
        for file, text in tokenizer_files(config.values).items():
            Path(folder, file).write_text(text, encoding="utf-8")
        tokenizer = cls.from_pretrained(folder, local_files_only=True)
    tokenizer.name_or_path = ""
    return tokenizer


def _own_class(folder: Path) -> str:
    """Returns the name of the pipeline that a folder is for."""
    if not (folder / INDEX).is_file():
        raise FileRefused(
            f"{folder}: holds no {INDEX}", hint="give a checkpoint, or a whole diffusers folder"
        )
    return str(read_json(folder / INDEX).get("_class_name"))


def _from_folder(
    path: Path,
    task: str | None,
    given: Mapping[str, Any],
    device: torch.device,
    device_map: str | None,
    options: Options,
) -> Any:
    """Lets diffusers load a folder."""
    default = Options()
    names = [field.name for field in fields(Options) if field.name not in ("dtype", "maps")]
    if unfit := sorted(n for n in names if getattr(options, n) != getattr(default, n)):
        raise UsageError(
            f"{', '.join(unfit)}: for a checkpoint only, and {path} is a folder",
            hint="its configuration files say it all: edit them, or convert the checkpoint anew",
        )
    cls, _ = _class_for(_own_class(path), task)
    folders = [p.parent for p in sorted(path.glob("*/config.json")) if p.parent.name not in given]
    headers = [header for folder in folders for header in component_headers(folder)]
    stored = {info.dtype for h in headers for info in h.tensors.values() if info.dtype in FLOATS}
    name = options.dtype or _common_dtype(stored)
    dtype = DTYPES[name] if name else next(iter(stored), "F32")
    check_dtype(device, next(name for name, known in DTYPES.items() if known == dtype))
    arguments = reading(torch_dtype(dtype), [header.path for header in headers])
    if device_map:
        arguments["device_map"] = device_map
    try:
        pipe: Any = cls.from_pretrained(path, **arguments, **given)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError) as error:
        raise FileRefused(
            f"{path}: diffusers cannot load the folder: {error}",
            hint="`ckptconv verify` shows what is wrong with a converted folder",
        ) from error
    if not device_map and device.type != "cpu":  # it is there already
        pipe.to(device)
    return pipe
