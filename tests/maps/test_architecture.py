"""The architectures are data: what is bundled, a folder of one's own, and malformed files."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING

import pytest

from ckptconv.detection.detect import detect
from ckptconv.errors import HeaderError, MapError
from ckptconv.maps.architecture import Architecture, Component, KeyMaps, Source, Task, bundled
from ckptconv.maps.evidence import Assumed, Default, Indices, Lacks, Rank
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
        "chroma": "Chroma",
        "flux": "FLUX.1",
        "koala-1b": "Stable Diffusion XL, distilled (KOALA-1B)",
        "koala-700m": "Stable Diffusion XL, distilled (KOALA-700M)",
        "sd1": "Stable Diffusion 1.x",
        "sd2": "Stable Diffusion 2.x",
        "sdxl": "Stable Diffusion XL",
        "sdxl-refiner": "Stable Diffusion XL refiner",
        "ssd-1b": "Stable Diffusion XL, pruned (Segmind SSD-1B, Vega)",
        "z-image": "Z-Image",
    }


@pytest.mark.parametrize(
    "architecture",
    [a for a in bundled().architectures.values() if not a.single],
    ids=lambda a: a.name,
)
def test_an_architecture_is_whole(architecture: Architecture) -> None:
    if architecture.main == "unet":  # transformers are trained with flow matching
        assert {"prediction_type", "zero_terminal_snr"} <= set(architecture.facts)
    assert all(isinstance(w[-1], Assumed | Default) for w in architecture.facts.values())
    assert {c.name for c in architecture.models} >= {architecture.main, "vae"}
    for component in architecture.models:
        assert component.weights == (
            "model" if component.library == "transformers" else "diffusion_pytorch_model"
        )
        assert all(architecture.maps.keymap(source.keymap) for source in component.sources)
    kinds = {c.kind for c in architecture.components.values()}
    assert kinds - {"processor"} == {"model", "tokenizer", "scheduler"}
    for name in architecture.index.keys() & architecture.components.keys():
        one, other = architecture.index[name], architecture.components[name]
        assert set(one.facts["task"]).isdisjoint(other.tasks)  # of each task's, one says what it is
    layout = architecture.layout()
    assert detect(layout).require()[0].name == architecture.name
    build_plan(detect(layout)).require_complete()


def test_conditions_and_tasks_are_read_into_values() -> None:
    sd1 = bundled().architectures["sd1"]
    assert Task("inpainting", "StableDiffusionInpaintPipeline", 9) in sd1.tasks
    assert sd1.conditions[1] == Indices("input_blocks.*.1.proj_in.weight", (1, 2, 4, 5, 7, 8))
    assert sd1.conditions[3] == Rank(
        "input_blocks.1.1.proj_in.weight", 4, "SD1 projects with 1x1 convolutions"
    )
    assert sd1.conditions[4] == Lacks("label_emb.0.0.weight")


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
        (("title: ", "tilte: "), "unknown word 'tilte'; did you mean 'title'?\n"),
        (("title: ", "tilte: "), "'title' is missing\n"),
        (("aliases: [", "aliases: 3 # ["), "aliases: found 3, needed a list\n"),
        (("- {lacks: label_emb.weight}", "- label_emb.weight"), "detect[5]: found 'label_emb.weig"),
        (("lacks: label_emb.weight", "laks: x"), "detect[5]: unknown word 'laks'; did you mean 'l"),
        (
            ("lacks: label_emb.weight", "lacks: x, has: y"),
            "detect[5]: has 'has' and 'lacks', which",
        ),
        (
            ("lacks: label_emb.weight", "lacks: x, is: 4"),
            "detect[5]: unknown word 'is', expected o",
        ),
        (("lacks: label_emb.weight", "because: x"), "detect[5]: needs one of the words has, lacks"),
        (("lacks: label_emb.weight", "rank: x"), "detect[5]: 'is' is missing"),
        (
            ("lacks: label_emb.weight", "rank: x, is: four"),
            "detect[5].is: found 'four', needed a w",
        ),
        (
            ("lacks: label_emb.weight", "indices: x, is: [1]"),
            "detect[5]: 'indices' needs one '*' i",
        ),
        (
            ("lacks: label_emb.weight", "indices: x.*, is: 1"),
            "detect[5].is: found 1, needed a list",
        ),
        (
            ("channels: 9", "channels: nine"),
            "tasks.inpainting.channels: found 'nine', needed a whole",
        ),
        (
            ("channels: 9", "channels: true"),
            "tasks.inpainting.channels: found True, needed a whole ",
        ),
        (
            ("{pipeline: StableDiffusionInp", "{class: StableDiffusionInp"),
            "tasks.inpainting: 'pipeli",
        ),
        (("  unet:\n", "  net:\n"), "components: there is no 'unet', which tells architectures ap"),
        (
            ("kind: tokenizer", "kind: tokeniser"),
            "components.tokenizer.kind: unknown word 'tokenis",
        ),
        (
            ("kind: scheduler", "kind: model"),
            "components.scheduler: a model needs 'sources', and no",
        ),
        (
            ("prefix: cond_stage_model.transformer., ", ""),
            "text_encoder.sources[0]: 'prefix' is mi",
        ),
        (
            ("library: transformers", "lib: transformers"),
            "components.tokenizer: 'library' is missing",
        ),
        (("facts: {extends: shared/facts}", "facts: 3"), "facts: found 3, needed a mapping\n"),
        (("    is: {", "    iss: {"), "joints.text: unknown word 'iss'; did you mean 'is'?\n"),
        (("attn2.to_k.weight: 1,", "attn2.to_k.weight: x,"), "to_k.weight: found 'x', needed a wh"),
        (("{extends: shared/configs/pndm}", "{facts: {task: 1}}"), ""),
        (
            ("sample_size: 64", "sample_size: !dimm [x, 1]"),
            "config[0].sample_size: unknown hole '!d",
        ),
        (("sample_size: 64", "sample_size: !dimm [x, 1]"), "; did you mean '!dim'?\n"),
        (("sample_size: 64", "sample_size: !dim [x]"), "sample_size: 'axis' is missing\n"),
        (
            ("sample_size: 64", "sample_size: !dim [x, 1, 2, y, 3]"),
            "'!dim' takes [key, axis, otherwise, also",
        ),
        (
            ("sample_size: 64", "sample_size: !heads [x, wide]"),
            "sample_size.width: found 'wide', nee",
        ),
    ],
)
def test_a_malformed_architecture_is_refused(
    tmp_path: Path, edit: tuple[str, str], said: str
) -> None:
    maps = own(tmp_path, edit)
    if not said:  # a fact may be anything
        maps.check_architectures()
        return
    with pytest.raises(MapError) as caught:
        maps.check_architectures()
    message = str(caught.value)
    file = tmp_path / "sd1" / "arch.yaml"
    assert message.startswith(f"{file}: malformed\n  - {file}: ")
    assert said in message
    assert message.endswith("hint: docs/key-maps.md describes every word of the format")


def test_all_faults_of_all_files_are_reported_at_once(tmp_path: Path) -> None:
    maps = own(
        tmp_path,
        ("title: ", "tilte: "),
        ("  - {lacks: label_emb.weight}\n", "  - {laks: label_emb.weight}\n"),
        ("    is: {", "    iss: {"),
        ("map: shared/maps/clip}", "map: shared/maps/clip, unles: x}"),
        ("sample_size: 64", "sample_size: !dimm [x, 1]"),
    )
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "arch.yaml").write_text(
        "extends: sd1/arch\ntitle: New\nfacts: 3\nkind: x\n"
    )
    sd1, new = (tmp_path / name / "arch.yaml" for name in ("sd1", "new"))
    with pytest.raises(MapError) as caught:
        _ = maps.architectures
    assert caught.value.message == "the key maps are malformed"
    for said in (
        f"{sd1}: unknown word 'tilte'; did you mean 'title'?",
        f"{sd1}: 'title' is missing",
        f"{sd1}: detect[5]: unknown word 'laks'; did you mean 'lacks'?",
        f"{sd1}: joints.text: unknown word 'iss'; did you mean 'is'?",
        f"{sd1}: components.unet.config[0].sample_size: unknown hole '!dimm'; did you mean '!dim'?",
        f"{new}: unknown word 'kind'",
        f"{new}: facts: found 3, needed a mapping",
    ):
        assert sum(problem.startswith(said) for problem in caught.value.problems) == 1, said
    unless = [p for p in caught.value.problems if "unknown word 'unles'" in p]
    assert unless == [
        f"{sd1}: components.text_encoder.sources[0]: unknown word 'unles', expected one of prefix, "
        "map, has, lacks"
    ]


def test_a_fault_is_that_of_the_file_it_stands_in(tmp_path: Path) -> None:
    for name in ("shared", "sd1"):
        (tmp_path / name).mkdir()
    facts = "prediction_type: [{assume: epsilon}]\nzero_terminal_snr: [{assume: 1, because: x}]"
    (tmp_path / "shared" / "facts.yaml").write_text(facts)
    with pytest.raises(MapError) as caught:
        KeyMaps([tmp_path, FOLDER]).content("sdxl")
    assert caught.value.problems == (
        f"{tmp_path / 'shared' / 'facts.yaml'}: facts.prediction_type[0]: 'because' is missing",
    )


def test_what_another_architecture_is_made_of_is_read_only_if_asked_for(tmp_path: Path) -> None:
    maps = own(tmp_path, ("    is: {", "    iss: {"))
    assert detect(published("sdxl-base-fp16"), maps=maps).require()[0].name == "sdxl"
    with pytest.raises(MapError, match="iss"):
        detect(published("sd15-emaonly-fp32"), maps=maps)


def test_a_map_that_a_source_names_and_nobody_has_is_refused(tmp_path: Path) -> None:
    maps = own(tmp_path, ("map: shared/maps/clip}", "map: shared/maps/clp}"))
    with pytest.raises(MapError, match=re.escape("shared/maps/clp.yaml: no such file in")):
        build_plan(detect(published("sd15-emaonly-fp32"), maps=maps))


def test_facts_that_extend_a_file_that_is_not_there_are_refused(tmp_path: Path) -> None:
    maps = own(tmp_path, ("facts: {extends: shared/facts}", "facts: {extends: shared/fact}"))
    with pytest.raises(MapError, match=re.escape("shared/fact.yaml: no such file in")):
        maps.content("sd1")


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
    source = Source("", "shared/maps/unet")
    one, other = (Component("unet", "diffusers", sources=(source,)) for _ in range(2))
    assert hash(one) != hash(other)
