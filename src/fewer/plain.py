"""Words that come from outside (cards, errors, trials, records) on their way to a terminal: what would steer it is shown, not obeyed."""

from __future__ import annotations

import re
from typing import Any

# C0 but tab and newline, DEL, C1, and the marks that turn the direction of writing
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    r"""The text with control characters written out.

    >>> plain("red \x1b[31m, then\na line")
    'red \\x1b[31m, then\na line'
    """
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def plain_all(data: Any) -> Any:
    """Plain data (dicts, lists, strings, numbers) with every string in it made plain."""
    if isinstance(data, str):
        return plain(data)
    if isinstance(data, dict):
        return {plain_all(name): plain_all(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain_all(each) for each in data]
    return data
