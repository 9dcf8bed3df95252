"""The peak of this process's resident memory during a section."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class ResidentMemory:
    """What `peak_resident_memory` found; `peak` (bytes) is set when its block ends.

    Attributes:
        of_section: whether the peak is the section's; where the system cannot reset its mark it is the process's so far.
    """

    peak: int = 0
    of_section: bool = True


_open: list[ResidentMemory] = []


@contextlib.contextmanager
def peak_resident_memory() -> Iterator[ResidentMemory]:
    """Peak resident memory of this process (bytes) inside the block, what was resident at its start included.

    Linux keeps a high-water mark per process that can be reset; elsewhere the mark is the process's own, from its start.
    """
    section = ResidentMemory()
    for outer in _open:  # resetting the mark must not lose what the sections around this one have seen
        outer.peak = max(outer.peak, _high_water_mark())
    section.of_section = _reset_high_water_mark()
    _open.append(section)
    try:
        yield section
    finally:
        _open.remove(section)
        mark = _high_water_mark()
        for each in (section, *_open):
            each.peak = max(each.peak, mark)


def _high_water_mark() -> int:
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
