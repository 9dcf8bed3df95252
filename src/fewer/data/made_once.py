"""What takes long to make is made once on a machine: a folder in the cache, named by a hash of all that goes into it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from fewer.data.fetching import cache_folder, checksum
from fewer.files import read_json, swap_in, whole_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WEIGHTS = "model.safetensors"
Figures = TypeVar("Figures", bound="DataclassInstance")


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
            so that it may go on from what it has written. It comes to the same whoever asks: also within `torch.no_grad()`. Several
            processes that ask at once have it made once.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not is_whole(folder):
            part = folder.with_suffix(".part")
            part.mkdir(exist_ok=True)
            with by_itself():
                make(part)
            (part / "DONE").write_text(checksum(part / WEIGHTS))
            swap_in(part, folder)
    return folder


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """The block takes gradients though the caller takes none, and uses up none of the caller's random numbers."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        yield


def measured_once(
    folder: Path, read: Callable[[dict[str, Any]], Figures], measure: Callable[[], Figures], *, fresh: bool = False
) -> Figures:
    """Figures of this machine: those in the cache, or measured and kept there.

    What is there in another form, or cut off, is measured again; where nothing can be kept, each process measures anew.

    Args:
        folder: as `folder_of` names it; the figures are the JSON file beside it.
        read: the kept object -> the figures, a dataclass; KeyError, TypeError or ValueError where it is of another form.
        fresh: measure in any case.
    """
    file = folder.with_suffix(".json")
    if not fresh:
        try:
            return read(read_json(file))
        except (OSError, KeyError, TypeError, ValueError):
            pass
    found = measure()
    try:
        with whole_file(file, overwrite=True) as part:
            part.write_text(json.dumps(asdict(found)) + "\n", encoding="utf8")
    except OSError:
        pass
    return found
