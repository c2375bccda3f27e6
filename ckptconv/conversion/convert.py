"""The main job, put together: detect, configure, plan, write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from ..configs.config import Config, configs
from ..configs.original_config import OriginalConfig, read_original_config
from ..destination import check_destination
from ..detection.detect import detect, option_fact
from ..errors import FileRefused, option
from ..files import read_json
from ..folder.weights import component_headers
from ..maps.architecture import Component, KeyMaps
from ..options import Choices, Options, checked
from ..planning.adapters import read_adapter
from ..planning.components import Donor
from ..planning.plan import Plan, build_plan
from ..reading.source import open_header
from ..version import __version__
from .write import CONVERTED, Packaging, Report, write_folder


@checked
def plan(path: str | Path, **choices: Unpack[Choices]) -> Plan:
    """Accounts for every key of a checkpoint, and writes nothing.

    Args:
        path: a safetensors file or a PyTorch checkpoint.
        **choices: see `Options`.

    Raises:
        FileRefused: the file, a donor or the original configuration cannot be used.
        UsageError: the choices contradict each other or the file.
    """
    return plan_file(path, Options.of(choices))[0]


@checked
def convert(
    path: str | Path,
    out: str | Path,
    *,
    variant: str | None = None,
    max_shard_size: str | int | None = None,
    configs_only: bool = False,
    overwrite: bool = False,
    ignore_unclaimed: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **choices: Unpack[Choices],
) -> Report:
    """Converts a checkpoint into a diffusers folder.

    Args:
        path: a safetensors file or a PyTorch checkpoint.
        out: the folder to make.
        variant: a word, such as `fp16`, that goes into the names of the weight files.
        max_shard_size: bytes of tensors in one weight file, such as `5GB`; no limit by default.
        configs_only: write no weights.
        overwrite: replace a converted folder that is there.
        ignore_unclaimed: leave out keys that no map knows, instead of refusing the file.
        progress: is called with bytes written and bytes in all, from one thread at a time.
        **choices: see `Options`.

    Raises:
        FileRefused: the file, a donor or the original configuration cannot be used.
        UsageError: the choices contradict each other or the file.
        OutputError: the destination exists or cannot be written.
    """
    return convert_file(
        path,
        Path(out),
        Options.of(choices),
        Packaging.of(variant, max_shard_size, configs_only=configs_only),
        overwrite=overwrite,
        ignore_unclaimed=ignore_unclaimed,
        progress=progress,
    )


def convert_file(
    path: str | Path,
    out: Path,
    options: Options,
    packaging: Packaging,
    *,
    overwrite: bool,
    ignore_unclaimed: bool,
    progress: Callable[[int, int], None],
) -> Report:
    """Converts a checkpoint, as `convert` does."""
    made, original = plan_file(path, options)
    check_destination(out, overwrite=overwrite, kind=CONVERTED, inputs=made.files)
    made.require_complete(ignore_unclaimed=ignore_unclaimed)
    built, notes = configured(made, original)
    report = write_folder(
        made,
        built,
        out,
        record=_record(made, built),
        packaging=packaging,
        only=options.only,
        progress=progress,
    )
    warnings = (*made.detection.notes, *made.notes, *notes, *_absences(made), *report.warnings)
    return replace(report, warnings=warnings, original=original)


def configured(made: Plan, original: OriginalConfig | None) -> tuple[dict[str, Config], list[str]]:
    """Returns the configurations, and what the original configuration changed in them."""
    built = configs(made)
    if not original:
        return built, []
    overrides, notes = original.overrides(built)
    return configs(made, overrides), notes


def plan_file(path: str | Path, options: Options) -> tuple[Plan, OriginalConfig | None]:
    """Reads a checkpoint and what its options name, and accounts for every key."""
    header = open_header(path)
    original = None
    if options.original_config:
        original = read_original_config(options.original_config, options.maps)
    decided = dict(original.facts) if original else {}
    decided |= {name: option_fact(name, value) for name, value in options.facts.items()}
    detection = detect(header, maps=options.maps, decided=decided)
    components = detection.architecture.components if detection.architecture else {}
    made = build_plan(
        detection,
        options,
        donors={
            name: _donor(components.get(name), name, place, options.maps)
            for name, place in options.donors.items()
        },
        adapters=[read_adapter(file) for file in options.lora],
    )
    _require_fit(made)
    return made, original


def _require_fit(made: Plan) -> None:
    """Checks that what comes from elsewhere has the width of the component that it is joined to.

    Raises:
        FileRefused: they have not.
    """
    problems = []
    for component in made.detection.require()[0].models:
        for key, other in component.fits.items():
            neighbour, _, its = other.partition("/")
            if made.donors.keys().isdisjoint({component.name, neighbour}):
                continue
            one, two = made.tensors(component.name).get(key), made.tensors(neighbour).get(its)
            if one and two and one.shape[-1:] != two.shape[:1]:
                problems.append(
                    f"{component.name}: {key} has shape {list(one.shape)}, which does not fit "
                    f"{list(two.shape)}, the shape of {other}"
                )
    if problems:
        raise FileRefused(
            f"{made.detection.header.path}: its components do not fit together",
            problems=problems,
            hint="give components of the same model",
        )


def _donor(component: Component | None, name: str, place: Path, maps: KeyMaps) -> Donor:
    """Reads a donor: a folder of one component, a whole diffusers folder, or a file.

    Raises:
        FileRefused: it is none of these, or of another component.
    """
    try:
        is_folder = place.is_dir()
    except OSError:
        is_folder = False  # a name that is too long, say: the reader tells
    if not is_folder:
        return Donor((open_header(place),))
    folder = place / name if (place / name).is_dir() else place
    config = folder / "config.json"
    if not config.is_file():
        raise FileRefused(
            f"{folder}: holds no config.json", hint="give the folder of one diffusers component"
        )
    values = read_json(config)
    said = values.get("_class_name") or values.get("architectures")
    classes = (*maps.classes(component), *component.donors) if component else ()
    if component and not any(said in (known, [known]) for known in classes):
        raise FileRefused(
            f"{config}: is that of {said}, but a {name} is of {' or '.join(classes)}",
            hint="give the folder of that component",
        )
    return Donor(component_headers(folder), config)


def _absences(made: Plan) -> list[str]:
    return [
        f"{name} is not in the file, so model_index.json says null: "
        f"supply it with {option_for(made, name)}"
        for name in made.absent
    ]


def option_for(made: Plan, name: str) -> str:
    """Returns the option that gives a component which the file lacks, and what it may be given."""
    supply = made.detection.require()[0].components[name].supply
    return option(name, "FILE") + (f" ({supply})" if supply else "")


def _record(made: Plan, built: dict[str, Config]) -> dict[str, Any]:
    """Returns what `ckptconv/source.json` says: enough to tell where the folder comes from."""
    architecture, task = made.detection.require()
    header = made.detection.header
    return {
        "adapters": [{"name": a.header.path.name, "scale": a.scale} for a in made.adapters],
        "architecture": architecture.name,
        "assumed": {
            f"{name}.{key}": config.values[key]
            for name, config in built.items()
            for key, origin in config.origins.items()
            if origin == "assumed"
        },
        "ckptconv_version": __version__,
        "donors": {name: str(d.headers[0].path.name) for name, d in made.donors.items()},
        "dropped": {s.sources[0].name: s.reason for s in made.steps if s.reason},
        "facts": {
            f.name: {"detail": f.detail, "source": f.source, "value": f.value}
            for f in made.detection.facts.values()
        },
        "source": {
            "metadata": dict(header.metadata),
            "name": header.path.name,
            "size": header.size,
        },
        "task": task.name,
        "unclaimed": list(made.unclaimed),
    }
