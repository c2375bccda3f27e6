"""The configuration files of the converted folder.

A configuration in `key_maps/` reads like the published file with holes (`ckptconv.maps.holes`). A
value without a hole is *constant*; one that asks for a shape or a count is *measured* on the
tensors that the plan gives; one that asks for a fact is as sure as its witness. A key in a hole is
one of this component's converted tensors, or COMPONENT/KEY of another's.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..detection.detect import Detection
from ..detection.facts import hold, values_of
from ..errors import FileRefused, MapError
from ..files import read_config
from ..libraries import RENAMED, library_version
from ..maps.architecture import CLASS_ENTRIES, Component, Entry
from ..maps.holes import (
    Count,
    Depth,
    Dim,
    FactValue,
    Heads,
    Hole,
    IndicesOf,
    Keyed,
    Present,
    Side,
    UpDepths,
    Values,
)
from ..planning.components import Donor
from ..planning.plan import Plan
from ..planning.step import Target
from .allowed import TOKENIZER, Unbuildable, kept, notes_on_code, own_name, without_code
from .tokenizer import QWEN, T5, TEMPLATE, tokenizer_of

DTYPES = ("torch_dtype", "dtype")
"""Entries of a configuration that tell transformers in which dtype to load the weights."""

EMBEDDINGS = ("embed_tokens.weight", "token_embedding.weight", "shared.weight")
"""How the names of tensors end that have a row for each token."""


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of one component.

    Attributes:
        component: what it configures.
        values: as they are written.
        origins: by name of the value, where it comes from: `constant`, `measured`, or the source
            of the fact that decided it (`assumed`, `metadata`, ...).
        notes: what the user should know of it.
        folder: of the donor that a tokenizer comes from; None for one that is bundled.
    """

    component: Component
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()
    folder: Path | None = None


def configs(
    plan: Plan, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Config]:
    """Returns the configuration of every component that the plan does not leave absent.

    Args:
        plan: its tensors are measured. A donor folder brings its own configuration, and a donor
            file the values in which its model differs.
        overrides: by component, values that win over the architecture's.

    Raises:
        MapError: a configuration of the architecture is malformed.
        FileRefused: the config.json of a donor cannot be read, or heads do not fit the widths.
    """
    architecture, _ = plan.detection.require()
    result = {}
    for name, component in architecture.components.items():
        donor = plan.donors.get(name)
        if not (plan.tensors(name) if component.kind == "model" else donor or component.bundled):
            continue
        if donor and component.kind == "tokenizer":
            if T5 not in architecture.maps.classes(component):
                result[name] = _tokenizer(plan, component, donor)
                continue
            donor = None  # there is one T5 tokenizer, and it is bundled
        theirs, left_out = _of_donor(plan, component, donor) if donor else ({}, [])
        notes = (*_differing(plan, component, theirs), *left_out)
        if donor and donor.config:
            result[name] = Config(component, theirs, dict.fromkeys(theirs, "donor"), notes)
            continue
        try:
            values, origins = _Measure(plan, component, plan.detection).filled()
        except OddWidth as error:
            raise FileRefused(
                f"{plan.detection.header.path}: the {name} is of no width that its heads fit",
                problems=[str(error)],
                hint="the file is damaged, or of a relative that is not known",
            ) from error
        if theirs:
            values = {k: v for k, v in values.items() if k not in component.brings} | theirs
        wins = (overrides or {}).get(name, {})
        origins |= dict.fromkeys(theirs, "donor") | dict.fromkeys(wins, "original config")
        result[name] = Config(component, values | dict(wins), origins, notes)
    return result


def _tokenizer(plan: Plan, component: Component, donor: Donor) -> Config:
    """Returns the configuration of a tokenizer from a donor; FileRefused if it does not fit."""
    path = donor.config or Path()
    said = read_config(path)
    (cls,) = plan.detection.require()[0].maps.classes(component)
    values = {n: v for n, v in without_code(said).items() if n in TOKENIZER} | {
        "tokenizer_class": cls
    }
    if cls == QWEN and not (values.get("chat_template") or (path.parent / TEMPLATE).exists()):
        raise FileRefused(
            f"{path.parent}: has no chat template, into which the pipeline puts every prompt",
            hint=f"give {component.supply}",
        )
    _, last = tokenizer_of(path.parent, values)
    encoder = component.name.replace("tokenizer", "text_encoder")
    for key, target in plan.tensors(encoder).items():
        if key.endswith(EMBEDDINGS) and last >= target.shape[0]:
            raise FileRefused(
                f"{path.parent}: its token ids go up to {last:,}, but {encoder}/{key} has "
                f"{target.shape[0]:,} rows",
                hint="give the tokenizer of this text encoder",
            )
    origins, notes = dict.fromkeys(values, "donor"), tuple(notes_on_code(path, said))
    return Config(component, values, origins, notes, path.parent)


def _of_donor(plan: Plan, component: Component, donor: Donor) -> tuple[dict[str, Any], list[str]]:
    """Returns the configuration of a donor folder, with notes on what was left out of it.

    Of a donor file, what is known of its configuration.
    """
    if donor.config:
        said = read_config(donor.config)
        name = str(class_said(said))
        try:
            values = kept(component.home, name, said)
        except Unbuildable as error:
            what, hint = f"{donor.config}: {error}", "give the folder of another component"
            raise FileRefused(what, hint=hint) from error
        return values | own_name(component.home, name), notes_on_code(donor.config, said)
    found = donor.detection
    whole = found.architecture.components if found and found.architecture else {}
    if not found or component.name not in whole:
        return {}, []
    measure = _Measure(plan, whole[component.name], found)
    values, origins = measure.filled(component.brings)
    return {name: v for name, v in values.items() if origins[name] != "assumed"}, []


def _differing(plan: Plan, component: Component, theirs: Mapping[str, Any]) -> Iterator[str]:
    """Yields where a donor of the component's own class differs from the one it replaces."""
    architecture, _ = plan.detection.require()
    if not theirs or theirs.get("_class_name") not in (None, *architecture.maps.classes(component)):
        return
    ours, _ = _Measure(plan, component, plan.detection).filled(component.brings)
    for name, default in component.brings.items():
        have, want = theirs.get(name, default), ours.get(name, default)
        if have != want:
            yield (
                f"{component.name} comes from another model: its {name} is {have}, where "
                f"{architecture.title} has {want}, so this UNet may not understand its latents"
            )


def model_index(plan: Plan, built: Mapping[str, Config]) -> dict[str, Any]:
    """Returns the content of `model_index.json`: null for what is absent."""
    architecture, task = plan.detection.require()
    index: dict[str, Any] = {
        "_class_name": task.pipeline,
        "_diffusers_version": library_version("diffusers"),
    }
    for name, entry in architecture.index.items():
        value = entry.value if isinstance(entry, Entry) else entry
        if value is entry or hold(entry.facts, plan.detection.facts):
            index[name] = [None, None] if value is None else value
    for name, component in architecture.components.items():
        config = built.get(name)
        index[name] = [component.home, class_of(config)] if config else [None, None]
    return index


def class_of(config: Config) -> str:
    """Returns the name of the class that a configuration is for, as it says itself."""
    return str(class_said(config.values))


def class_said(values: Mapping[str, Any]) -> Any:
    """Returns the class that a configuration names, by its usual name; None if it names none.

    What is not a name, such as a list of several, is returned as it is.
    """
    said = next((values[name] for name in CLASS_ENTRIES if name in values), None)
    name = said[0] if isinstance(said, list) and len(said) == 1 else said
    return RENAMED.get(name, name) if isinstance(name, str) else name


def versioned(config: Config) -> dict[str, Any]:
    """Returns the values as written: with the version of the library that reads them.

    A transformers model is to be loaded in fp32, whatever the weights are, because diffusers loads
    its own models so; `from_pretrained(..., torch_dtype=...)` overrides both.
    """
    if config.component.kind in ("tokenizer", "processor"):
        return dict(config.values)
    library = config.component.library
    if library == "diffusers":
        return {"_diffusers_version": library_version(library), **config.values}
    values = {name: value for name, value in config.values.items() if name not in DTYPES}
    return {"transformers_version": library_version(library), **values, "torch_dtype": "float32"}


class OddWidth(Exception):
    """A tensor of the file has a width from which nothing can be measured."""


class _Measure:
    """Fills the holes of one component's configuration, and notes what was asked."""

    def __init__(self, plan: Plan, component: Component, detection: Detection) -> None:
        self.plan = plan
        self.component = component
        self.tensors = plan.tensors(component.name)
        self.detection, self.facts = detection, detection.facts
        self.asked: list[str] = []

    def filled(self, only: Container[str] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
        """Returns the values, or only those of some names, and their origins."""
        fitting = (v for v in self.component.config if hold(v.facts, self.facts))
        variant = next(fitting, None)
        if variant is None:
            known = ", ".join(f"{name} {fact.value}" for name, fact in self.facts.items())
            raise MapError(
                f"{self.component.name}: no configuration is for {known}",
                hint="let the last of the list ask for no facts",
            )
        values, origins = {}, {}
        for key, value in self.detection.require()[0].maps.values(variant).items():
            if only is not None and key not in only:
                continue
            self.asked.clear()
            try:
                values[key] = self.fill(value)
            except (LookupError, ArithmeticError) as error:
                raise MapError(
                    f"{self.component.name}: {key} cannot be filled: {value}: {error}"
                ) from error
            origins[key] = self.asked[0] if self.asked else "constant"
        return values, origins

    def fill(self, value: Any) -> Any:
        """Returns a value without holes, at any depth."""
        if isinstance(value, list):
            return [self.fill(item) for item in value]
        if isinstance(value, Mapping):
            return {key: self.fill(item) for key, item in value.items()}
        if not isinstance(value, Hole):
            return value
        if isinstance(value, Keyed) and "*" in value.key and not isinstance(value, IndicesOf):
            holes = [replace(value, key=key) for key in self._each(value.key)]
            holes[:-1] = [  # only the last level may take its depth from elsewhere
                replace(hole, last="") if isinstance(hole, Depth) else hole for hole in holes[:-1]
            ]
            return [self.measured(hole) for hole in holes]
        return self.measured(value)

    @functools.singledispatchmethod
    def measured(self, hole: Hole) -> Any:
        """Returns what fills a hole without a `*`."""
        raise NotImplementedError

    def _each(self, pattern: str) -> list[str]:
        """Returns the key for every number that may stand for the `*`, in order."""
        before, _, after = pattern.partition("*")
        inner = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}(?:\.|$)")
        numbers = {int(found[1]) for key in self.tensors if (found := inner.match(key))}
        return [f"{before}{n}{after}" for n in sorted(numbers)]

    def _find(self, key: str) -> Target | None:
        component, _, name = key.rpartition("/")
        return (self.plan.tensors(component) if component else self.tensors).get(name)

    def _slot(self, key: str) -> Target:
        self.asked.append("measured")
        if slot := self._find(key):
            return slot
        raise LookupError(f"it measures {key!r}, which is no converted key")

    @measured.register
    def _dim(self, hole: Dim) -> Any:
        self.asked.append("measured")
        found = [t for key in (hole.key, *hole.also) if (t := self._find(key))]
        lengths = {target.shape[hole.axis] for target in found}
        if hole.otherwise is not ... and len(lengths) != 1:
            return hole.otherwise
        return lengths.pop() if lengths else self._slot(hole.key)

    @measured.register
    def _heads(self, hole: Heads) -> int:
        width = self.fill(hole.width)
        rows = self._slot(hole.key).shape[0]
        if rows % width:
            raise OddWidth(f"{hole.key} has {rows} rows, which are no heads of {width}")
        return int(rows // width)

    @measured.register
    def _present(self, hole: Present) -> Any:
        self.asked.append("measured")
        return hole.yes if self._find(hole.key) else hole.no

    @measured.register
    def _indices(self, hole: IndicesOf) -> list[int]:
        self.asked.append("measured")
        start = len(hole.key.partition("*")[0])
        return [int(key[start:].partition(".")[0]) for key in self._each(hole.key)]

    @measured.register
    def _side(self, hole: Side) -> int:
        if hole.assumed is not None and not self._find(hole.key):
            self.asked.append("assumed")
            return hole.assumed
        patches = self._slot(hole.key).shape[hole.axis] - hole.beside
        edge = math.isqrt(max(patches, 0))
        if not patches or edge * edge != patches:
            raise LookupError(f"{hole.key} has {patches} patches, which fill no square")
        return edge * int(self.fill(hole.patch))

    def _entries(self, container: str) -> int:
        start = container + "."
        return len({k[len(start) :].split(".")[0] for k in self.tensors if k.startswith(start)})

    @measured.register
    def _count(self, hole: Count) -> int:
        self.asked.append("measured")
        return self._entries(hole.key)

    @measured.register
    def _depth(self, hole: Depth) -> int | list[int]:
        self.asked.append("measured")
        attentions = range(self._entries(f"{hole.key}.attentions"))
        if hole.last and not attentions:
            return self._depth(Depth(hole.last))  # type: ignore[no-any-return]  # a dispatcher
        blocks = [f"{hole.key}.attentions.{n}.transformer_blocks" for n in attentions]
        depths = [self._entries(container) for container in blocks]
        return depths if len(set(depths)) > 1 else (depths or [1])[0]

    @measured.register
    def _up_depths(self, _hole: UpDepths) -> list[int | list[int]] | None:
        down, up = (self.fill(Depth(f"{way}_blocks.*")) for way in ("down", "up"))
        mirrored = up == down[::-1] and all(isinstance(depth, int) for depth in down)
        return None if mirrored else up

    @measured.register
    def _fact(self, hole: FactValue) -> Any:
        fact = self.facts[hole.name]
        self.asked.append(fact.source)
        return fact.value if hole.table is None else hole.table[fact.value]

    @measured.register
    def _values(self, hole: Values) -> Any:
        found, many = values_of(self.detection.header, hole.key), hole.published
        if len(found) != (len(many) if isinstance(many, list) else 1):
            self.asked.append("assumed")
            return many
        self.asked.append("measured")
        return found if isinstance(many, list) else found[0]
