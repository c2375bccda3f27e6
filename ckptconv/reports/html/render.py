"""The templates, and the one way from values to HTML: everything is escaped.

Keys and metadata come from a file that a stranger wrote. Only our own style sheets and scripts are
`Markup`; jinja2 escapes everything else, and a name that no template defines is an error.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import json
import re
from typing import TYPE_CHECKING

from ..numbers import millions, size

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from markupsafe import Markup

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
"""Control characters, those that reorder or hide text, and those that UTF-8 cannot write."""


def rendered(template: str | Template, /, **values: object) -> str:
    """Renders a template, or the template of a name.

    Characters that a reader cannot see become code points everywhere, so that no template has to
    think of them.
    """
    html = environment().get_template(template).render(values)
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", html)


@functools.cache
def environment() -> Environment:
    """Returns the templates, their filters and their one function."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader(__package__ or ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "count": "{:,}".format,
        "json": json.dumps,
        "millions": millions,
        "size": size,
        "sha256": _sha256,
        "px": _px,
        "points": lambda points: " ".join(f"{_px(x)},{_px(y)}" for x, y in points),
    }
    templates.globals["ours"] = ours
    return templates


def ours(name: str) -> Markup:
    """Returns a style sheet or a script of ours, which goes into the page as it is."""
    from markupsafe import Markup

    file = importlib.resources.files(__package__ or "") / "templates" / name
    return Markup(file.read_text(encoding="utf-8"))  # noqa: S704  (ours)


def _sha256(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _px(length: float) -> str:
    return f"{length:.1f}".removesuffix(".0")
