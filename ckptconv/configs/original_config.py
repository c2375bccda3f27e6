"""Reads the YAML that a model was trained with (LDM or SGM), where a user has it.

What it says wins over what was measured or assumed, and each disagreement is reported. Which entry
is which value stands in `key_maps/original-config.yaml`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..detection.facts import Fact
from ..errors import FileRefused
from ..files import MOST_YAML, read_small
from ..maps.architecture import KeyMaps
from ..maps.schema import Many, word
from ..maps.yaml_files import check_aliases
from .config import Config

SOURCE = "original config"


@dataclass(frozen=True, slots=True)
class FactPath:
    """Where the YAML tells a fact, and what its texts mean; the first of the paths counts."""

    paths: Many[str] = field(metadata=word("path"))
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ValuePath:
    """Where the YAML tells a value; the first of the paths counts.

    `times` are the paths of an entry that multiplies each number of a list. `divides` is another
    value of the component, each number of which the entry divides.
    """

    paths: Many[str] = field(metadata=word("path"))
    times: Many[str] = ()
    divides: str = ""


@dataclass(frozen=True, slots=True)
class OriginalConfigFile:
    """`original-config.yaml`: by name of a fact, or COMPONENT.NAME of a value, where it is told."""

    facts: Mapping[str, Many[FactPath]]
    values: Mapping[str, Many[ValuePath]]


@dataclass(frozen=True, slots=True)
class OriginalConfig:
    """What the YAML says.

    Attributes:
        path: of the file.
        facts: by name.
        values: COMPONENT.NAME of each value that the file tells, where it does, and what it says.
    """

    path: Path
    facts: Mapping[str, Fact] = field(default_factory=dict)
    values: tuple[tuple[str, ValuePath, Any], ...] = ()

    def overrides(self, built: Mapping[str, Config]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Returns the values that win, by component, and a sentence for each disagreement.

        Args:
            built: the configurations without this file.
        """
        wins: dict[str, dict[str, Any]] = {}
        notes = []
        for target, where, said in self.values:
            component, _, name = target.partition(".")
            if component not in built:
                continue
            values = dict(built[component].values) | wins.get(component, {})
            value = said
            if where.divides:
                value = [width // said for width in values[where.divides]]
            if _same(values.get(name), value):
                continue
            origin = built[component].origins.get(name, "not set")
            notes.append(
                f"{self.path.name} says {component}.{name} = {value}, "
                f"not {values.get(name)} ({origin})"
            )
            wins.setdefault(component, {})[name] = value
        return wins, notes


def read_original_config(path: Path, maps: KeyMaps) -> OriginalConfig:
    """Reads an LDM or SGM yaml, with the interpolations that lead to other entries of it.

    Raises:
        FileRefused: it is not such a file, or an entry that is read has no sensible value.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    hint = "give the yaml that the model was trained with, such as v1-inference.yaml"
    try:
        text = read_small(path, MOST_YAML).decode()
        check_aliases(text)
        loaded = OmegaConf.load(io.StringIO(text))
        if not isinstance(loaded, DictConfig):
            raise FileRefused(f"{path}: is not a YAML mapping", hint=hint)
        tree = _without_calls(OmegaConf.to_container(loaded, resolve=False))
        params = _at(OmegaConf.create(tree), "model.params")
    except (ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise FileRefused(f"{path}: cannot be read as YAML: {error}", hint=hint) from error
    if not isinstance(params, DictConfig):
        raise FileRefused(f"{path}: has no entry model.params", hint=hint)
    known = maps.typed(OriginalConfigFile, "original-config")
    facts = {}
    for name, where in ((name, each) for name, many in known.facts.items() for each in many):
        said = _first(params, where.paths)
        if isinstance(said, str) and said in where.values:
            facts[name] = Fact(name, where.values[said], SOURCE, f"{path.name} says {said}")
    values, problems = [], []
    for target, line in ((name, each) for name, many in known.values.items() for each in many):
        try:
            if (said := _answer(params, line)) is not None:
                values.append((target, line, said))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise FileRefused(f"{path}: entries make no sense", problems=problems, hint=hint)
    return OriginalConfig(path, facts, tuple(values))


def _answer(params: Any, where: ValuePath) -> Any:
    """Returns a number or a list of numbers; None if the file does not say."""
    said, factor = _first(params, where.paths), _first(params, where.times)
    if said is None:
        return None
    numbers = said if isinstance(said, list) and not where.divides else [said]
    if not numbers or not all(map(_is_size, [*numbers, *([factor] if factor else [])])):
        raise ValueError(f"{where.paths[0]}: {said!r} where positive numbers were expected")
    if not where.times:
        return said
    return [factor * n for n in numbers] if factor else None


def _without_calls(tree: Any) -> Any:
    """Leaves out what asks a resolver: those are whatever this process has registered."""
    if isinstance(tree, dict):
        return {key: _without_calls(item) for key, item in tree.items()}
    if isinstance(tree, list):
        return [_without_calls(item) for item in tree]
    return None if isinstance(tree, str) and "${" in tree and ":" in tree else tree


def _at(tree: Any, dotted: str) -> Any:
    """Returns an entry; None if it is missing, or leads to one that is."""
    from omegaconf import DictConfig, ListConfig
    from omegaconf.errors import OmegaConfBaseException

    try:
        for part in dotted.split("."):
            tree = tree.get(part) if isinstance(tree, DictConfig) else None
        return [*tree] if isinstance(tree, ListConfig) else tree
    except (OmegaConfBaseException, RecursionError):
        return None


def _first(params: Any, paths: Iterable[str]) -> Any:
    """Returns the first answer; -1 stands for none in these files."""
    answers = (_at(params, path) for path in paths)
    return next((a for a in answers if a is not None and a != -1), None)


def _is_size(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, int | float) and value > 0)


def _same(have: Any, said: Any) -> bool:
    """Whether two values mean the same: a number stands for a list of it."""
    if have is None and said is False:
        return True
    if isinstance(have, list) != isinstance(said, list):
        many, one = (have, said) if isinstance(have, list) else (said, have)
        return all(item == one for item in many)
    return bool(have == said)
