"""Reads the YAML that a model was trained with (LDM or SGM), where a user has it.

What it says wins over what was measured or assumed, and each disagreement is reported. Which entry
is which value stands in `key_maps/original-config.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..detection.facts import Fact
from ..errors import FileRefused
from ..maps.architecture import KeyMaps
from .config import Config

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
        FileRefused: it is not such a file, or an entry that is read has no sensible value.
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
        ValueError,
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
    values, problems = [], []
    for line in known["values"]:
        try:
            if (said := _answer(params, line)) is not None:
                values.append((line, said))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise FileRefused(f"{path}: entries make no sense", problems=problems, hint=hint)
    return OriginalConfig(path, facts, tuple(values))


def _answer(params: Any, line: Mapping[str, Any]) -> Any:
    """Returns a number or a list of numbers; None if the file does not say."""
    said, factor = (_first(params, line.get(part, ())) for part in ("path", "times"))
    if said is None or (isinstance(said, str) and "${" in said):
        return None
    numbers = said if isinstance(said, list) and "divides" not in line else [said]
    if not numbers or not all(map(_is_size, [*numbers, *([factor] if factor else [])])):
        raise ValueError(f"{line['path'][0]}: {said!r} where positive numbers were expected")
    if "times" not in line:
        return said
    return [factor * n for n in numbers] if factor else None


def _at(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


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
