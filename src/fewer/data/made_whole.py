"""Directories that a user asks for: written whole or not at all, and never over something without leave."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_new(directory: Path, overwrite: bool) -> None:
    """FileExistsError where something stands in the directory that may not be replaced."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
        raise FileExistsError(f"{directory} is not empty; expected a new directory: choose another, or overwrite (--overwrite)")


@contextlib.contextmanager
def made_whole(directory: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the directory's place when the block ends well, and is gone otherwise."""
    check_new(directory, overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        part.chmod(0o755)
        yield part
        if directory.exists():
            shutil.rmtree(directory)
        part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)
