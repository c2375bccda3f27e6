"""The properties that every relative has: a file of `tests/architectures` lists its relatives.

    class TestProperties(PipelineProperties):
        relatives = (Relative("Stable Diffusion 1.x", whole("sd1", unet.TINY_SD1)), ...)

    class TestConfigurations(PublishedConfigurations):
        published = ("sd15",)

What the table of relatives promises is done as a user does it, with the commands.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ckptconv
from ckptconv.configs.config import class_of, configs, model_index
from ckptconv.detection.detect import detect
from ckptconv.planning.plan import build_plan
from tests.support import stock
from tests.support.published_relatives import PUBLISHED, header, understood
from tests.support.qwen import tokenizers
from tests.support.reference.files import TINY_FILES
from tests.support.relatives import Converted, Relative, assert_equal, exported, run, verified
from tests.support.spellings import assert_same_in_every_spelling

Convert = Callable[[Relative], Converted]
"""The fixture `converted`, of tests/architectures/conftest.py."""


class Properties:
    """Tests of each of some relatives."""

    relatives: ClassVar[tuple[Relative, ...]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Gives each test the relatives that have its property."""
        for argument, found in {
            "relative": self.relatives,
            "loadable": [r for r in self.relatives if r.whole],
            "runnable": [r for r in self.relatives if r.runs],
        }.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, _cases(found))

    def test_it_is_detected_as_what_it_is(self, relative: Relative, converted: Convert) -> None:
        found = json.loads(run("inspect", converted(relative).file, "--json").stdout)
        named = (found["architecture"], found["task"])
        assert named == (relative.architecture.name, relative.task_name)
        assert not found["unclaimed"]
        assert not found["problems"]

    def test_every_key_has_a_step_that_turns_back(
        self, relative: Relative, converted: Convert
    ) -> None:
        plan = ckptconv.plan(converted(relative).file)
        tensors = plan.detection.header.tensors
        assert Counter(s.name for step in plan.steps for s in step.sources) == Counter([*tensors])
        assert plan.problems == plan.unclaimed == ()
        targets = Counter((t.component, t.key) for step in plan.steps for t in step.targets)
        assert max(targets.values()) == 1
        assert plan.lossless
        assert {
            source.name: step.op.backward([t.shape for t in step.targets], source.shape)
            for step in plan.steps
            for source in step.sources
        } == {key: tensor.shape for key, tensor in tensors.items()}

    def test_it_is_the_same_in_every_spelling(self, relative: Relative) -> None:
        assert_same_in_every_spelling(relative.tensors())

    def test_its_configurations_say_what_only_it_has(
        self, relative: Relative, converted: Convert
    ) -> None:
        for place, value in relative.configs.items():
            component, _, entry = place.partition(".")
            assert converted(relative).config(component)[entry] == value

    def test_its_modules_compute_the_same(self, relative: Relative, converted: Convert) -> None:
        converted(relative).compare()

    def test_its_folder_is_verified(self, relative: Relative, converted: Convert) -> None:
        made = converted(relative)
        run("verify", made.file, made.folder)
        verified(None, made.folder)

    def test_its_tensors_come_back(self, relative: Relative, converted: Convert) -> None:
        made = converted(relative)
        assert_equal(exported(made.folder), made.tensors)

    @pytest.mark.slow
    def test_the_libraries_load_it_without_a_complaint(
        self, loadable: Relative, converted: Convert
    ) -> None:
        folder, architecture = converted(loadable).folder, loadable.architecture
        own = next(t for t in architecture.tasks if t.name == loadable.task_name)
        with stock.listening() as complaints:
            if architecture.single:
                stock.check_weights(stock.model(folder, stock.class_of(folder)), folder)
            else:
                # What the file lacks is null in the index: the caller says that it stays so.
                models = dict.fromkeys(ckptconv.plan(converted(loadable).file).absent)
                for component in architecture.for_task(own).models:
                    if (name := component.name) not in models:
                        cls = stock.class_of(folder / name)
                        models[name] = stock.model(folder / name, cls)
                        stock.check_weights(models[name], folder / name)
                pipeline = stock.load(folder, **models)
                assert type(pipeline).__name__ == own.pipeline
                main = getattr(pipeline, architecture.main)
                assert own.channels in (None, main.config.in_channels)
        assert complaints == []


class PipelineProperties(Properties):
    """Tests of relatives that are pipelines."""

    @pytest.mark.slow
    def test_it_makes_an_image(
        self, runnable: Relative, converted: Convert, tmp_path: Path
    ) -> None:
        given = tokenizers(runnable.architecture, tmp_path)
        options = [part for name, place in given.items() for part in (f"--{name}", place)]
        makes_an_image(runnable.task_name, converted(runnable).file, tmp_path, options)


class PublishedConfigurations:
    """Compares configurations with those of some published folders."""

    published: ClassVar[tuple[str, ...]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("folder_name", self.published)

    def test_they_mean_what_the_published_ones_say(self, folder_name: str) -> None:
        plan = build_plan(detect(header(folder_name)))
        plan.require_complete()
        built = configs(plan)
        ours: dict[str, Any] = {part: config.values for part, config in built.items()}
        ours["model_index"] = model_index(plan, built)
        assert ours["model_index"]["_diffusers_version"] == importlib.metadata.version("diffusers")
        assert ours.keys() == PUBLISHED[folder_name].keys()
        for part, values in PUBLISHED[folder_name].items():
            assert understood(part, ours[part]) == understood(part, values), part

    def test_they_hold_no_value_that_their_class_does_not_know(self, folder_name: str) -> None:
        import diffusers

        built = configs(build_plan(detect(header(folder_name))))
        models = [n for n, c in built.items() if (c.component.kind, c.component.home) == MODEL]
        assert len(models) >= 2
        for component in models:
            reader = getattr(diffusers, class_of(built[component]))
            known = inspect.signature(reader.__init__).parameters
            assert set(built[component].values) - set(known) == {"_class_name"}


def _cases(relatives: Iterable[Relative]) -> list[Any]:
    slow = [pytest.mark.slow]
    return [pytest.param(r, id=str(r), marks=slow if r.slow else ()) for r in relatives]


STATISTICS = ("mean", "std")
"""Of the image embeddings of unCLIP: no checkpoint holds them, so they are given."""

MODEL = ("model", "diffusers")
"""Kind and home of a component that is a model of diffusers."""

NEEDS = {
    "control": ["--image"],
    "controlnet": ["--image"],
    "depth-to-image": ["--image", "--strength"],
    "editing": ["--image"],
    "image-to-image": ["--image", "--strength"],
    "image-variation": ["--image", "--image-normalizer"],
    "inpainting": ["--image", "--mask", "--strength"],
    "instruct-pix2pix": ["--image"],
    "upscaling": ["--image"],
}


def makes_an_image(task: str, file: Path, folder: Path, more: list[Any]) -> None:
    """Checks that `generate` draws something of the right size."""
    size = 256 if task == "upscaling" else 64
    pixels = np.random.default_rng(1).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    width = TINY_FILES["sd2-unclip-l"]["embedder.model."]().state_dict()["visual.proj"].shape[1]
    save_file({n: torch.ones(1, width) for n in STATISTICS}, folder / "statistics.safetensors")
    values: dict[str, object] = {
        "--image": folder / "image.png",
        "--mask": folder / "image.png",
        "--strength": 1,
        "--image-normalizer": folder / "statistics.safetensors",
    }
    options = [part for option in NEEDS.get(task, ()) for part in (option, values[option])]
    out = folder / "out.png"
    settings = ("--steps", 1, "--size", size, "--seed", 7, "--device", "cpu")
    run("generate", file, "a cat", "-o", out, *settings, *options, *more)
    made = np.asarray(Image.open(out))
    assert made.shape == (size, size, 3)
    assert made.std() > 1
