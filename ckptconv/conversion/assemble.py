"""Puts a model together from the files of one folder: a transformer, its VAE, its text encoders.

A file is known by its content, as a donor is. Nothing is guessed: where two files fit one place, or
two of them are models, the error lists both. A file that cannot be read is left out.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..detection.detect import Detection, detect
from ..errors import FileRefused, option
from ..files import looking_into
from ..maps.architecture import Architecture
from ..options import DONORS, Options
from ..planning.assembly import Assembly
from ..planning.components import Donor, fitting_places, published_elements
from ..planning.joints import misfits
from ..planning.plan import Plan, build_plan
from ..planning.scaled import read_scales
from ..planning.step import targets_of
from ..reading.folders import CHECKPOINTS, not_a_file
from ..reading.source import PART, open_header


def assemble(folder: Path, options: Options, *, without: Collection[str] = ()) -> Assembly:
    """Finds out which files of a folder make a model together.

    Args:
        folder: its own files count, those of its subfolders do not.
        options: what they name needs no file from the folder.
        without: components that need none either.

    Raises:
        FileRefused: the folder cannot be read, no file is a model, several are, or several fit the
            same place.
    """
    if folder.is_file():
        raise FileRefused(
            f"{folder}: is a file, and {option('assemble')} takes a folder of files",
            hint=f"give {folder.parent}, or leave out {option('assemble')} to take this file alone",
        )
    with looking_into(folder):
        files, left_out = _model_files(folder)
        if not files:
            raise not_a_file(folder)
    given = (*options.donors.values(), *(adapter.path for adapter in options.lora))
    named = {os.path.realpath(path) for path in given}
    found = []
    for path in files:
        try:
            if os.path.realpath(path) not in named:
                found.append(detect(open_header(path), maps=options.maps))
        except FileRefused as error:
            left_out[path] = error.message.removeprefix(f"{path}: ")
    mains = [each for each in found if each.architecture and not each.architecture.single]
    if not mains:
        raise FileRefused(
            f"{folder}: none of its files is a model that others could complete",
            problems=[
                *(f"{path.name}: {why}" for path, why in left_out.items()),
                *(f"{each.header.path.name}: {_what(each)}" for each in found),
            ],
            hint="give a folder that holds a transformer or a UNet, too",
        )
    if len(mains) > 1:
        titles = [f"{each.header.path.name} ({_title(each)})" for each in mains]
        raise FileRefused(
            f"{folder}: it cannot be told which of its files belong together",
            problems=[_several("the model", titles)],
            hint="move all but one of them elsewhere, or give one of them alone, with an option "
            f"for each file that belongs to it, such as {option('vae', 'FILE')}",
        )
    (main,) = mains
    way = _assembled(main, [each for each in found if each is not main], options, without)
    if way.problems:
        raise FileRefused(
            f"{folder}: it cannot be told which of its files belong together",
            problems=way.problems,
            hint=f"name the files: {way.command}",
        )
    return replace(way, left_out={**way.left_out, **left_out})


def _model_files(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Returns the files of a folder, an index in the place of its shards; and the subfolders."""
    files, folders = [], {}
    for path in sorted(folder.iterdir()):
        part = PART.fullmatch(path.name)
        if path.name.startswith("."):
            continue
        if path.is_dir():
            folders[path] = "a folder, and only the files beside it are looked at"
        elif path.name.endswith(CHECKPOINTS) and not (
            part and (folder / f"{part[1]}.safetensors.index.json").exists()
        ):
            files.append(path)
    return files, folders


def _assembled(
    main: Detection, others: Sequence[Detection], options: Options, without: Collection[str]
) -> Assembly:
    """Gives every file its place beside a model."""
    architecture, _ = main.require()
    only, plan = options.only, build_plan(main)
    places = [
        c.name
        for c in architecture.models
        if c.name in DONORS
        and c.name not in {*options.donors, *without}
        and (only is None or c.name in only)
    ]
    taken = {name: main for name in places if name not in plan.absent}
    left_out: dict[Path, str] = {}
    fitting: dict[tuple[str, ...], list[Detection]] = {}
    for each in others:
        names, reason = _places(plan, each)
        if here := tuple(place for place in names if place in places):
            fitting.setdefault(here, []).append(each)
        else:
            left_out[each.header.path] = f"{names[0]} is not needed" if names else reason
    problems = []
    donors: dict[str, Path] = {}
    for fit, files in sorted(fitting.items(), key=lambda item: len(item[0])):
        free = [name for name in fit if name not in taken]
        if len(files) > len(free):
            rivals = [*(taken[name] for name in fit if name in taken), *files]
            found = dict.fromkeys(each.header.path.name for each in rivals)
            problems.append(_several(" or ".join(fit), found))
            free, files = free or [*fit], files[: len(free) or 1]
        given = _nearest(architecture, free, files)
        taken |= given
        donors |= {name: each.header.path for name, each in given.items()}
    ordered = {name: donors[name] for name in places if name in donors}
    return Assembly(main.header.path, _title(main), ordered, left_out, tuple(problems))


def _places(plan: Plan, other: Detection) -> tuple[list[str], str]:
    """Returns the components of a model that a file can give; if there are none, why not."""
    architecture, _ = plan.detection.require()
    own = {component.name: plan.tensors(component.name) for component in architecture.models}
    names, reason = [], _what(other)
    if not other.refusal:
        reason += f", no part of {architecture.title}"
    donor = Donor((read_scales(other.header).header,), detection=other)
    for name, match in fitting_places(architecture, donor).items():
        if unfit := misfits(architecture.joints, own | targets_of(match.steps.values())):
            reason = f"{name}: {unfit[0]}"
        else:
            names.append(name)
    return names, reason


def _several(place: str, files: Iterable[str]) -> str:
    return f"{place}: several files fit: {', '.join(files)}"


def _title(main: Detection) -> str:
    architecture, task = main.require()
    return f"{architecture.title}, {task.name}"


def _what(detection: Detection) -> str:
    """Says what a file is."""
    if detection.refusal:
        return detection.refusal.message.removeprefix(f"{detection.header.path}: ")
    return detection.require()[0].title


def _nearest(
    architecture: Architecture, names: Sequence[str], files: Sequence[Detection]
) -> dict[str, Detection]:
    """Gives files that fit several places those where the published files are about as large.

    The layouts of CLIP-L and of CLIP-bigG are the same but for their sizes.
    """
    published = {
        name: published_elements(architecture, architecture.components[name]) for name in names
    }

    def distance(pairs: Mapping[str, Detection]) -> float:
        return math.fsum(
            math.log(
                (1 + sum(t.numel for t in each.header.tensors.values())) / (1 + published[name])
            )
            ** 2
            for name, each in pairs.items()
        )

    ways: Iterator[dict[str, Detection]] = (
        dict(zip(order, files, strict=True)) for order in itertools.permutations(names, len(files))
    )
    return min(ways, key=distance)
