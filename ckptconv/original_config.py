"""Reads the YAML that a model was trained with (LDM or SGM), where a user has it.

What it says wins over what was measured or assumed, and each disagreement is reported. Which entry
is which value stands in `key_maps/original-config.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .architecture import KeyMaps
from .config import Config
from .errors import FileRefused
from .facts import Fact

__all__ = ["OriginalConfig", "read_original_config"]

SOURCE = "original config"


@dataclass(frozen=True, slots=True)
class OriginalConfig:
    """What the YAML says.

    Attributes:
        path: of the file.
        facts: by name.
        values: the entries of `key_maps/original-config.yaml` that the file answers, with the
            answer.
    """

    path: Path
    facts: Mapping[str, Fact] = field(default_factory=dict)
    values: tuple[tuple[Mapping[str, Any], Any], ...] = ()

    def overrides(self, built: Mapping[str, Config]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Returns the values that win, by component, and a sentence for each disagreement.

        Args:
            built: the configurations without this file.
        """
        wins: dict[str, dict[str, Any]] = {}
        notes = []
        for line, said in self.values:
            name, component = line["name"], line["component"]
            if component not in built:
                continue
            values = dict(built[component].values) | wins.get(component, {})
            value = said
            if "divides" in line:
                value = [width // said for width in values[line["divides"]]]
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
    """Reads an LDM or SGM yaml. Its interpolations are not followed.

    Raises:
        FileRefused: it is not such a file.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    hint = "give the yaml that the model was trained with, such as v1-inference.yaml"
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise FileRefused(f"{path}: is not a YAML mapping", hint=hint)
        tree = OmegaConf.to_container(loaded, resolve=False)
    except (
        OSError,
        UnicodeDecodeError,
        YAMLError,
        OmegaConfBaseException,
        RecursionError,
    ) as error:
        raise FileRefused(f"{path}: cannot be read as YAML: {error}", hint=hint) from error
    params = _at(tree, "model.params")
    if not isinstance(params, dict):
        raise FileRefused(f"{path}: has no entry model.params", hint=hint)
    known = maps.read("original-config")
    facts = {}
    for line in known["facts"]:
        said = _first(params, line["path"])
        if isinstance(said, str) and said in line["values"]:
            name, value = line["fact"], line["values"][said]
            facts[name] = Fact(name, value, SOURCE, f"{path.name} says {said}")
    values = []
    for line in known["values"]:
        said = _first(params, line["path"])
        if "times" in line and isinstance(said, list):
            factor = _first(params, line["times"])
            said = [factor * n for n in said] if _is_number(factor) else None
        if _is_number(said) or isinstance(said, list):
            values.append((line, said))
    return OriginalConfig(path, facts, tuple(values))


def _at(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _first(params: Any, paths: Iterable[str]) -> Any:
    """Returns the first answer; -1 stands for none in these files."""
    answers = (_at(params, path) for path in paths)
    return next((a for a in answers if a is not None and a != -1), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _same(have: Any, said: Any) -> bool:
    """Whether two values mean the same: a number stands for a list of it."""
    if have is None and said is False:
        return True
    if isinstance(have, list) and not isinstance(said, list):
        return all(item == said for item in have)
    return bool(have == said)
