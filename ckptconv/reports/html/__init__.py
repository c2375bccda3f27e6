"""A page about a file, and about the folder that it was converted into."""

from __future__ import annotations

from .page import PAGE as PAGE
from .page import fragment as fragment
from .page import page as page
