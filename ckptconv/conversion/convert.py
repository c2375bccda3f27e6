"""The main job, put together: detect, configure, plan, execute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ..configs.config import Config, configs
from ..configs.original_config import OriginalConfig, read_original_config
from ..detection.detect import FACT_VALUES, detect, option_fact
from ..detection.facts import Fact
from ..errors import FileRefused
from ..files import read_json
from ..folder.weights import component_headers
from ..maps.architecture import Component, KeyMaps, bundled
from ..planning.adapters import read_adapter
from ..planning.plan import Donor, Plan, build_plan
from ..reading.source import open_header
from ..version import __version__
from .write import Layout, Report, check_destination, execute

__all__ = ["Choices", "convert", "plan"]

DONORS = ("vae", "text_encoder", "text_encoder_2", "image_normalizer", "depth_estimator")
"""The components that a donor may give."""


class Choices(TypedDict, total=False):
    """What a caller may choose; every entry is optional.

    Attributes:
        dtype: `fp16`, `bf16` or `fp32` for the float tensors; as stored by default.
        ema: take the EMA copy of the UNet instead of its weights.
        only: names of the components to write.
        vae: another checkpoint, a lone component file or a diffusers component folder.
        text_encoder: likewise.
        text_encoder_2: likewise.
        image_normalizer: likewise, or a file with its mean and standard deviation.
        depth_estimator: likewise.
        prediction_type: `epsilon` or `v_prediction`; found out by default.
        zero_terminal_snr: whether the noise schedule ends in pure noise; found out by default.
        family: `sd1`, `sd2` or `sdxl`: what a VAE that stands alone is for; found out by default.
        original_config: the LDM or SGM yaml of the model; it wins over what is measured.
        lora: adapters (LoRA, DoRA of PEFT, LoHa, LoKr) to add to the weights, in this order: `FILE`
            or `FILE:SCALE`.
        maps: key maps to use; those that come with ckptconv by default.
    """

    dtype: str | None
    ema: bool
    only: Iterable[str] | None
    vae: str | Path | None
    text_encoder: str | Path | None
    text_encoder_2: str | Path | None
    image_normalizer: str | Path | None
    depth_estimator: str | Path | None
    prediction_type: str | None
    zero_terminal_snr: bool | None
    family: str | None
    original_config: str | Path | None
    lora: Sequence[str | Path]
    maps: KeyMaps | None


def plan(path: str | Path, **choices: Unpack[Choices]) -> Plan:
    """Accounts for every key of a checkpoint, and writes nothing.

    Args:
        path: a safetensors file or a PyTorch checkpoint.
        **choices: see `Choices`.

    Raises:
        FileRefused: the file, a donor or the original configuration cannot be used.
        UsageError: the choices contradict each other or the file.
    """
    return _plan(path, choices)[0]


def convert(
    path: str | Path,
    out: str | Path,
    *,
    layout: Layout = Layout(),  # noqa: B008  (frozen)
    overwrite: bool = False,
    ignore_unclaimed: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **choices: Unpack[Choices],
) -> Report:
    """Converts a checkpoint into a diffusers folder.

    Args:
        path: a safetensors file or a PyTorch checkpoint.
        out: the folder to make.
        layout: how the weights are laid out in files.
        overwrite: replace a converted folder that is there.
        ignore_unclaimed: leave out keys that no map knows, instead of refusing the file.
        progress: is called with bytes written and bytes in all, from one thread at a time.
        **choices: see `Choices`.

    Raises:
        FileRefused: the file, a donor or the original configuration cannot be used.
        UsageError: the choices contradict each other or the file.
        OutputError: the destination exists or cannot be written.
    """
    if (only := choices.get("only")) is not None:
        only = choices["only"] = frozenset(only)
    made, original = _plan(path, choices)
    check_destination(Path(out), made, overwrite=overwrite)
    made.require_complete(ignore_unclaimed=ignore_unclaimed)
    built, notes = configured(made, original)
    report = execute(
        made,
        built,
        Path(out),
        record=_record(made, built),
        layout=layout,
        only=only,
        overwrite=overwrite,
        progress=progress,
    )
    return Report(
        report.out,
        report.plan,
        report.configs,
        report.files,
        (*made.detection.notes, *made.notes, *notes, *_absences(made), *report.warnings),
        report.seconds,
    )


def configured(made: Plan, original: OriginalConfig | None) -> tuple[dict[str, Config], list[str]]:
    """Returns the configurations, and what the original configuration changed in them."""
    built = configs(made)
    if not original:
        return built, []
    overrides, notes = original.overrides(built)
    return configs(made, overrides), notes


def _plan(path: str | Path, choices: Choices) -> tuple[Plan, OriginalConfig | None]:
    maps = choices.get("maps") or bundled()
    header = open_header(path)
    decided: dict[str, Fact] = {}
    original = None
    if yaml := choices.get("original_config"):
        original = read_original_config(Path(yaml), maps)
        decided |= original.facts
    for name in FACT_VALUES:
        if (value := choices.get(name)) is not None:
            decided[name] = option_fact(name, value)
    detection = detect(header, maps=maps, decided=decided)
    components = detection.architecture.components if detection.architecture else {}
    donors = {
        name: _donor(components.get(name), name, Path(str(place)), maps)
        for name in DONORS
        if (place := choices.get(name))
    }
    made = build_plan(
        detection,
        ema=choices.get("ema", False),
        only=choices.get("only"),
        donors=donors,
        dtype=choices.get("dtype"),
        adapters=[read_adapter(text) for text in choices.get("lora") or ()],
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
    return f"--{name.replace('_', '-')} FILE" + (f" ({supply})" if supply else "")


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
        "dropped": {s.sources[0].key: s.reason for s in made.steps if s.reason},
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
