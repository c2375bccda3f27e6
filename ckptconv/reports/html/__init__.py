"""A page about a file, and about the folder that it was converted into."""

from __future__ import annotations

from .page import check_page, page, write_page

__all__ = ["check_page", "page", "write_page"]
