"""The configuration files of the converted folder.

A configuration in `key_maps/` reads like the published file with holes. A value without a hole is
*constant*; one that asks for a shape or a count is *measured* on the tensors that the plan gives;
one that asks for a fact (`ckptconv.detection.facts`) is as sure as its witness. The holes are
OmegaConf resolvers:

    ${dim:KEY,AXIS}           length of an axis          ${heads:KEY,WIDTH}     first axis / WIDTH
    ${dim_or_null:KEY,AXIS}   null if KEY is missing     ${count:CONTAINER}     its entries
    ${dtype:KEY}              as torch names it          ${fact:NAME}           value of a fact
    ${pick:NAME,{value:x}}    chosen by a fact
    ${side:KEY,AXIS,PATCH}    edge of the square image whose patches, PATCH pixels wide (1 without
                              it), and one class token have their positions along an axis; with a
                              fourth argument: that, as assumed, where KEY is missing
    ${values:KEY,PUBLISHED}   of a small tensor of the original file that is not converted: a list
                              or one number, as PUBLISHED is, which is assumed where there is none
    ${depth:BLOCK}            transformer blocks of each attention in a block: one number where all
                              are alike, else a list; 1 where there is none
    ${up_depths:}             the depths of `up_blocks`; null where they mirror `down_blocks`

A KEY of the converted tensors is one of this component, or COMPONENT/KEY of another.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..detection.facts import values_of
from ..errors import FileRefused, MapError
from ..files import read_json
from ..libraries import PIPELINES
from ..maps.architecture import Component
from ..planning.plan import Plan
from ..planning.step import Target

__all__ = ["Config", "class_of", "configs", "model_index"]

CLASS_ENTRIES = ("_class_name", "architectures", "tokenizer_class", "image_processor_type")
"""Where a configuration says which class it is for."""

TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of one component.

    Attributes:
        component: what it configures.
        values: as they are written.
        origins: by name of the value, where it comes from: `constant`, `measured`, or the source
            of the fact that decided it (`assumed`, `metadata`, ...).
    """

    component: Component
    values: Mapping[str, Any]
    origins: Mapping[str, str]


def configs(
    plan: Plan, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Config]:
    """Returns the configuration of every component that the plan does not leave absent.

    Args:
        plan: its tensors are measured; a donor folder brings its own configuration.
        overrides: by component, values that win over the architecture's.

    Raises:
        MapError: a configuration of the architecture is malformed.
        FileRefused: the config.json of a donor cannot be read, or heads do not fit the widths.
    """
    architecture, _ = plan.detection.require()
    result = {}
    for name, component in architecture.components.items():
        if component.kind == "model" and not plan.tensors(name):
            continue
        donor = plan.donors.get(name)
        if donor and donor.config:
            values = read_json(donor.config)
            result[name] = Config(component, values, dict.fromkeys(values, "donor"))
            continue
        measure = _Measure(plan, name)
        try:
            values, origins = _filled(component, measure, architecture.maps.extended)
        except OddWidth as error:
            raise FileRefused(
                f"{plan.detection.header.path}: the {name} is of no width that its heads fit",
                problems=[str(error)],
                hint="the file is damaged, or of a relative that is not known",
            ) from error
        wins = (overrides or {}).get(name, {})
        result[name] = Config(
            component, values | dict(wins), origins | dict.fromkeys(wins, "original config")
        )
    return result


def model_index(plan: Plan, built: Mapping[str, Config]) -> dict[str, Any]:
    """Returns the content of `model_index.json`: null for what is absent."""
    architecture, task = plan.detection.require()
    index: dict[str, Any] = {
        "_class_name": task.pipeline,
        "_diffusers_version": _version("diffusers"),
    }
    for name, value in architecture.index.items():
        if isinstance(value, Mapping):  # the pipelines of the other tasks do not know it
            facts = plan.detection.facts
            wanted = value.get("facts", {})
            if task.name not in value["tasks"] or any(facts[f].value != wanted[f] for f in wanted):
                continue
            value = value["value"]
        index[name] = [None, None] if value is None else value
    for name, component in architecture.components.items():
        config = built.get(name)
        if config:
            found = class_of(config)
            index[name] = [PIPELINES.get(found, component.library), found]
        else:
            index[name] = [None, None]
    return index


def class_of(config: Config) -> str:
    """Returns the name of the class that a configuration is for, as it says itself."""
    said = next(config.values[name] for name in CLASS_ENTRIES if name in config.values)
    return str(said[0] if isinstance(said, list) else said)


def versioned(config: Config) -> dict[str, Any]:
    """Returns the values as written: with the version of the library that reads them."""
    if config.component.kind in ("tokenizer", "processor"):
        return dict(config.values)
    library = config.component.library
    entry = "_diffusers_version" if library == "diffusers" else "transformers_version"
    return {entry: _version(library), **config.values}


def _version(library: str) -> str:
    import importlib.metadata  # slow, and only needed to write a configuration

    return importlib.metadata.version(library)


class OddWidth(ValueError):
    """A tensor of the file has a width from which nothing can be measured."""


class _Measure:
    """Answers the holes of one component's configuration, and notes what was asked."""

    def __init__(self, plan: Plan, component: str) -> None:
        self.plan = plan
        self.tensors = plan.tensors(component)
        self.facts = plan.detection.facts
        self.header = plan.detection.header
        self.asked: list[str] = []
        self.odd: OddWidth | None = None  # OmegaConf does not pass on what a resolver raises

    def _find(self, key: str) -> Target | None:
        component, _, name = key.rpartition("/")
        return (self.plan.tensors(component) if component else self.tensors).get(name)

    def _slot(self, key: str) -> Target:
        self.asked.append("measured")
        if slot := self._find(key):
            return slot
        raise MapError(f"a configuration measures {key!r}, which is no converted key")

    def dim(self, key: str, axis: int) -> int:
        return self._slot(key).shape[axis]

    def dim_or_null(self, key: str, axis: int) -> int | None:
        self.asked.append("measured")
        return self.dim(key, axis) if self._find(key) else None

    def heads(self, key: str, width: int) -> int:
        rows = self._slot(key).shape[0]
        if rows % width:
            self.odd = OddWidth(f"{key} has {rows} rows, which are no heads of {width}")
            raise self.odd
        return rows // width

    def side(self, key: str, axis: int, patch: int = 1, published: int | None = None) -> int:
        if published is not None and not self._find(key):
            self.asked.append("assumed")
            return published
        patches = self.dim(key, axis) - 1
        edge = math.isqrt(max(patches, 0))
        if not patches or edge * edge != patches:
            raise ValueError(f"{key} has {patches} patches, which fill no square")
        return edge * patch

    def count(self, container: str) -> int:
        self.asked.append("measured")
        start = container + "."
        return len({k[len(start) :].split(".")[0] for k in self.tensors if k.startswith(start)})

    def depth(self, block: str) -> int | list[int]:
        attentions = range(self.count(f"{block}.attentions"))
        depths = [self.count(f"{block}.attentions.{n}.transformer_blocks") for n in attentions]
        return depths if len(set(depths)) > 1 else (depths or [1])[0]

    def up_depths(self) -> list[int | list[int]] | None:
        down = [self.depth(f"down_blocks.{n}") for n in range(self.count("down_blocks"))]
        up = [self.depth(f"up_blocks.{n}") for n in range(self.count("up_blocks"))]
        mirrored = up == down[::-1] and all(isinstance(depth, int) for depth in down)
        return None if mirrored else up

    def dtype(self, key: str) -> str:
        return TORCH_NAMES.get(self._slot(key).dtype, "float32")

    def fact(self, name: str) -> Any:
        self.asked.append(self.facts[name].source)
        return self.facts[name].value

    def pick(self, name: str, choices: Mapping[Any, Any]) -> Any:
        return choices[self.fact(name)]

    def values(self, key: str, published: float | Sequence[float]) -> Any:
        found = values_of(self.header, key)
        if len(found) != (len(published) if isinstance(published, Sequence) else 1):
            self.asked.append("assumed")
            return published
        self.asked.append("measured")
        return found if isinstance(published, Sequence) else found[0]


_RESOLVERS = (
    *("dim", "dim_or_null", "heads", "side", "count", "dtype"),
    *("depth", "up_depths", "fact", "pick", "values"),
)
_measure: contextvars.ContextVar[_Measure] = contextvars.ContextVar("measure")


@contextlib.contextmanager
def _resolving(measure: _Measure) -> Iterator[None]:
    """Lets OmegaConf's resolvers, which are global, answer from `measure`."""
    from omegaconf import OmegaConf

    def answer(name: str) -> Any:
        return lambda *args: getattr(_measure.get(), name)(*args)

    for name in _RESOLVERS:
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_resolver(name, answer(name))
    token = _measure.set(measure)
    try:
        yield
    finally:
        _measure.reset(token)


def _filled(
    component: Component, measure: _Measure, extended: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """Fills the holes; returns the values and their origins."""
    with _resolving(measure):
        raw = dict(component.config)
        if "extends" in raw:  # which file to extend may depend on a fact
            raw = extended({**raw, "extends": _fill(raw["extends"])})
        values, origins = {}, {}
        for key, value in raw.items():
            measure.asked.clear()
            values[key] = _fill(value)
            origins[key] = measure.asked[0] if measure.asked else "constant"
    return values, origins


def _fill(value: Any) -> Any:
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(value, list):
        return [_fill(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _fill(item) for key, item in value.items()}
    if not isinstance(value, str) or "${" not in value:
        return value
    try:
        filled = OmegaConf.create({"value": value})["value"]
    except OmegaConfBaseException as error:
        if odd := _measure.get().odd:
            raise odd from error
        raise MapError(
            f"a configuration has a hole that cannot be filled: {value}: {error}"
        ) from error
    return (
        OmegaConf.to_container(filled) if isinstance(filled, (DictConfig, ListConfig)) else filled
    )
