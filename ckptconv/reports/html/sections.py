"""What is known of a file, as parts of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...detection.detect import Detection
from ...planning.plan import ASIDE, Plan
from ...reading.tensor import Header
from ..network import blocks
from ..numbers import millions, size
from ..report import plan_rows
from .drawing import draw
from .markup import Html, Section, element, joined, listing, table

__all__ = ["beginning", "evidence", "facts", "keys", "metadata", "network", "shares", "trouble"]

ROWS = 20_000
"""Keys that the table shows at most: ten times those of a checkpoint, but a file can hold more."""
LONG = 2_000
"""Characters of a value of the metadata that are shown; training tools write megabytes."""
SOME = 500
"""Lines of a list that are shown."""


def beginning(data: Mapping[str, Any], plan: Plan | None) -> list[Html]:
    """Returns the top of the page: what the file is, and its figures.

    Args:
        data: from `ckptconv.report.inspection`.
        plan: of the file; None if it was refused.
    """
    file = element("p", element("code", data["file"]), class_="file")
    figures = [("size", size(data["size"])), ("tensors", f"{data['tensors']:,}")]
    if plan is None:
        said = data["refusal"]["message"].removeprefix(f"{data['file']}: ")
        top = [
            element("h1", "Not a checkpoint that can be converted"),
            element("p", said[:1].upper() + said[1:] + ".", class_="lede"),
        ]
    else:
        components = data["components"].values()
        parameters = sum(part["parameters"] for part in components)
        dtypes = dict.fromkeys(dtype for part in components for dtype in part["dtypes"])
        top = [
            element("h1", data["title"]),
            element("p", data["task"], " for ", element("code", data["pipeline"]), class_="lede"),
        ]
        if components:
            figures = [
                ("parameters", millions(parameters)),
                *figures,
                ("stored as", ", ".join(dtypes)),
                ("predicts", data["prediction_type"]["value"]),
            ]
    pairs = (element("div", element("dt", k), element("dd", v)) for k, v in figures)
    return [file, *top, element("dl", *pairs, class_="figures")]


def trouble(data: Mapping[str, Any]) -> list[Section]:
    """Returns what stands in the way of a conversion, and what deserves a look."""
    refusal = data.get("refusal", {})
    parts: list[Html] = []
    lists = (
        ("", refusal.get("problems", ())),
        ("Keys that are missing, unknown or of a wrong shape", data["problems"]),
        ("Keys that no map knows", data["unclaimed"]),
        ("Components that the file does not have", data["missing"]),
        ("Notes", data["notes"]),
    )
    for title, lines in lists:
        if lines:
            parts += [element("h3", title)] if title else []
            more = [f"... and {len(lines) - SOME:,} more"] if len(lines) > SOME else []
            parts.append(listing([*lines[:SOME], *more]))
    if refusal.get("hint"):
        parts.append(element("p", "What to do: ", refusal["hint"], class_="hint"))
    return [Section("trouble", "What deserves a look", joined(parts))] if parts else []


def network(plan: Plan) -> list[Section]:
    """Returns the drawings of the components."""
    architecture, _ = plan.detection.require()
    signs = (
        ("resnet", "R", "a resnet"),
        ("attention", "2", "attention: its number of transformer blocks, A for a plain one"),
        ("resample", "\u2193", "a change of resolution"),
    )
    legend = [joined((element("b", sign, class_=kind), f" {what}")) for kind, sign, what in signs]
    legend.append(joined((element("b", class_="skip"), " skip connections")))
    words = (
        "A box names a block as diffusers does, its output channels, where its tensors stand in "
        "the file and how many parameters it has; the line under it is its share of the component. "
        "A click searches the table of the keys for it."
    )
    parts = [element("p", words), listing(legend, class_="legend")]
    figures = []
    for component in architecture.models:
        if members := blocks(plan, component.name):
            total = millions(sum(block.parameters for block in members))
            name = joined((element("code", component.name), f", {total} parameters"))
            body = (element("h3", name), draw(component.name, members))
            kind = "whole" if component.name == "unet" else None
            figures.append(element("div", *body, class_=kind))
    parts.append(element("div", *figures, class_="drawings"))
    return [Section("network", "The network", joined(parts))]


def shares(data: Mapping[str, Any], plan: Plan) -> list[Section]:
    """Returns what takes how much of the file."""
    header = plan.detection.header
    groups: dict[str, list[int]] = {}
    for row in plan_rows(plan):
        info = header.tensors[row["source"]]
        group = groups.setdefault(_group(row), [0, 0, 0])
        for n, count in enumerate((1, info.numel, info.nbytes)):
            group[n] += count
    order = [name for name in data["components"] if name in groups]
    order += [name for name in groups if name not in data["components"]]
    parameters = sum(groups[name][1] for name in data["components"] if name in groups)
    rows = []
    for name in order:
        part = data["components"].get(name)
        count, elements, nbytes = groups[name]
        dtypes = ", ".join(f"{d} \u00d7 {n:,}" for d, n in part["dtypes"].items()) if part else ""
        rows.append(
            (
                element("code", name) if part else name,
                part["class"] if part else "",
                f"{count:,}",
                joined((millions(elements), _bar(elements, parameters))) if part else "",
                joined((size(nbytes), _bar(nbytes, header.size))),
                dtypes,
            )
        )
    names = ("part", "class", " tensors", " parameters", " bytes", "stored as")
    body = table((*names,), rows, class_="blocks")
    return [Section("shares", "Parameters and bytes", body)]


def _group(row: Mapping[str, Any]) -> str:
    if row["reason"]:
        return f"not converted: {row['reason']}"
    return str(row["targets"][0]).partition("/")[0]


def evidence(detection: Detection) -> list[Section]:
    """Returns why the file is what it is, and why it is nothing else."""
    parts: list[Html] = []
    if detection.evidence:
        parts.append(element("p", "Every condition of the architecture holds:"))
        parts.append(listing(detection.evidence, class_="ticks"))
    rows = []
    for verdict in detection.verdicts:
        held = len(verdict.lines) - len(verdict.failing)
        said = (
            element("span", "\u2713 matches", class_="ok")
            if verdict.matches
            else (f"{held} of {len(verdict.lines)} conditions hold")
        )
        lines = listing((line.text for line in verdict.failing), class_="crosses")
        rows.append((element("code", verdict.architecture), said, lines if verdict.failing else ""))
    parts.append(element("h3", "What every architecture says of the file"))
    parts.append(table(("architecture", "verdict", "what does not hold"), rows, class_="blocks"))
    return [Section("evidence", "Evidence", joined(parts))]


def facts(detection: Detection, assumed: Mapping[str, Any]) -> list[Section]:
    """Returns what names and shapes cannot tell, and who decided.

    Args:
        detection: of the file.
        assumed: entries of the configurations that follow from nothing in the file.
    """
    rows = [
        (element("code", f.name), element("code", _value(f.value)), _source(f.source), f.detail)
        for f in detection.facts.values()
    ]
    rows += [
        (
            element("code", name),
            element("code", _value(value)),
            _source("assumed"),
            "follows from what was decided above",
        )
        for name, value in assumed.items()
    ]
    body = table(("what", "value", "decided by", "evidence"), rows, class_="blocks")
    return [Section("facts", "Facts and assumptions", body)] if rows else []


def metadata(header: Header, hashes: Mapping[str, str]) -> list[Section]:
    """Returns the metadata of the file, and its hashes if they were computed."""
    rows: list[tuple[object, ...]] = [
        (element("code", name), element("code", value)) for name, value in hashes.items()
    ]
    for key, value in header.metadata.items():
        cut = f" ... and {len(value) - LONG:,} more characters" if len(value) > LONG else ""
        shown = joined((value[:LONG], element("em", cut) if cut else ""))
        rows.append((element("code", key), element("div", shown, class_="value")))
    body = table(("entry", "value"), rows, class_="blocks metadata")
    title = "Hashes and metadata" if hashes else "Metadata"
    return [Section("metadata", title, body)] if rows else []


def keys(header: Header, plan: Plan | None) -> list[Section]:
    """Returns the table of the keys, and the search for it.

    Args:
        header: of the file.
        plan: what becomes of every key; None if the file was refused.
    """
    rows = plan_rows(plan) if plan else _unplanned(header)
    lines = (_key(row) for row in rows[:ROWS])
    columns = ("key in the file", "becomes", "shape", "dtype")
    search = element(
        "div",
        element("label", "Search the keys", for_="find"),
        element("input", type="search", id="find", placeholder="such as: unet attn2 to_k"),
        element("output", for_="find", id="count"),
        class_="search",
        id="search",
        hidden=True,
    )
    more = f" The first {ROWS:,} are shown." if len(rows) > ROWS else ""
    words = element("p", f"{len(rows):,} keys.{more}", id="total")
    region = element(
        "div",
        table(columns, lines, class_="blocks keys"),
        class_="scroll",
        role="region",
        aria_labelledby="keys-title",
        tabindex=0,
    )
    aside = element(
        "p", "Left out of the print; search first to print what you find.", class_="print"
    )
    return [Section("keys", "Keys", joined((words, search, region, aside)))]


def _unplanned(header: Header) -> list[dict[str, Any]]:
    return [
        {"source": key, "op": "", "targets": [], "reason": "", "dtype": info.dtype}
        | {"shape": list(info.shape), "target_shapes": [], "target_dtype": None}
        for key, info in header.tensors.items()
    ]


def _key(row: Mapping[str, Any]) -> tuple[object, ...]:
    """Returns the cells of a key."""
    targets = row["targets"]
    becomes: object = ""
    if row["reason"]:
        kept = f", kept in {ASIDE}/" if targets else ""
        becomes = f"not converted: {row['reason']}{kept}"
    else:
        op = element("i", row["op"]) if row["op"] != "rename" else ""
        becomes = joined((*(element("code", t) for t in targets), op))
    shapes = [row["shape"], *row["target_shapes"][:1]]
    shape = " \u2192 ".join(dict.fromkeys(str(s) for s in shapes))
    dtypes = dict.fromkeys(filter(None, (row["dtype"], row["target_dtype"])))
    return element("code", row["source"]), becomes, shape, " \u2192 ".join(dtypes)


def _bar(part: int, whole: int) -> Html:
    """Returns a bar and the share in per cent."""
    share = part / max(whole, 1)
    rects = (
        element("rect", class_="track", width=100, height=4),
        element("rect", class_="share", width=f"{100 * share:.2f}", height=4),
    )
    svg = element(
        "svg",
        *rects,
        class_="bar",
        viewBox="0 0 100 4",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    return joined((svg, element("small", f"{share:.1%}")))


def _source(source: str) -> Html:
    return element("mark" if source == "assumed" else "span", source)


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
