"""The page: whole, true to the plan, and deaf to what a stranger wrote into the file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

from ckptconv import inspect, plan
from ckptconv.cli import main
from ckptconv.destination import Destination
from ckptconv.detection.detect import detect
from ckptconv.errors import OutputError
from ckptconv.planning.plan import Plan, build_plan
from ckptconv.reading.tensor import Header, Tensor
from ckptconv.reports.html import PAGE, fragment, page
from ckptconv.reports.html.render import environment, ours, rendered
from ckptconv.reports.network import blocks
from ckptconv.verification.result import Check, Problem
from tests.conftest import PUBLISHED, Sample, published
from tests.support.pages import (
    EVIL,
    HOSTILE,
    Parsed,
    drawn,
    hostile_file,
    page_of,
    published_page,
    verification,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

TEMPLATES = Path(page.__code__.co_filename).parent / "templates"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_page_is_well_formed_and_shows_every_key_and_every_block(name: str) -> None:
    detection, parsed = detect(published(name)), published_page(name)
    content = parsed.content
    assert parsed.open == []
    assert content.startswith('<!doctype html>\n<html lang="en">')
    shown = parsed.texts["code"]
    assert detection.header.tensors.keys() <= set(shown)
    made = build_plan(detection)
    targets = {f"{t.component}/{t.key}" for s in made.steps if not s.reason for t in s.targets}
    assert targets <= set(shown)
    names = {block.name for block in blocks(made, "unet") + blocks(made, "vae")}
    assert names <= drawn(content)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert max(Counter(ids).values()) == 1
    links = {a["href"][1:] for a in parsed.of("a") if not a["href"].startswith("#find=")}
    assert links <= set(ids)


def test_the_policy_admits_the_style_and_the_script_of_the_page_and_nothing_else() -> None:
    parsed = published_page("sd15-emaonly-fp32")
    (policy,) = (m["content"] for m in parsed.of("meta") if "http-equiv" in m)
    hashes = {
        tag: base64.b64encode(hashlib.sha256("".join(parsed.texts[tag]).encode()).digest()).decode()
        for tag in ("style", "script")
    }
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'"
    )
    places = [tag for tag, attributes in parsed.elements if "http-equiv" in attributes]
    assert places == ["meta"]
    before = [tag for tag, _ in parsed.elements].index("meta")
    assert [tag for tag, _ in parsed.elements[:before]] == ["html", "head"]


@pytest.mark.parametrize("kind", ["lora", "checkpoint"])
def test_hostile_keys_and_metadata_stay_text(kind: str, sample: Sample, tmp_path: Path) -> None:
    source = sample("sd1") if kind == "checkpoint" else None
    detection = inspect(hostile_file(tmp_path / "<b>x.safetensors", checkpoint=source))
    found = tuple(Problem(value, value) for value in HOSTILE)
    checks = (Check("unet", "weights", found, HOSTILE, HOSTILE[0]),)
    parsed = Parsed(page_of(detection, verification(checks, Path(EVIL))))
    assert parsed.open == []
    clean = Parsed(page_of(detect(published("sd15-emaonly-fp32")), verification(())))
    known = {tag for tag, _ in clean.elements} | {"h3", "em", "details", "summary"}
    assert {tag for tag, _ in parsed.elements} <= known
    for tag in ("script", "style", "title"):
        assert len(parsed.of(tag)) == len(clean.of(tag)) or tag == "title"
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "src"], tag
        assert attributes.get("href", "#").startswith("#")
    shown = "".join(parsed.texts["code"])
    assert shown.count(EVIL) >= 3  # key, metadata, problem
    assert "\u202e" not in shown
    assert r"\u202e" in shown


def test_a_refused_file_gets_a_page_that_says_what_it_is(tmp_path: Path) -> None:
    parsed = Parsed(page_of(inspect(hostile_file(tmp_path / "lora.safetensors"))))
    said = " ".join(parsed.texts["p"])
    assert "This is a LoRA" in said
    assert "load_lora_weights" in said
    assert not parsed.of("polyline")
    assert len(parsed.of("tr")) > len(HOSTILE)


def test_a_file_with_missing_keys_gets_a_page_that_names_them(sample: Sample) -> None:
    header = inspect(sample("sd1")).header
    gone = "model.diffusion_model.out.2.bias"
    tensors = {key: info for key, info in header.tensors.items() if key != gone}
    tensors["a.stranger"] = Tensor(header.path, "a.stranger", "F32", (1,), 0, 4)
    parsed = Parsed(page_of(detect(Header(header.path, tensors, {}, 0, header.size))))
    assert any("conv_out.bias is missing" in line for line in parsed.texts["li"])
    assert "a.stranger" in parsed.texts["li"]
    assert not parsed.of("polyline")


def test_assumed_facts_are_marked_and_others_are_not() -> None:
    assumed = published_page("sd15-emaonly-fp32")
    decided = published_page("sdxl-base-fp16")
    assert "metadata" in decided.texts["span"]
    for parsed, sources in ((assumed, ["assumed"]), (decided, [])):
        row = parsed.content.split(">prediction_type</code>")[1].split("</tr>")[0]
        assert re.findall("<mark>(.*?)</mark>", row) == sources


def test_every_problem_of_a_verification_is_on_the_page() -> None:
    problems = tuple(Problem(f"key.{n}", f"differs in {n} values") for n in range(50))
    checks = (
        Check("unet", "data", problems, ("a note",), "686 tensors"),
        Check("vae", "data", (), (), "248 tensors"),
    )
    content = page_of(detect(published("sd15-emaonly-fp32")), verification(checks, Path("f")))
    parsed = Parsed(content)
    assert {problem.where for problem in problems} <= set(parsed.texts["code"])
    assert "Not verified." in content
    assert "50 problems in 1 of 2 checks" in content
    assert content.count("\u2713 passed") == 1
    assert "30 more" in parsed.texts["summary"]


def test_a_folder_verified_alone_gets_a_page_of_its_own() -> None:
    made = verification((Check("vae", "weights", (), (), "248 tensors"),))
    parsed = Parsed(page(None, None, made))
    assert parsed.texts["h1"] == ["out"]
    assert "is consistent" in " ".join(parsed.texts["p"])
    assert not parsed.of("input")


def whole_shares(content: str) -> str:
    """Returns the section on the shares of the file, which add up."""
    section = re.search(r'<section id="shares".*?</section>', content, re.DOTALL)
    assert section
    cells = re.findall(r'data-name="bytes"[^>]*>.*?<small>([\d.]+)%', section[0])
    assert 98 < sum(map(float, cells)) <= 100.5
    return section[0]


def test_shares_of_the_file_add_up(sample: Sample) -> None:
    content = page_of(inspect(sample("sd1", ema=True)))
    assert "not converted: training" in whole_shares(content)


def test_a_donor_is_counted_beside_the_file(sample: Sample) -> None:
    made = plan(sample("sd1"), vae=sample("sd1", ema=True))
    content = page(made.detection, made)
    assert "not converted: replaced" in whole_shares(content)


def test_a_component_that_stands_alone_gets_its_page(sample: Sample) -> None:
    parsed = Parsed(page_of(inspect(sample("vae"))))
    assert parsed.open == []
    assert parsed.of("svg")[0]["class"] == "network compact"
    assert "predicts" not in parsed.texts["dt"]


def test_the_page_the_data_and_the_tree_come_from_one_plan(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []

    def counted(*arguments: Any) -> Plan:
        plans.append(Plan(*arguments))
        return plans[-1]

    monkeypatch.setattr("ckptconv.planning.plan.Plan", counted)
    options = ["--html", str(tmp_path / "page.html"), "--tree"]
    assert CliRunner().invoke(main, ["inspect", str(small), *options]).exit_code == 0
    assert len(plans) == 1


def test_long_tables_and_long_values_are_cut_and_say_so() -> None:
    path, keys = Path("big.safetensors"), [f"lora_unet_{n}.alpha" for n in range(20_500)]
    tensors = {key: Tensor(path, key, "F16", (1,), 0, 2) for key in keys}
    header = Header(path, tensors, {"tags": "x" * 5000}, 0, 0)
    content = page_of(detect(header))
    assert "20,500 keys. The first 20,000 are shown." in content
    assert "lora_unet_20499.alpha" not in content
    assert "and 3,000 more characters" in content


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text())
@example("&lt;</p>", "\" onclick='x")
def test_any_text_comes_back_as_text(content: str, attribute: str) -> None:
    template = environment().from_string('<p title="{{ attribute }}">{{ content }}</p>')
    made = rendered(template, content=content, attribute=attribute)
    parsed = Parsed(made)
    assert [tag for tag, _ in parsed.elements] == ["p"]
    visible = re.compile(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
    )
    if not visible.search(content + attribute):
        assert "".join(parsed.texts.get("p", [])) == content
        assert parsed.of("p") == [{"title": attribute}]
    made.encode()


def test_markup_is_ours_alone_and_an_unknown_name_is_an_error() -> None:
    template = environment().from_string("<b>{{ style }}{{ key }}</b>")
    style = ours("network.css")
    assert rendered(template, style=style, key="1 < 2\ud800") == rf"<b>{style}1 &lt; 2\ud800</b>"
    with pytest.raises(UndefinedError, match="'key' is undefined"):
        rendered(template, style=style)
    safe = [path.name for path in TEMPLATES.glob("*.j2") if "safe" in path.read_text()]
    assert safe == []


@pytest.mark.parametrize("name", ["sdxl", "sd1"])
def test_a_notebook_shows_what_a_file_is_and_draws_it(name: str, sample: Sample) -> None:
    detection = inspect(sample(name))
    content = detection._repr_html_()
    assert content == build_plan(detection)._repr_html_() == fragment(detection)
    parsed = Parsed(content)
    assert parsed.open == []
    assert detection.architecture
    assert detection.architecture.title in parsed.texts["p"]
    said = " ".join(parsed.texts["li"])
    assert all(component.name in said for component in detection.architecture.models)
    assert "prediction_type: epsilon (" in said
    assert parsed.of("svg")[0]["class"] == "network wide"
    assert len(parsed.of("svg")) == len(detection.architecture.models)
    assert not parsed.of("script")
    assert not [a for a in parsed.of("a") if a]  # a notebook has no table of keys to search
    rules = re.sub(r"/\*.*?\*/|@media[^{]*\{", "", "".join(parsed.texts["style"]), flags=re.DOTALL)
    selectors = re.findall(r"([^{}]+)\{[^{}]*\}", rules)
    for selector in ",".join(selectors).split(","):
        assert selector.strip().startswith(".ckptconv")  # the rest of the notebook keeps its style


def test_a_notebook_shows_why_a_file_is_refused_and_runs_nothing_of_it(tmp_path: Path) -> None:
    parsed = Parsed(inspect(hostile_file(tmp_path / "lora.safetensors"))._repr_html_())
    assert parsed.open == []
    assert "this is a LoRA" in " ".join(parsed.texts["p"])
    assert not parsed.of("svg")
    assert not parsed.of("script")


def test_a_notebook_names_the_keys_that_are_missing(sample: Sample) -> None:
    header = inspect(sample("sd1")).header
    gone = "model.diffusion_model.out.2.bias"
    tensors = {key: info for key, info in header.tensors.items() if key != gone}
    for key in (f"{EVIL}.{n}" for n in range(30)):
        tensors[key] = Tensor(header.path, key, "F32", (1,), 0, 4)
    detection = detect(Header(header.path, tensors, {}, 0, header.size))
    parsed = Parsed(fragment(detection))
    assert parsed.open == []
    assert "unet: conv_out.bias is missing" in parsed.texts["li"]
    assert f"{EVIL}.19" in parsed.texts["li"]
    assert "... and 10 more" in parsed.texts["li"]
    assert not parsed.of("script")


def _luminance(color: str) -> float:
    """Returns the relative luminance of WCAG 2.2 of a color written as #rrggbb."""
    parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _themes() -> Mapping[str, dict[str, str]]:
    css = (TEMPLATES / "network.css").read_text()
    light, dark = re.findall(r"\.ckptconv \{(.*?)\}", css, re.DOTALL)
    colors = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in (light, dark)]
    return dict(zip(("light", "dark"), colors, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(theme: str) -> None:
    colors = _themes()[theme]
    pairs = [
        (ink, back) for ink in ("ink", "muted", "link", "ok", "bad") for back in ("paper", "card")
    ]
    pairs += [("on", kind) for kind in ("resnet", "attention", "resample")]
    pairs += [("on-mark", "mark"), ("attention", "card")]
    for ink, back in pairs:
        bright, dim = sorted((_luminance(colors[ink]), _luminance(colors[back])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, back)


def test_a_page_is_not_replaced_unless_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    first = page(None, None, verification(()))
    Destination(path, kind=PAGE).write(first.encode())
    with pytest.raises(OutputError, match=r"page\.html: exists") as refused:
        Destination(path, kind=PAGE).write(b"<!doctype html>\nsecond")
    assert "overwrite=True" in refused.value.hint
    assert path.read_text() == first
    Destination(path, True, PAGE).write(b"<!doctype html>\nsecond")
    assert path.read_text() == "<!doctype html>\nsecond"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_nothing_but_a_page_is_ever_replaced(tmp_path: Path) -> None:
    path, link, inside = tmp_path / "model.safetensors", tmp_path / "link", tmp_path / "folder"
    path.write_bytes(b"weights")
    link.symlink_to(path)
    inside.mkdir()
    for place in (path, link, inside):
        with pytest.raises(OutputError, match="is not a page"):
            Destination(place, True, PAGE).write(b"<!doctype html>\n")
    assert path.read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/dev/null/page.html", "null: is not a folder"),
        ("x" * 300, "cannot be looked at: File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_an_error(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=said):
        Destination(tmp_path / name, kind=PAGE).write(b"<!doctype html>\n")
    assert list(tmp_path.iterdir()) == []


def test_inspect_writes_a_page_and_keeps_its_output_and_exit_code(
    sample: Sample, tmp_path: Path
) -> None:
    lora, runner = hostile_file(tmp_path / "lora.safetensors"), CliRunner()
    for file, code in ((sample("sd1"), 0), (lora, 3)):
        out = tmp_path / f"{code}.html"
        done = runner.invoke(main, ["inspect", str(file), "--html", str(out), "--json", "--hash"])
        assert done.exit_code == code
        data = json.loads(done.stdout)
        assert done.stderr == f"page: {out}\n"
        assert data["hashes"]["sha256"] in out.read_text()
        again = runner.invoke(main, ["inspect", str(file), "--html", str(out)])
        assert again.exit_code == 3
        assert "--overwrite replaces it" in again.stderr
        forced = runner.invoke(main, ["inspect", str(file), "--html", str(out), "--overwrite"])
        assert forced.exit_code == code


def test_verify_writes_a_page_whether_it_passes_or_not(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = (Check("vae", "data", (), (), "248 tensors"),)
    failed = (Check("vae", "data", (Problem("a.key", "differs"),)),)
    runner, command = CliRunner(), "ckptconv.batch.work.verify"
    made = plan(small)
    monkeypatch.delattr("ckptconv.detection.detect.open_header")  # nothing is read again
    for checks, code, said in ((passed, 0, "Verified."), (failed, 1, "Not verified.")):
        result = replace(verification(checks, small), plan=made)
        monkeypatch.setattr(command, lambda *_args, _result=result, **_choices: _result)
        out = tmp_path / f"{code}.html"
        paths = [str(small), "out", "--html", str(out)]
        done = runner.invoke(main, ["verify", *paths])
        assert done.exit_code == code, done.output
        assert f"page: {out}" in done.stderr
        parsed = Parsed(out.read_text())
        assert said in parsed.texts["strong"][0]
        assert parsed.of("polyline")  # the drawing of the source
    monkeypatch.delattr(command)  # refused before the work
    again = runner.invoke(main, ["verify", *paths])
    assert "--overwrite replaces it" in again.stderr
