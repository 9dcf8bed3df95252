"""Folders of generated files: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """FileExistsError where files would be replaced without leave."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a folder to write into: choose another")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty; expected a new or empty folder: choose another, or overwrite=True (--overwrite)")


def write_files(folder: Path, texts: Mapping[str, str], *, overwrite: bool) -> list[Path]:
    """Write all files or none, and what was there before comes back on failure; other files in the folder stay."""
    check_folder(folder, overwrite=overwrite)
    for name in texts:
        if (folder / name).is_dir():
            raise FileExistsError(f"{folder / name} is a folder; expected a file or nothing: choose another out_dir or name")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    waiting = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    before, written = waiting / "before", []
    before.mkdir()
    try:
        for name, text in texts.items():
            (waiting / name).write_text(text)
        folder.mkdir(exist_ok=True)
        for name in texts:
            if (folder / name).exists():
                os.replace(folder / name, before / name)
            written.append(name)
            os.replace(waiting / name, folder / name)
    except BaseException:
        for name in written:
            (folder / name).unlink(missing_ok=True)
        for each in before.iterdir():
            os.replace(each, folder / each.name)
        for each in made:
            shutil.rmtree(each, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(waiting, ignore_errors=True)
    return [folder / name for name in texts]
