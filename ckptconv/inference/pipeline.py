"""The running pipeline, from a lone checkpoint or from a diffusers folder.

No folder is written and no Hub is asked: the modules are made from the configurations, and their
weights come from the files through the same steps that `convert` runs.
"""

from __future__ import annotations

import contextlib
import inspect as python_inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ..dtypes import CASTS, FP8, torch_dtype
from ..errors import CkptconvError, DeviceError, FileRefused, UsageError, option
from ..libraries import find_class, is_out_of_memory, library_version
from ..maps.architecture import Task, bundled
from ..options import Choices, Options, checked
from ..planning.step import Step, Target, targets_of
from .device import (
    check_dtype,
    free_memory,
    less_memory,
    memory_errors,
    pick_device,
    spread,
)
from .model import VERIFY, Model, open_model
from .modules import component_class, empty_module, from_library, without_weights
from .quantized import keep_quantized, know_blocks
from .weights import Devices, fill, matched

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

OFFLOADS = {
    "model": "enable_model_cpu_offload",
    "sequential": "enable_sequential_cpu_offload",
}
"""How weights wait in main memory for their turn on the GPU, and the method of diffusers."""

NETWORKS = ("unet", "transformer")
"""The components that can keep their weights in fp8. Text encoders run once for an image, and can
wait in main memory; a VAE is small and does not bear it."""


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
    storage: str | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **choices: Unpack[Choices],
) -> Any:
    """Loads a checkpoint, or a diffusers folder, as a pipeline of diffusers.

    Weights of several dtypes, or of fp8, are cast to one that holds all of their values, unless
    `dtype` says otherwise. A folder takes no other option than `dtype`. On the CPU, weights that
    keep their dtype are a view of the file: do not write to it while the pipeline lives. Several
    threads may load at the same time.

    Args:
        path: a checkpoint, or a folder with `model_index.json`.
        device: `cuda`, `cuda:1`, `mps`, `cpu`, or `auto` for the first of them that is there; the
            log says why it was taken.
        task: one of `TASKS`, such as `text-to-image`, that the weights can do; by default what
            the weights are made for.
        components: ready objects that take the place of the file's, by name, such as a VAE that
            two pipelines share; None leaves a component out.
        offload: `model` or `sequential`: weights wait in main memory for their turn on the GPU.
        device_map: `balanced` spreads a model that outgrows one GPU over all of them.
        storage: `fp8` keeps the weights of the UNet or transformer in fp8, and computes in `dtype`,
            or bf16: diffusers' layerwise casting. Its norms and embeddings, the text encoders and
            the VAE stay in that dtype.
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
    names, options = (components or {}).keys(), Options.of(choices)
    return build_pipeline(
        open_model(path, with_storage(options, storage), given=names),
        device=device,
        task=task,
        components=components,
        offload=offload,
        device_map=device_map,
        storage=storage,
        progress=progress,
    )


def with_storage(options: Options, storage: str | None) -> Options:
    """Returns options whose dtype, if none is given, suits weights that are stored otherwise.

    Raises:
        UsageError: the storage is unknown.
    """
    if storage not in (None, FP8):
        raise UsageError(f"storage {storage!r} is unknown", hint=f"it can only be {FP8}")
    return replace(options, dtype="bf16") if storage and not options.dtype else options


def build_pipeline(
    model: Model,
    *,
    device: str = "auto",
    task: str | None = None,
    components: Mapping[str, Any] | None = None,
    offload: str | None = None,
    device_map: str | None = None,
    storage: str | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Any:
    """Builds the pipeline of an opened model; see `load_pipeline` for arguments and errors."""
    with memory_errors(f"loading {model.path}", less_memory()):
        place = _placed(device, offload, device_map)
        if storage and device_map:
            raise UsageError("storage and device map exclude each other", hint="leave one out")
        if storage and place.type == "mps":
            raise DeviceError("MPS has no fp8", hint=f"leave out {option('storage')}")
        cls, _ = pipeline_class(model, task)
        home = pick_device("cpu")[0] if offload else place
        given = dict(components or {})
        pipe = _built(model, cls, given, home, device_map, storage, progress)
        if offload:
            getattr(pipe, OFFLOADS[offload])(device=place)
    return pipe


def pipeline_class(model: Model, task: str | None = None) -> tuple[type[DiffusionPipeline], str]:
    """Returns the class of the pipeline that a model becomes, and the name of its task.

    Args:
        model: from `open_model`.
        task: as for `load_pipeline`.

    Raises:
        FileRefused: diffusers has no such pipeline.
        UsageError: the weights cannot do the task.
    """
    own = str(model.index.get("_class_name"))
    known = bundled().pipelines.get(own, Task(own, own))
    own_task = known.name
    classes = {own_task: own, **known.also}
    name = classes.get(task or own_task)
    if name is None:
        raise UsageError(
            f"the weights are made for {own_task}, and cannot do {task}",
            hint=f"they can do {', '.join(classes)}",
        )
    found = find_class("diffusers", name)
    if found is None or not issubclass(found, find_class("diffusers", "DiffusionPipeline")):
        version = library_version("diffusers")
        raise FileRefused(f"diffusers {version} has no pipeline {name}", hint="upgrade diffusers")
    return found, task or own_task


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


def _built(
    model: Model,
    cls: type[DiffusionPipeline],
    given: Mapping[str, Any],
    device: torch.device,
    device_map: str | None,
    storage: str | None,
    progress: Callable[[int, int], None],
) -> Any:
    import torch

    parameters = python_inspect.signature(cls).parameters
    if unknown := sorted(given.keys() - parameters.keys()):
        raise UsageError(
            f"{cls.__name__} has no component {', '.join(unknown)}",
            hint=f"its components are {', '.join(parameters)}",
        )
    check_dtype(device, model.dtype)
    dtype = torch_dtype(CASTS[model.dtype])
    steps = with_fp32(model) if model.dtype == "fp16" else model.steps
    targets = targets_of(steps, model.identities)
    parts: dict[str, Any] = {}
    modules: dict[str, torch.nn.Module] = {}
    with _refusals(model.path):
        for name, blueprint in model.blueprints.items():
            if name not in parameters:
                continue
            its = component_class(name, blueprint)
            if blueprint.kind != "model":
                parts[name] = without_weights(its, blueprint)
            elif module := empty_module(its, blueprint, targets[name], dtype):
                modules[name] = module
            else:
                files = [source.file for step in model.steps for source in step.sources]
                parts[name] = from_library(its, blueprint, dtype, files).to(device).eval()
    if storage:
        steps = _stored_in_fp8(steps, {**parts, **modules}, dtype)
    arguments = {**model.arguments, **parts, **modules, **given}
    _require(cls, {n for n, p in parameters.items() if p.default is p.empty} - arguments.keys())
    devices: dict[str, Devices] = {name: {"": device} for name in modules}
    if device_map and modules:
        devices = {
            name: {part: torch.device("cuda", gpu) for part, gpu in gpus.items()}
            for name, gpus in spread(modules, dtype, free_memory()).items()
        }
    moved, layers = keep_quantized(modules, steps, dtype)
    for note in [*model.notes, *fill(modules, moved, devices, progress, model.identities)]:
        log.warning("%s", note)
    know_blocks(layers)
    arguments |= {name: _connected(module, devices[name]) for name, module in modules.items()}
    with _refusals(model.path):
        pipe: Any = cls(**{name: arguments[name] for name in parameters if name in arguments})
    if model.path.is_dir():
        pipe.register_to_config(_name_or_path=str(model.path))
    return pipe


def with_fp32(model: Model) -> tuple[Step, ...]:
    """Returns the steps, with those targets in fp32 that their class keeps so in an fp16 model.

    Such as the last layer of T5's feed-forward, whose results are too large for fp16.
    """
    classes = {name: find_class(b.library, b.name) for name, b in model.blueprints.items()}
    kept = {n: {*(getattr(c, "_keep_in_fp32_modules", None) or ())} for n, c in classes.items()}

    def widened(target: Target) -> str:
        named = kept.get(target.component, set()).intersection(target.key.split("."))
        return CASTS["fp32"] if named and target.dtype == CASTS["fp16"] else target.dtype

    return _retyped(model.steps, widened)


def _stored_in_fp8(
    steps: tuple[Step, ...], modules: Mapping[str, torch.nn.Module], dtype: torch.dtype
) -> tuple[Step, ...]:
    """Sets up layerwise casting; returns the steps, with those targets in fp8 that it keeps so."""
    import torch

    name = next((name for name in NETWORKS if name in modules), None)
    if name is None:
        raise UsageError(
            f"{option('storage', FP8)} is for a {' or '.join(NETWORKS)}, and none is loaded",
            hint="call enable_layerwise_casting on a component that you supply",
        )
    network: Any = modules[name]
    if not hasattr(network, "enable_layerwise_casting"):
        what = f"diffusers {library_version('diffusers')} has no layerwise casting"
        raise UsageError(what, hint="upgrade diffusers to 0.33 or later")
    network.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
    names, _ = matched(network, targets_of(steps)[name])
    narrow = {k for k, v in network.state_dict().items() if v.dtype == torch.float8_e4m3fn}

    def narrowed(target: Target) -> str:
        own = target.component == name and names.get(target.key) in narrow
        return CASTS[FP8] if own else target.dtype

    return _retyped(steps, narrowed)


def _retyped(steps: tuple[Step, ...], dtype_of: Callable[[Target], str]) -> tuple[Step, ...]:
    return tuple(
        replace(step, targets=tuple(replace(t, dtype=dtype_of(t)) for t in step.targets))
        for step in steps
    )


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turns what a library says of a folder into an error of ours."""
    try:
        yield
    except CkptconvError:
        raise
    except Exception as error:  # whatever the class says of a bad configuration
        if not path.is_dir() or is_out_of_memory(error):
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise FileRefused(
            f"{path}: diffusers cannot load the folder: {why}", hint=VERIFY
        ) from error


def _require(cls: type, missing: Collection[str]) -> None:
    """Checks that no argument of a pipeline is missing that its constructor needs."""
    if missing:
        names = sorted(missing)
        raise UsageError(
            f"{cls.__name__} needs {', '.join(names)}, which ckptconv cannot build yet",
            hint=f"in Python, load_pipeline(..., components={{{names[0]!r}: ...}}) supplies it",
        )


def _connected(module: torch.nn.Module, devices: Devices) -> torch.nn.Module:
    """Lets the parts of a module that lie on several GPUs pass their outputs on."""
    if len(set(devices.values())) == 1:
        return module
    from accelerate import dispatch_model  # type: ignore[import-untyped]  # it has none

    gpus = {part: device.index for part, device in devices.items()}
    dispatched: torch.nn.Module = dispatch_model(module, gpus, main_device=min(gpus.values()))
    return dispatched
