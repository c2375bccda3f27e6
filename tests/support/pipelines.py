"""What the tests of pipelines share: comparing two of them, and running `ckptconv generate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

from ckptconv.cli import main
from ckptconv.configs.config import class_of, configs
from ckptconv.inference.generation import Settings, call_arguments
from ckptconv.inference.model import Blueprint
from ckptconv.inference.modules import component_class, empty_module
from ckptconv.maps.architecture import bundled
from ckptconv.planning.plan import Plan

WHOLE = ("sd1", "sd2", "sdxl", "sdxl-refiner")
"""Architectures whose every task is run; of their relatives, with the same pipelines, the first."""

TASKS = [
    (architecture.name, task)
    for architecture in bundled().architectures.values()
    for n, task in enumerate(architecture.tasks)
    if (n == 0 or architecture.name in WHOLE) and not architecture.single
]
"""Architectures and tasks that a small checkpoint can show."""

OF_LIBRARIES = {
    *("_name_or_path", "_diffusers_version", "transformers_version", "dropout"),
    *("output_past", "decoder_start_token_id", "scale_decoder_outputs"),
}
"""Entries that say who wrote a configuration, and those that are published and that no network here
reads: T5's decoder is in no pipeline."""

SMALL = ("--size", "64", "--steps", "2", "--seed", "7", "--device", "cpu")
"""Two steps at 64 x 64 pixels: a tiny model takes a tenth of a second."""

Run = Callable[..., Result]


def empty(made: Plan, name: str, values: Mapping[str, Any] | None = None) -> nn.Module:
    """Returns a component of a plan without its weights; `values` win over its configuration."""
    config = configs(made)[name]
    blueprint = Blueprint(
        config.component.library, class_of(config), "model", {**config.values, **(values or {})}
    )
    module = empty_module(component_class(name, blueprint), blueprint, {}, torch.float16)
    assert module is not None
    return module


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}


def settings(config: Any) -> dict[str, Any]:
    """Returns a configuration of either library without what tells who wrote it."""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    if inside := values.get("backbone_config"):  # only `from_pretrained` notes its dtype
        values["backbone_config"] = {**inside, "dtype": None}
    return {name: value for name, value in values.items() if name not in OF_LIBRARIES}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields parameters and buffers, those that are not saved included."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def assert_same(ours: Any, theirs: Any) -> None:
    """Compares two pipelines in everything that decides what they compute."""
    assert type(ours) is type(theirs)
    assert ours.components.keys() == theirs.components.keys()
    assert modules(ours).keys() == modules(theirs).keys()
    for name, module in modules(ours).items():
        other = modules(theirs)[name]
        assert type(module) is type(other)
        assert not module.training
        assert settings(module.config) == settings(other.config)
        pairs = zip(tensors(module), tensors(other), strict=True)
        for (key, mine), (their_key, their) in pairs:
            assert (key, mine.dtype, mine.shape) == (their_key, their.dtype, their.shape)
            assert (mine.stride(), mine.device) == (their.stride(), their.device), key
            assert mine.requires_grad == their.requires_grad
            assert torch.equal(bits(mine), bits(their)), key
    assert settings(ours.scheduler.config) == settings(theirs.scheduler.config)
    assert type(ours.scheduler) is type(theirs.scheduler)
    for name in ("tokenizer", "tokenizer_2"):
        if mine := ours.components.get(name):
            assert_same_tokenizer(mine, theirs.components[name])
    plain = {k: v for k, v in settings(ours.config).items() if not isinstance(v, list | tuple)}
    assert {key: theirs.config.get(key) for key in plain} == plain


def assert_same_tokenizer(mine: Any, their: Any) -> None:
    assert type(mine) is type(their)
    assert mine.get_vocab() == their.get_vocab()
    length = 77 if "CLIP" in type(mine).__name__ else 512
    most = {"max_length": length} if mine.model_max_length > length else {}
    said = [
        tokenizer(
            ["A photo of a CAT, 3 naïve 猫!!", ""], padding="max_length", truncation=True, **most
        ).input_ids
        for tokenizer in (mine, their)
    ]
    assert said[0] == said[1]
    assert {len(ids) for ids in said[0]} == {length}
    assert mine.chat_template == their.chat_template


def asked(cls: Any, image: Image.Image, **settings: Any) -> dict[str, Any]:
    """Returns what a pipeline would be called with; it needs no weights for that."""
    pipe = cls.__new__(cls)
    return call_arguments(pipe, Settings("a cat", image=Path("x"), **settings), {"image": image})


def runner(folder: Path) -> Run:
    """Gives what runs `ckptconv generate FILE "a cat" -o out.png ...` in this process."""

    def run(file: Path, *options: str | Path, out: str = "out.png", code: int = 0) -> Result:
        arguments = ["generate", str(file), "a cat", "-o", str(folder / out), *map(str, options)]
        result = CliRunner().invoke(main, arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.stderr
        return result

    return run


def parameters(path: Path) -> dict[str, Any]:
    with Image.open(path) as file:
        return dict(json.loads(file.text["ckptconv"]))  # type: ignore[attr-defined]


def pixels(path: Path) -> Any:
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB")).astype(int)
