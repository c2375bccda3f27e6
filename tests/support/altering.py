"""Alters copies of converted folders, and reads what `verify` found in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptconv.verification.result import Problem, Verification
from tests.mutations import replace
from tests.support.checkpoints import raw, save

__all__ = ["alter", "kinds", "resave"]


def alter(path: Path, **values: Any) -> None:
    """Sets entries of a JSON file; None takes one out."""
    data = json.loads(path.read_text()) | values
    replace(path, json.dumps({key: value for key, value in data.items() if value is not None}))


def resave(path: Path, rename: Callable[[str], str], extra: dict[str, Any] | None = None) -> None:
    """Writes a weight file anew, with other names and further tensors."""
    tensors = {rename(key): value for key, value in raw(path).items()} | (extra or {})
    path.unlink()
    save(tensors, path)


def kinds(found: Verification) -> dict[tuple[str, str], tuple[Problem, ...]]:
    """Returns the problems by component and kind of check."""
    return {(c.component, c.kind): c.problems for c in found.checks if c.problems}
