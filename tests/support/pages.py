"""Pages as a browser sees them, and files whose text attacks them, for several test files."""

from __future__ import annotations

import functools
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

from ckptconv.detection.detect import Detection, detect
from ckptconv.planning.plan import build_plan
from ckptconv.reports.html import page
from ckptconv.verification.result import Check, Verification
from tests.conftest import published

EVIL = '<script>document.title="owned";fetch("http://127.0.0.1:9/x")</script>'
HOSTILE = (
    EVIL,
    "</script></table></body>" + EVIL,
    '"onmouseover="document.title=1',
    "' autofocus onfocus='document.title=1",
    "<img src=http://127.0.0.1:9/y onerror=document.title=1>",
    "]]><svg/onload=document.title=1>",
    "javascript:document.title=1",
    "\x00\x1b[31m\u202e\u2066",
    "long." * 1000,
)
VOID = {"meta", "input"}


class Parsed(HTMLParser):
    """A page as a browser sees it: its elements, their attributes and the texts in them."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.content = content
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(detection: Detection, verification: Verification | None = None) -> str:
    plan = None if detection.refusal else build_plan(detection)
    return page(detection, plan, verification)


@functools.cache
def published_page(name: str) -> Parsed:
    return Parsed(page_of(detect(published(name))))


def hostile_file(path: Path, *, checkpoint: Path | None = None) -> Path:
    """Writes a file whose keys and metadata are attacks; beside the keys of a checkpoint or not."""
    keys = ["lora_unet_x.lora_down.weight", *HOSTILE]
    entries: dict[str, object] = {}
    data = b""
    if checkpoint:
        raw = checkpoint.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        data = raw[8 + length :]
        keys = [*HOSTILE, f"model.diffusion_model.middle_block.1.transformer_blocks.0.{EVIL}"]
    for key in keys:
        offsets = [len(data), len(data) + 4]
        entries[key] = {"dtype": "F32", "shape": [1], "data_offsets": offsets}
        data += bytes(4)
    entries["__metadata__"] = {value: value for value in HOSTILE}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def verification(checks: tuple[Check, ...], source: Path | None = None) -> Verification:
    return Verification(Path("out"), source, "sd1", "text-to-image", checks, 1234567, 2.5)


def drawn(content: str) -> set[str]:
    """Returns the names of the blocks that a page draws."""
    titles = re.findall(r"<a href=\"#find=[^>]*><title>([^<:]+):", content)
    return {name for title in titles for name in title.split(", ")}
