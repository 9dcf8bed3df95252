"""What takes long to make is made once on a machine: a folder in the cache, named by a hash of all that goes into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from fewer.data.fetching import cache_folder, checksum
from fewer.files import swap_in

WEIGHTS = "model.safetensors"


def folder_of(kind: str, name: str, what: Mapping[str, Any]) -> Path:
    """Where it is kept, whether or not it is there.

    Args:
        kind: the folder of its like, such as "lm".
        name: the first half of its own folder's name.
        what: all that goes into it, as plain data: another recipe or other data give another folder.
    """
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / kind / f"{name}-{key}"


def is_whole(folder: Path) -> bool:
    """Whether a folder's weights are those that were written last (`DONE` has their SHA-256)."""
    done, weights = folder / "DONE", folder / WEIGHTS
    return done.is_file() and weights.is_file() and done.read_text().strip() == checksum(weights)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made first where it is not there or not whole.

    Args:
        folder: as `folder_of` names it.
        make: writes `model.safetensors` and whatever goes with it into the folder that it is given. That folder stays where it breaks off,
            so that it may go on from what it has written. Several processes that ask at once have it made once.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not is_whole(folder):
            part = folder.with_suffix(".part")
            part.mkdir(exist_ok=True)
            make(part)
            (part / "DONE").write_text(checksum(part / WEIGHTS))
            swap_in(part, folder)
    return folder
