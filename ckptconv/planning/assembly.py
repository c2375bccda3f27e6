"""What the files of a folder were taken for, to put a model together from them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Assembly:
    """What each file of a folder was taken for.

    Attributes:
        main: the file of the model itself.
        title: of the model.
        donors: the files that give the other components, by the option that would name them.
        left_out: why each other file has no part in it.
        problems: several files that fit the same place.
    """

    main: Path
    title: str
    donors: Mapping[str, Path]
    left_out: Mapping[Path, str]
    problems: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """A sentence on each file."""
        return (
            f"{self.main.name}: {self.title}",
            *(f"{path.name}: {name}" for name, path in self.donors.items()),
            *(f"{path.name}: left out: {why}" for path, why in self.left_out.items()),
        )

    @property
    def command(self) -> str:
        """The command that names the files."""
        donors = (f"--{n.replace('_', '-')} {shlex.quote(str(p))}" for n, p in self.donors.items())
        return f"`{' '.join(['ckptconv convert', shlex.quote(str(self.main)), 'OUT', *donors])}`"

    @classmethod
    def of_data(cls, data: Mapping[str, Any], title: str) -> Assembly:
        """Returns what `as_data` made plain."""
        donors = {name: Path(path) for name, path in data["donors"].items()}
        left_out = {Path(path): why for path, why in data["left_out"].items()}
        return cls(Path(data["main"]), title, donors, left_out)

    def as_data(self) -> dict[str, Any]:
        """Returns plain data, for JSON."""
        return {
            "main": str(self.main),
            "donors": {name: str(path) for name, path in self.donors.items()},
            "left_out": {str(path): why for path, why in self.left_out.items()},
        }
