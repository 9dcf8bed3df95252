"""The one room that writes, replaces and opens files for a user: whole or not at all, never over what is not ours, never running what is a stranger's.

A directory that fewer writes carries `.fewer.json`, the list of its files. `overwrite` replaces such a directory and nothing else: one
with a file that fewer did not write, a link, an input of the same command, the folder one stands in or a parent of it is refused, and so
is a place that cannot be written, before any work is done for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

MARKER = ".fewer.json"
REBUILT = ("__pycache__",)  # made by running what was written, and made again at will
NAME_MAX = 255  # bytes of a file's name on the file systems of today


def check_new(path: str | Path, overwrite: bool = False, *, inputs: Iterable[str | Path] = (), option: str = "--out") -> Path:
    """The directory as a path, if fewer may write it: it is not there, or empty, or with `overwrite` one that fewer wrote.

    Args:
        path: the directory to be written.
        overwrite: whether what fewer wrote there before may be replaced.
        inputs: files and directories that the same work reads; none of them may be replaced.
        option: what the message calls the path.

    Raises:
        FileExistsError: something stands there that may not be replaced.
        NotADirectoryError, PermissionError, ValueError: nothing can be written there.
    """
    directory = _check_place(path, option)
    whole = directory.resolve()
    here = Path.cwd()
    if whole == here or whole in here.parents:
        raise FileExistsError(f"{option} {directory} is the folder you stand in, or holds it; expected a new directory: choose another")
    for each in inputs:
        given = Path(each).resolve()
        if given.exists() and (whole == given or whole in given.parents):
            raise FileExistsError(
                f"{option} {directory} is {each}, which is read here, or holds it; expected a new directory: choose another"
            )
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{option} {directory} is a file; expected a new directory: choose another")
    if directory.exists() and any(directory.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{option} {directory} is not empty; expected a new directory: choose another, or overwrite (--overwrite)"
            )
        foreign = foreign_files(directory)
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise FileExistsError(
                f"{option} {directory} holds {foreign[0]}{more}, which fewer did not write there, and is not replaced: choose another directory"
            )
    _check_writable(directory, option)
    return directory


def foreign_files(directory: Path) -> list[str]:
    """What stands in a directory, at any depth, that fewer did not write there: all of it where there is no marker that can be read."""
    try:
        ours = {MARKER, *json.loads((directory / MARKER).read_text(encoding="utf8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    foreign = []
    for root, names, files in os.walk(directory):
        names[:] = [name for name in names if name not in REBUILT]
        at = Path(root).relative_to(directory)
        links = [name for name in names if (Path(root) / name).is_symlink()]
        foreign += [str(at / name) for name in (*names, *files) if name in links or str(at / name) not in ours]
    return sorted(foreign)


@contextlib.contextmanager
def made_whole(path: str | Path, overwrite: bool = False, *, inputs: Iterable[str | Path] = (), option: str = "--out") -> Iterator[Path]:
    """A folder to write into, which takes the directory's place when the block ends well, and is gone otherwise.

    Its files are listed in `.fewer.json`, so that a later `overwrite` knows them.
    """
    directory = check_new(path, overwrite, inputs=inputs, option=option).absolute()
    with _parents(directory):
        part = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".fewer-"))
        try:
            part.chmod(0o777 & ~_umask())
            yield part
            written = sorted(str(each.relative_to(part)) for each in part.rglob("*"))
            (part / MARKER).write_text(json.dumps({"written by": "fewer", "files": written}, indent=1) + "\n", encoding="utf8")
            check_new(directory, overwrite, inputs=inputs, option=option)  # somebody may have written there meanwhile
            swap_in(part, directory)
        finally:
            discard(part)


def swap_in(new: Path, target: Path) -> None:
    """`new` takes the place of `target`, which must be fewer's own; what stood there goes last, and comes back where that fails."""
    if not target.exists():
        new.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=".fewer-"))
    target.rename(old / "old")
    try:
        new.rename(target)
    except BaseException:
        (old / "old").rename(target)
        raise
    finally:
        discard(old)


def check_new_file(path: str | Path, overwrite: bool = False, *, inputs: Iterable[str | Path] = (), option: str = "--out") -> Path:
    """The file as a path, if fewer may write it: it is not there, or with `overwrite` a regular file that is no input."""
    file = _check_place(path, option)
    if file.is_dir():
        raise IsADirectoryError(f"{option} {file} is a directory; expected a file: choose another name")
    if file.exists():
        if not file.is_file():
            raise FileExistsError(f"{option} {file} is no regular file; expected a new file: choose another name")
        for each in inputs:
            if Path(each).exists() and file.samefile(each):
                raise FileExistsError(f"{option} {file} is {each}, which is read here; expected a new file: choose another name")
        if not overwrite:
            raise FileExistsError(f"{option} {file} exists; expected a new file: choose another name, or overwrite (--overwrite)")
    _check_writable(file, option)
    return file


@contextlib.contextmanager
def whole_file(path: str | Path, overwrite: bool = False, *, inputs: Iterable[str | Path] = (), option: str = "--out") -> Iterator[Path]:
    """A file to write into, which takes the path's place when the block ends well, and is gone otherwise."""
    file = check_new_file(path, overwrite, inputs=inputs, option=option).absolute()
    with _parents(file):
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".fewer-", suffix=file.suffix)
        os.close(handle)
        part = Path(name)
        try:
            part.chmod(file.stat().st_mode & 0o777 if file.exists() else 0o666 & ~_umask())
            yield part
            check_new_file(file, overwrite, inputs=inputs, option=option)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder that fewer made for itself (a cache, a half-written part); never a user's."""
    shutil.rmtree(folder, ignore_errors=True)


def _check_place(path: str | Path, option: str) -> Path:
    """The path, if something could lie there at all and no link does."""
    if not str(path) or "\0" in str(path):
        raise ValueError(f"{option} is empty or has a zero byte; expected a path: name one")
    given = Path(path)
    for part in given.parts:
        if len(os.fsencode(part)) > NAME_MAX:
            raise ValueError(
                f"{option} {part[:20]}... has a name of {len(os.fsencode(part))} bytes; expected at most {NAME_MAX}: shorten it"
            )
    try:
        if given.is_symlink():
            raise FileExistsError(f"{option} {given} is a link; expected a path of its own: name what it points to, or another")
        for parent in given.absolute().parents:
            if parent.exists() and not parent.is_dir():
                raise NotADirectoryError(
                    f"{option} {given} lies below {parent}, which is a file; expected a folder there: choose another path"
                )
        given.exists()
    except OSError as error:
        if error.errno is None:
            raise
        raise ValueError(f"{option} {str(given)[:60]}: {error.strerror}; choose another path") from error
    return given


def _check_writable(path: Path, option: str) -> None:
    """PermissionError where the nearest folder above the path takes no new file: tried, as rights alone do not tell."""
    parent = next(each for each in path.absolute().parents if each.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=".fewer-"))
    except OSError as error:
        raise PermissionError(f"{option} {path}: {parent} cannot be written to ({error.strerror}); choose another path") from None


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """The folders above a path, made where they are missing, and gone again where the block fails."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(file: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds; ValueError naming the file and the reason where it holds none."""
    file = Path(file)
    if not file.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{file} cannot be read (no such file); expected a JSON file")
    try:
        read = json.loads(file.read_text(encoding="utf8"))
    except OSError as error:
        raise FileNotFoundError(f"{file} cannot be read ({error.strerror}); expected a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({' '.join(str(error).split())}); it is cut off or no such file: write it again") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file} holds a {type(read).__name__}; expected an object of names and values: write it again")
    return read


def read_weights(file: str | Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name; ValueError naming the file and the reason where it is none, or is cut off."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; expected weights as safetensors")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{file} is no whole safetensors file ({why}); copy or write it again") from error


def model_digest(module: nn.Module) -> str:
    """16 hexadecimal digits that tell a model's weights (names, types, shapes, values) from any other's."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
