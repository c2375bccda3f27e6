"""The page in a real browser: legible on a desktop and on a phone, and silent.

A harness page frames the pages, so that one start of the browser measures all of them at any width,
and writes what it measured into itself; `--dump-dom` prints that. Skips where there is no Chromium.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckptconv import inspect
from ckptconv.destination import Destination
from ckptconv.detection.detect import detect
from ckptconv.reports.html import page
from ckptconv.verification.result import Check, Problem
from tests.conftest import published
from tests.support.pages import HOSTILE, hostile_file, page_of, verification

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"needs one of {', '.join(NAMES)}"),
]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--virtual-time-budget=5000",
)
CANARY = "127.0.0.1:9/"
"""Where every attack in `HOSTILE` sends its requests."""
WIDTHS = {"phone": 390, "desktop": 1280}

HARNESS = """<!doctype html><meta charset="utf-8"><body>FRAMES<script>
const measured = {};
function visible(node) { return node.getClientRects().length > 0; }
function inside(frame) {
  const doc = frame.contentDocument, root = doc.scrollingElement;
  const result = {title: doc.title, scripts: doc.scripts.length, wide: [], crowded: []};
  result.overflow = root.scrollWidth - root.clientWidth;
  result.paper = frame.contentWindow.getComputedStyle(doc.body).backgroundColor;
  result.drawings = Array.from(doc.querySelectorAll("svg.network"), (svg) =>
    [svg.getAttribute("class"), visible(svg)]);
  for (const svg of doc.querySelectorAll("svg.network")) {
    if (!visible(svg)) continue;
    const scale = svg.getScreenCTM().a;
    for (const link of svg.querySelectorAll("a")) {
      const box = link.querySelector("rect").getBBox();
      const texts = Array.from(link.querySelectorAll("text"), (text) => [text, text.getBBox()]);
      for (const [text, at] of texts) {
        const size = parseFloat(frame.contentWindow.getComputedStyle(text).fontSize) * scale;
        result.smallest = Math.min(result.smallest ?? 99, size);
        if (at.x < box.x || at.x + at.width > box.x + box.width) result.wide.push(text.textContent);
        for (const [other, there] of texts) {
          const apart = at.x + at.width <= there.x || there.x + there.width <= at.x ||
            at.y + at.height <= there.y + 1 || there.y + there.height <= at.y + 1;
          if (text !== other && !apart) result.crowded.push(text.textContent);
        }
      }
    }
  }
  const input = doc.getElementById("find");
  if (!input) return result;
  const rows = Array.from(doc.querySelectorAll("table.keys tbody tr"));
  const found = () => rows.filter(visible).map((row) => row.cells[0].textContent);
  const type = (words) => {
    input.value = words;
    input.dispatchEvent(new Event("input"));
    return [found().length, doc.getElementById("count").textContent];
  };
  result.rows = rows.length;
  result.searchable = visible(input);
  result.two = type(" ATTN2  to_k ");
  result.either = type("unet/conv_in.|unet/conv_out. weight");
  result.none = type("no such key");
  result.all = type("");
  const link = Array.from(doc.querySelectorAll("svg.network a")).find((a) =>
    visible(a) && a.textContent.includes("mid_block"));
  if (link) {
    link.dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true}));
    result.link = link.getAttribute("href");
  }
  return result;
}
window.onload = () => {
  const frames = Array.from(document.querySelectorAll("iframe"));
  for (const frame of frames) measured[frame.id] = inside(frame);
  setTimeout(() => {
    for (const frame of frames) {
      const doc = frame.contentDocument, rows = doc.querySelectorAll("table.keys tbody tr");
      measured[frame.id].followed = Array.from(rows).filter(visible).map((row) =>
        row.cells[0].textContent);
    }
    document.body.textContent = JSON.stringify(measured);
  }, 500);
};
</script>"""


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page: its elements, its console, and the URLs that it asked for."""

    dom: str
    console: list[str]
    urls: set[str]


Browse = Callable[..., Seen]


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """Opens a page in a browser of its own: `browse(file, *flags, fragment="")`."""

    def open_page(file: Path, *flags: str, fragment: str = "") -> Seen:
        folder = tmp_path_factory.mktemp("browser")
        log = folder / "net.json"
        profile = (f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}")
        command = [str(BROWSER), *FLAGS, *flags, *profile, "--dump-dom", file.as_uri() + fragment]
        done = subprocess.run(  # noqa: S603  (a browser from the PATH)
            command, capture_output=True, text=True, timeout=60, check=True
        )
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        urls = set(re.findall(r'"url":"([^"]*)"', log.read_text(encoding="utf-8")))
        return Seen(done.stdout, console, urls)

    return open_page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    problems = tuple(Problem(f"a.rather.long.name.of.a.key.{value}", value) for value in HOSTILE)
    checks = (Check("unet", "weights", problems, HOSTILE, "686 tensors"),)
    contents = {
        "sdxl": page_of(detect(published("sdxl-base-fp16"))),
        "sd1": page_of(
            detect(published("sd15-emaonly-fp32")), verification(checks, Path("model.safetensors"))
        ),
        "lora": page_of(inspect(hostile_file(folder / "lora.safetensors"))),
        "alone": page(None, None, verification(checks)),
    }
    for name, content in contents.items():
        Destination(folder / f"{name}.html").write(content.encode())
    return {name: folder / f"{name}.html" for name in contents}


@pytest.fixture(scope="module")
def measured(
    browse: Browse, pages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Measures every page at every width, dark on the phone and light on the desktop."""
    result: dict[str, dict[str, Any]] = {}
    harness = tmp_path_factory.mktemp("harness") / "harness.html"
    for device, width in WIDTHS.items():
        frames = "".join(
            f'<iframe id="{name}" width="{width}" height="900" src="{file.as_uri()}"></iframe>'
            for name, file in pages.items()
        )
        frames += (  # one page once more, where scripts are off
            f'<iframe id="scriptless" width="{width}" height="900" sandbox="allow-same-origin" '
            f'src="{pages["lora"].as_uri()}"></iframe>'
        )
        scheme = f"--blink-settings=preferredColorScheme={0 if device == 'phone' else 1}"
        harness.write_text(HARNESS.replace("FRAMES", frames), encoding="utf-8")
        seen = browse(harness, scheme, "--allow-file-access-from-files")
        assert [line for line in seen.console if "frame is sandboxed" not in line] == []
        body = re.search(r"<body[^>]*>(\{.*\})</body>", seen.dom, re.DOTALL)
        assert body, seen.dom[-500:]
        for name, found in json.loads(html.unescape(body[1])).items():
            result[f"{name} {device}"] = found
    return result


def test_no_page_scrolls_sideways_on_any_device(measured: dict[str, dict[str, Any]]) -> None:
    assert {name: found["overflow"] for name, found in measured.items()} == dict.fromkeys(
        measured, 0
    )
    assert len(measured) == 10


def test_every_text_of_a_drawing_fits_its_box_and_can_be_read(
    measured: dict[str, dict[str, Any]],
) -> None:
    for name in ("sdxl phone", "sdxl desktop", "sd1 phone", "sd1 desktop"):
        found = measured[name]
        assert found["wide"] == [], name
        assert found["crowded"] == [], name
        assert found["smallest"] >= 9.5, name


def test_a_phone_and_a_desktop_each_show_their_drawing(
    measured: dict[str, dict[str, Any]],
) -> None:
    for device, shown in (("phone", "narrow"), ("desktop", "wide")):
        drawings = measured[f"sdxl {device}"]["drawings"]
        expected = {"network wide": False, "network narrow": False, "network compact": True}
        assert dict(drawings) == expected | {f"network {shown}": True}
        assert len(drawings) == 5


def test_the_page_follows_the_color_scheme_of_the_reader(
    measured: dict[str, dict[str, Any]],
) -> None:
    assert measured["sdxl phone"]["paper"] == "rgb(16, 22, 27)"
    assert measured["sdxl desktop"]["paper"] == "rgb(246, 248, 249)"


@pytest.mark.parametrize("device", WIDTHS)
def test_the_search_finds_keys_and_counts_them(
    device: str, measured: dict[str, dict[str, Any]]
) -> None:
    found = measured[f"sdxl {device}"]
    keys = list(published("sdxl-base-fp16").tensors)
    both = sum("attn2" in key and "to_k" in key for key in keys)
    assert found["searchable"]
    assert found["rows"] == len(keys)
    assert found["two"] == [both, f"{both} of 2,516"]
    assert found["either"] == [2, "2 of 2,516"]
    assert found["none"] == [0, "0 of 2,516"]
    assert found["all"] == [2516, ""]


@pytest.mark.parametrize("device", WIDTHS)
def test_a_click_on_a_block_searches_for_its_keys(
    device: str, measured: dict[str, dict[str, Any]]
) -> None:
    found = measured[f"sdxl {device}"]
    keys = published("sdxl-base-fp16").tensors
    assert found["link"] == "#find=unet/mid_block."
    assert set(found["followed"]) == {key for key in keys if ".middle_block." in key}


def test_without_scripts_every_key_is_there_and_the_search_is_not(
    measured: dict[str, dict[str, Any]],
) -> None:
    for device in WIDTHS:
        found = measured[f"scriptless {device}"]
        assert not found["searchable"]
        assert len(found["followed"]) == found["rows"] == len(HOSTILE) + 1
        assert measured[f"lora {device}"]["searchable"]


def test_nothing_that_came_with_a_file_is_run(measured: dict[str, dict[str, Any]]) -> None:
    for name, found in measured.items():
        assert found["scripts"] == 1, name
        assert found["title"].endswith(" - ckptconv"), name


def test_a_page_on_disk_answers_a_link_into_it_and_asks_nobody_for_anything(
    browse: Browse, pages: dict[str, Path]
) -> None:
    seen = browse(pages["lora"], fragment="#find=lora_unet")
    assert seen.console == []
    assert re.search(r'<output[^>]*id="count"[^>]*>1 of 10</output>', seen.dom)
    assert not [url for url in seen.urls if CANARY in url or url.startswith("data:")]


def test_the_canary_sings_where_a_page_does_ask(browse: Browse, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><img src=http://{CANARY}y><script>fetch('x:y')</script>")
    seen = browse(file)
    assert f"http://{CANARY}y" in seen.urls
    assert seen.console
