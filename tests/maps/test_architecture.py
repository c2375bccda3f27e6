"""The architectures are data: what is bundled, a folder of one's own, and malformed files."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING

import pytest

from ckptconv.detection.detect import detect
from ckptconv.errors import HeaderError, MapError
from ckptconv.maps.architecture import Architecture, Component, Condition, KeyMaps, Task, bundled
from ckptconv.planning.plan import build_plan
from tests.conftest import published

if TYPE_CHECKING:
    from pathlib import Path

(FOLDER,) = bundled().folders


def own(folder: Path, *edits: tuple[str, str], name: str = "sd1") -> KeyMaps:
    """Key maps with a changed copy of sd1's arch.yaml in a folder that comes first."""
    text = (FOLDER / "sd1" / "arch.yaml").read_text()
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    (folder / name).mkdir()
    (folder / name / "arch.yaml").write_text(text)
    return KeyMaps([folder, FOLDER])


def test_the_bundled_architectures() -> None:
    known = {a.name: a.title for a in bundled().architectures.values()}
    assert known == known | {
        "koala-1b": "Stable Diffusion XL, distilled (KOALA-1B)",
        "koala-700m": "Stable Diffusion XL, distilled (KOALA-700M)",
        "sd1": "Stable Diffusion 1.x",
        "sd2": "Stable Diffusion 2.x",
        "sdxl": "Stable Diffusion XL",
        "sdxl-refiner": "Stable Diffusion XL refiner",
        "ssd-1b": "Stable Diffusion XL, pruned (Segmind SSD-1B, Vega)",
    }


@pytest.mark.parametrize(
    "architecture",
    [a for a in bundled().architectures.values() if not a.single],
    ids=lambda a: a.name,
)
def test_an_architecture_is_whole(architecture: Architecture) -> None:
    assert {"prediction_type", "zero_terminal_snr"} <= set(architecture.facts)
    ends = [
        witnesses[-1].keys() & {"assume", "default"} for witnesses in architecture.facts.values()
    ]
    assert all(ends)
    assert {c.name for c in architecture.models} >= {"unet", "vae"}
    for component in architecture.models:
        assert component.weights == (
            "model" if component.library == "transformers" else "diffusion_pytorch_model"
        )
        assert all(architecture.maps.keymap(source.keymap) for source in component.sources)
    kinds = {c.kind for c in architecture.components.values()}
    assert kinds - {"processor"} == {"model", "tokenizer", "scheduler"}
    for name in architecture.index.keys() & architecture.components.keys():
        one, other = architecture.index[name], architecture.components[name]
        assert set(one["tasks"]).isdisjoint(other.tasks)  # of each task's, one says what it is
    layout = architecture.layout()
    assert detect(layout).require()[0].name == architecture.name
    build_plan(detect(layout)).require_complete()


def test_conditions_and_tasks_are_read_into_values() -> None:
    sd1 = bundled().architectures["sd1"]
    assert Task("inpainting", "StableDiffusionInpaintPipeline", 9) in sd1.tasks
    assert sd1.conditions[1] == Condition(
        "indices", "input_blocks.*.1.proj_in.weight", (1, 2, 4, 5, 7, 8)
    )
    assert sd1.conditions[3] == Condition(
        "rank", "input_blocks.1.1.proj_in.weight", 4, "SD1 projects with 1x1 convolutions"
    )
    assert sd1.conditions[4] == Condition("lacks", "label_emb.0.0.weight")


def test_key_maps_are_found_without_their_checkout(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(FOLDER, copy)
    header = published("sdxl-base-fp16")
    plan = build_plan(detect(header, maps=KeyMaps([copy])))
    assert plan.steps == build_plan(detect(header)).steps


def test_a_folder_of_ones_own_adds_and_replaces(tmp_path: Path) -> None:
    maps = own(tmp_path, ("title: Stable Diffusion 1.x", "title: Mine"))
    assert maps.architectures["sd1"].title == "Mine"
    assert list(maps.architectures) == list(bundled().architectures)
    added = own(
        tmp_path, ("is: 4,", "is: 3,"), ("title: Stable Diffusion 1.x", "title: New"), name="new"
    )
    assert list(added.architectures) == sorted(["new", *bundled().architectures])
    header = published("sd15-emaonly-fp32")
    assert detect(header, maps=added).require()[0].title == "Mine"
    (verdict,) = (v for v in detect(header, maps=added).verdicts if v.architecture == "new")
    assert [line.text for line in verdict.failing] == [
        "input_blocks.1.1.proj_in.weight has rank 4, needed 3 (SD1 projects with 1x1 convolutions)"
    ]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (("title: ", "tilte: "), "KeyError: 'title'"),
        (("aliases: [", "aliases: 3 # ["), "TypeError: 'int' object is not iterable"),
        (("- {lacks: label_emb.weight}", "- label_emb.weight"), "AttributeError: "),
        (("lacks: label_emb.weight", "without: x"), "not a condition: {'without': 'x'}"),
        (("lacks: label_emb.weight", "lacks: x, has: y"), "not a condition: {'lacks': 'x', 'has'"),
        (("lacks: label_emb.weight", "lacks: x, is: 4"), "'has' and 'lacks' stand alone, 'rank' n"),
        (("lacks: label_emb.weight", "has: x.*"), "'has' and 'lacks' stand alone, 'rank' needs 'i"),
        (("lacks: label_emb.weight", "rank: x"), "'rank' needs 'is' and a number"),
        (("lacks: label_emb.weight", "rank: x, is: four"), "'rank' needs 'is' and a number"),
        (("lacks: label_emb.weight", "indices: x, are: [1]"), "'indices' needs one '*' in its key"),
        (("lacks: label_emb.weight", "indices: x.*, are: 1"), "'indices' needs one '*' in its key"),
        (("  9: {name: inpainting,", "  nine: {name: t,"), "invalid literal for int()"),
        (("pipeline: StableDiffusionInp", "class: StableDiffusionInp"), "KeyError: 'pipeline'"),
        (
            ("  unet:\n", "  net:\n"),
            "there is no component 'unet', which tells architectures apart",
        ),
        (("kind: tokenizer", "kind: tokeniser"), "component 'tokenizer': kind 'tokeniser' is not "),
        (("kind: scheduler", "kind: model"), "component 'scheduler': a model needs sources, and n"),
        (("prefix: first_stage_model., ", ""), "KeyError: 'prefix'"),
        (("library: transformers", "lib: transformers"), "KeyError: 'library'"),
        (("facts: {extends: shared/facts}", "facts: 3"), "AttributeError: 'int' object has no att"),
    ],
)
def test_a_malformed_architecture_is_refused(
    tmp_path: Path, edit: tuple[str, str], said: str
) -> None:
    maps = own(tmp_path, edit)
    with pytest.raises(MapError) as caught:
        _ = maps.architectures
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'sd1' / 'arch.yaml'}: malformed: ")
    assert said in message
    assert message.endswith("hint: docs/key-maps.md describes every section of arch.yaml")


def test_a_map_that_a_source_names_and_nobody_has_is_refused(tmp_path: Path) -> None:
    maps = own(tmp_path, ("map: shared/maps/vae", "map: shared/maps/vea"))
    with pytest.raises(MapError, match=re.escape("shared/maps/vea.yaml: no such file in")):
        build_plan(detect(published("sd15-emaonly-fp32"), maps=maps))


def test_facts_that_extend_a_file_that_is_not_there_are_refused(tmp_path: Path) -> None:
    maps = own(tmp_path, ("facts: {extends: shared/facts}", "facts: {extends: shared/fact}"))
    with pytest.raises(MapError, match=re.escape("shared/fact.yaml: no such file in")):
        _ = maps.architectures


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, MapError, "new/layout.json: no such file in"),
        ("{}", HeaderError, "layout.json: not a saved header"),
        ("{", HeaderError, "layout.json: "),
    ],
)
def test_a_layout_that_cannot_be_read_is_refused(
    tmp_path: Path, content: str | None, error: type[Exception], said: str
) -> None:
    maps = own(tmp_path, name="new")
    if content is not None:
        (tmp_path / "new" / "layout.json").write_text(content)
    with pytest.raises(error, match=re.escape(said)):
        maps.architectures["new"].layout()


def test_an_extension_is_laid_over_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("a: {x: 1, y: 2}\nb: [1, 2]\nc: {z: 3}\n")
    (tmp_path / "middle.yaml").write_text("extends: base\na: {y: 3}\nc: 4\n")
    maps = KeyMaps([tmp_path])
    assert maps.extended({"extends": "middle", "b": [5], "d": None}) == {
        "a": {"x": 1, "y": 3},
        "b": [5],
        "c": 4,
        "d": None,
    }
    assert maps.extended({"a": 1}) == {"a": 1}


def test_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b\n")
    (tmp_path / "b.yaml").write_text("extends: a\n")
    with pytest.raises(MapError, match=r"^a: extends itself: a -> b -> a$"):
        KeyMaps([tmp_path]).extended({"extends": "a"})


def test_components_are_compared_by_identity_so_that_they_can_be_cached() -> None:
    component = Component("unet", "model", "diffusers", (), {})
    assert hash(component) != hash(Component("unet", "model", "diffusers", (), {}))
