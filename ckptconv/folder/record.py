"""`ckptconv/source.json`: what a conversion notes of its source, written and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configs.config import Config
from ..detection.facts import Fact
from ..files import read_json
from ..maps.architecture import KeyMaps, bundled
from ..options import FACTS
from ..planning.plan import Plan
from ..version import __version__


@dataclass(frozen=True, slots=True)
class Record:
    """What the file says, as far as it makes sense: anybody may have edited it.

    Attributes:
        adapters: name and scale of each.
        assumed: by component and entry, such as `vae.scaling_factor`, values without evidence.
        donors: by component, the name of the file that it came from.
        dropped: by key of the source, why it was not converted.
    """

    architecture: Any
    adapters: tuple[tuple[Any, Any], ...]
    assumed: Mapping[str, Any]
    donors: Mapping[str, Any]
    dropped: Mapping[str, Any]
    facts: Mapping[str, Fact]


def read_record(path: Path, maps: KeyMaps | None = None) -> Record:
    """Reads a record; what makes no sense in it is passed over.

    Args:
        path: of the record.
        maps: the key maps to use; those that come with ckptconv by default.

    Raises:
        FileRefused: the file cannot be read, or holds no JSON object.
    """
    known = (maps or bundled()).known_facts
    values = read_json(path)
    adapters = values.get("adapters")
    return Record(
        values.get("architecture"),
        tuple(
            (_table(adapter).get("name"), _table(adapter).get("scale"))
            for adapter in (adapters if isinstance(adapters, list) else ())
        ),
        _table(values.get("assumed")),
        _table(values.get("donors")),
        _table(values.get("dropped")),
        {
            name: Fact(
                name, fact["value"], str(fact.get("source", "")), str(fact.get("detail", ""))
            )
            for name, fact in _table(values.get("facts")).items()
            if _table(fact).get("value") in (*FACTS.get(name, ()), *known.get(name, ()))
        },
    )


def recorded_files(values: Mapping[str, Any]) -> frozenset[str]:
    """Returns the files that a record lists as written by its conversion; none if it lists none."""
    files = values.get("files") if "ckptconv_version" in values else ()
    return frozenset(map(str, files)) if isinstance(files, list) else frozenset()


def record_of(plan: Plan, configs: Mapping[str, Config], files: Iterable[str]) -> dict[str, Any]:
    """Returns the content of the file: where a folder comes from, and which files belong to it."""
    architecture, task = plan.detection.require()
    header = plan.detection.header
    return {
        "adapters": [{"name": a.header.path.name, "scale": a.scale} for a in plan.adapters],
        "architecture": architecture.name,
        "assumed": {
            f"{name}.{entry}": config.values[entry]
            for name, config in configs.items()
            for entry, origin in config.origins.items()
            if origin == "assumed"
        },
        "ckptconv_version": __version__,
        "donors": {name: donor.name for name, donor in plan.donors.items()},
        "dropped": {step.sources[0].name: step.reason for step in plan.steps if step.reason},
        "facts": {
            fact.name: {"detail": fact.detail, "source": fact.source, "value": fact.value}
            for fact in plan.detection.facts.values()
        },
        "files": sorted(files),
        "source": {
            "metadata": dict(header.metadata),
            "name": header.path.name,
            "size": header.size,
        },
        "task": task.name,
        "unclaimed": list(plan.unclaimed),
    }


def _table(value: object) -> Mapping[str, Any]:
    """Returns what should be an object; an empty one if it is something else."""
    return value if isinstance(value, Mapping) else {}
