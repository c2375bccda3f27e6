"""The main job, put together: detect, configure, plan, write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Unpack

from ..configs.config import Config, class_said, configs
from ..configs.original_config import OriginalConfig, read_original_config
from ..configs.tokenizer import tokenizer_of
from ..destination import Destination, without_suffix
from ..detection.detect import detect, option_fact, with_config_beside
from ..detection.facts import Fact
from ..detection.foreign import foreign
from ..errors import FileRefused, option
from ..files import looking_into, noting_files, read_config
from ..folder.names import CONFIG_FILES
from ..folder.weights import component_headers
from ..maps.architecture import Architecture
from ..options import TOKENIZERS, Choices, Options, checked
from ..planning.components import Donor
from ..planning.plan import Plan, build_plan
from ..planning.zeros import require_filled
from ..reading.source import open_header
from .assemble import assemble
from .write import CONVERTED, Packaging, Report, write_folder


@checked
def plan(path: str | Path, **choices: Unpack[Choices]) -> Plan:
    """Accounts for every key of a checkpoint, and writes nothing.

    Args:
        path: a safetensors, PyTorch or GGUF file; with `assemble`, a folder of them.
        **choices: see `Options`.

    Raises:
        FileRefused: the file, a donor or the original configuration cannot be used.
        UsageError: the choices contradict each other or the file.
    """
    return plan_file(path, Options.of(choices))[0]


@checked
@noting_files()
def convert(
    path: str | Path,
    out: str | Path | None = None,
    *,
    variant: str | None = None,
    max_shard_size: str | int | None = None,
    configs_only: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **choices: Unpack[Choices],
) -> Report:
    """Converts a checkpoint into a diffusers folder.

    Args:
        path: a safetensors, PyTorch or GGUF file; with `assemble`, a folder of them.
        out: the folder to make; by default, it lies beside the file and has its name without the
            suffix.
        variant: a word, such as `fp16`, that goes into the names of the weight files.
        max_shard_size: bytes of tensors in one weight file, such as `5GB`; no limit by default.
        configs_only: write no weights.
        overwrite: replace a converted folder that is there and holds nothing else.
        strict: refuse keys that no map knows and incomplete components, which are otherwise kept
            aside with a warning.
        progress: is called with bytes written and bytes in all, from one thread at a time.
        **choices: see `Options`.

    Raises:
        FileRefused: the file, a donor or the original configuration cannot be used, or changed
            while it was read.
        UsageError: the choices contradict each other or the file.
        OutputError: the destination exists or cannot be written.
    """
    options = Options.of(choices)
    packaging = Packaging.of(variant, max_shard_size, configs_only=configs_only)
    plan, original = plan_file(path, options)
    out = Path(without_suffix(str(plan.detection.header.path)) if out is None else out)
    inputs = [*plan.files, *filter(None, [options.original_config])]
    destination = Destination(out, overwrite, CONVERTED, inputs=inputs)
    destination.check()
    plan.require_complete(strict=strict)
    if packaging.weights and not options.ignore_zeros:
        require_filled(plan.detection.header.path, plan.steps)
    configs, notes = configured(plan, original)
    report = write_folder(plan, configs, destination, packaging, options.only, progress)
    absent = [
        f"{name} is not in the file, so model_index.json says null: "
        f"supply it with {option_for(plan, name)}"
        for name in plan.absent
    ]
    warnings = (*plan.detection.notes, *plan.notes, *notes, *absent, *report.warnings)
    return replace(report, warnings=warnings)


def configured(plan: Plan, original: OriginalConfig | None) -> tuple[dict[str, Config], list[str]]:
    """Returns the configurations, and what the original configuration changed in them."""
    measured = configs(plan)
    notes = [note for config in measured.values() for note in config.notes]
    if not original:
        return measured, notes
    overrides, changed = original.overrides(measured)
    return configs(plan, overrides), [*notes, *changed]


def plan_file(
    path: str | Path,
    options: Options,
    *,
    without: Collection[str] = (),
    suggested: Mapping[str, Fact] = MappingProxyType({}),
) -> tuple[Plan, OriginalConfig | None]:
    """Reads a checkpoint and what its options name, and accounts for every key.

    Components that `without` names are left out, and may be missing. Facts that are `suggested`
    count where the file allows them.
    """
    assembly = assemble(Path(path), options, without=without) if options.assemble else None
    if assembly:
        path = assembly.main
        options = Options.of({**options.as_words(), **assembly.donors})
    header = open_header(path)
    original = None
    if options.original_config:
        original = read_original_config(options.original_config, options.maps)
    decided = {n: f for n, f in original.facts.items() if n not in suggested} if original else {}
    decided |= {name: option_fact(name, value) for name, value in options.facts.items()}
    detection = detect(header, maps=options.maps, decided=decided, suggested=suggested)
    if not original:
        detection = with_config_beside(detection)
    architecture, _ = detection.require()
    if without:
        only = architecture.components if options.only is None else options.only
        options = replace(options, only=frozenset(only) - set(without))
    donors = {
        n: _donor(architecture, n, p, {**suggested, **decided}) for n, p in options.donors.items()
    }
    plan = build_plan(detection, options, donors=donors)
    return replace(plan, assembly=assembly), original


def option_for(plan: Plan, name: str) -> str:
    """Returns the option that gives a component which the file lacks, and what it may be given."""
    component = plan.detection.require()[0].components[name]
    what = option(name, "FOLDER" if component.kind == "tokenizer" else "FILE")
    return what + (f" ({component.supply})" if component.supply else "")


def _donor(
    architecture: Architecture, name: str, place: Path, decided: Mapping[str, Fact]
) -> Donor:
    """Reads a donor: a folder of one component, a whole diffusers folder, or a file."""
    try:
        is_folder = place.is_dir()
    except OSError:
        is_folder = False  # its name is too long, say: the reader reports that
    if name in TOKENIZERS:
        with looking_into(place):
            return _tokenizer_donor(architecture, name, place)
    if not is_folder:
        detection = detect(open_header(place), maps=architecture.maps, suggested=decided)
        return Donor((detection.header,), detection=detection)
    with looking_into(place):
        return _donor_folder(architecture, name, place / name if (place / name).is_dir() else place)


def _tokenizer_donor(architecture: Architecture, name: str, place: Path) -> Donor:
    folder = place / name if (place / name).is_dir() else place
    config = folder / CONFIG_FILES["tokenizer"]
    if not config.is_file():
        raise FileRefused(
            f"{folder}: holds no {config.name}",
            hint="give the folder of a tokenizer, or a diffusers folder that has one",
        )
    found, _ = tokenizer_of(folder, read_config(config))
    kinds = {
        c.name: {each.removesuffix("Fast") for each in architecture.maps.classes(c)}
        for c in architecture.components.values()
        if c.kind == "tokenizer"
    }
    if name in kinds and found.removesuffix("Fast") not in kinds[name]:
        fits = [other for other, known in kinds.items() if found.removesuffix("Fast") in known]
        supply = architecture.components[name].supply
        raise FileRefused(
            f"{folder}: holds a {found}, but the {name} of {architecture.title} is a "
            f"{' or '.join(kinds[name])}",
            hint=f"it fits {option(fits[0], str(place))}"
            if fits
            else f"give {supply or 'the tokenizer of this model'}",
        )
    return Donor((), config)


def _donor_folder(architecture: Architecture, name: str, folder: Path) -> Donor:
    config = folder / CONFIG_FILES["model"]
    if not config.is_file():
        raise FileRefused(
            f"{folder}: holds no {config.name}", hint="give the folder of one diffusers component"
        )
    values = read_config(config)
    found = values.get("_class_name") or values.get("architectures")
    component = architecture.components.get(name)  # where there is none, the plan says so
    classes = (*architecture.maps.classes(component), *component.donors) if component else ()
    if component and class_said(values) not in classes:
        raise FileRefused(
            f"{config}: is that of {found}, but a {name} is of {' or '.join(classes)}",
            hint="give the folder of that component",
        )
    headers = component_headers(folder)
    if "quantization_config" in values:
        raise FileRefused(
            f"{config}: its weights are quantized: it has a quantization_config",
            hint="give the folder of that component in fp16, bf16 or fp32",
            code="quantized",
        )
    for header in headers:
        if refusal := foreign(header, architecture.maps, deciding=True):
            raise refusal
    return Donor(headers, config)
