"""A folder for what one process and its trials leave lying while they run: gone when it ends, and swept by the next one where it was killed."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import multiprocessing.process
import os
import tempfile
from functools import cache
from pathlib import Path

from fewer.files import discard

PREFIX = "fewer-run-"


@cache
def scratch_folder() -> Path:
    """This process's own folder. The fork server's socket and the trials' temporary files lie in it."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    owner = os.open(folder / "alive", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(owner, fcntl.LOCK_EX)  # held until this process ends, however it does
    mine = os.getpid()
    atexit.register(lambda: discard(folder) if os.getpid() == mine else None)
    multiprocessing.process.current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined] - where multiprocessing looks
    return folder


def sweep() -> None:
    """Remove the folders of processes that were killed: nobody holds their lock any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            owner = os.open(folder / "alive", os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                discard(folder)
            finally:
                os.close(owner)
