"""Directories that a user asks for: `fewer.files` writes them."""

from fewer.files import check_new, made_whole

__all__ = ["check_new", "made_whole"]
