"""The rows of `key_maps/relatives.yaml` as files, made without the key maps, and their folders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ckptconv
from ckptconv.cli import main
from ckptconv.files import read_json
from ckptconv.maps.architecture import Architecture, bundled
from ckptconv.maps.architecture import Relative as Row
from ckptconv.maps.schema import Named
from tests.support.oracle import compare, component
from tests.support.reference import unet
from tests.support.reference.files import Parts

ROWS = {row.name: row for row in bundled().typed(Named[Row], "relatives")}
NOTHING = torch.zeros(0)
"""A tensor that marks a file by its name alone."""


@dataclass(frozen=True)
class Relative:
    """A small file of some relative.

    Attributes:
        row: its name in `key_maps/relatives.yaml`.
        networks: what builds the network behind each prefix.
        extras: further tensors, which mark the file or take the place of others.
        configs: values of its configurations, by `component.entry`.
        variant: what distinguishes the file from the one that stands for the row.
        task: the task, where it is not that of the row.
        metadata: of the header.
        slow: whether the fast suite leaves it out, as the networks of another file are the same.
    """

    row: str
    networks: Parts
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    configs: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    task: str = ""
    slow: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.row}, {self.variant}" if self.variant else self.row

    @property
    def architecture(self) -> Architecture:
        return bundled().architectures[ROWS[self.row].architecture]

    @property
    def task_name(self) -> str:
        return self.task or ROWS[self.row].task

    @property
    def whole(self) -> bool:
        """Whether nothing is missing: a pipeline, or the one component that its kind has."""
        vae = {"first_stage_model.", "vae."} & self.networks.keys()
        return bool(self.architecture.single or vae)

    @property
    def runs(self) -> bool:
        return not self.variant and not self.architecture.single

    def tensors(self) -> dict[str, Tensor]:
        """Returns what the file holds."""
        built = {p + k: v for p, build in self.networks.items() for k, v in _state(build).items()}
        taken = self.extras.keys() & built.keys()
        assert all(built[key].shape == self.extras[key].shape for key in taken)
        return {key: value.clone() for key, value in {**built, **self.extras}.items()}


@functools.cache
def _state(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Returns the tensors of a network with random weights, the same each time."""
    return {k: v.half().contiguous() for k, v in unet.randomise(build(), 1).state_dict().items()}


@dataclass(frozen=True)
class Converted:
    """A relative's file, and the folder that it was converted to."""

    relative: Relative
    file: Path
    folder: Path
    tensors: Mapping[str, Tensor]

    def network(self, prefix: str) -> nn.Module:
        """Returns the reference network with the weights that the file has behind a prefix."""
        network = self.relative.networks[prefix]().double()
        network.load_state_dict({key: self.tensors[prefix + key] for key in network.state_dict()})
        return network

    def compare(self) -> None:
        """Asserts that every module computes what its reference network computes."""
        for prefix in self.relative.networks:
            compare(self.network(prefix), self.folder)

    def config(self, name: str) -> dict[str, Any]:
        """Returns the configuration of a component."""
        folder = component(self.folder, name)
        return read_json(folder / f"{'scheduler_config' if name == 'scheduler' else 'config'}.json")


def convert(relative: Relative, folder: Path, *options: object) -> Converted:
    """Writes the file of a relative into a folder, and converts it."""
    folder.mkdir(exist_ok=True)
    file, tensors = folder / "model.safetensors", relative.tensors()
    save_file(tensors, file, dict(relative.metadata))
    run("convert", file, folder / "out", *options)
    return Converted(relative, file, folder / "out", tensors)


def run(*arguments: object) -> Any:
    """Runs a command, which must succeed."""
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def verified(file: Path | None, folder: Path, **choices: Any) -> None:
    found = ckptconv.verify(file, folder, **choices)
    assert found.passed, found.as_data()


def exported(folder: Path) -> dict[str, Tensor]:
    """Turns a folder back into a file, and returns what it holds."""
    back = folder.parent / "back.safetensors"
    run("export", folder, back, "--overwrite")
    return load_file(back)


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def round_trip(file: Path, folder: Path) -> None:
    """Proves a folder, with its file and alone, and turns it back into the file."""
    verified(file, folder)
    verified(None, folder)
    assert_equal(exported(folder), load_file(file))
