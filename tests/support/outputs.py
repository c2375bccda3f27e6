"""Every JSON that a command prints, held to its schema."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

SCHEMAS = importlib.resources.files("ckptconv") / "data" / "schemas"


def strict(schema: Any) -> Any:
    """Returns a schema that knows all entries: a program that reads one may ignore new ones."""
    if isinstance(schema, list):
        return list(map(strict, schema))
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {**closed, **{key: strict(value) for key, value in schema.items()}}


def schemas() -> dict[str, Any]:
    """Returns the schemas by the names of their files."""
    files = (file for file in SCHEMAS.iterdir() if file.name.endswith(".json"))
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


@functools.cache
def validator(name: str) -> Any:
    """Returns the validator of a schema."""
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource

    known = {file: Resource.from_contents(strict(s)) for file, s in schemas().items()}
    found: Any = Draft202012Validator(
        {"$ref": name}, registry=Registry().with_resources(known.items())
    )
    return found


def check(document: Any) -> None:
    """Checks the JSON of a command, and that of each file in it."""
    document = json.loads(json.dumps(document))
    name = document["schema"].split("/")[1]
    faults = [
        f"{e.json_path}: {e.message[:300]}" for e in validator(f"{name}.json").iter_errors(document)
    ]
    assert not faults, (document["schema"], faults)
