"""A page about a file and about the folder that was made from it, and its summary in a notebook."""

from __future__ import annotations

from .page import check_page, fragment, page, write_page
