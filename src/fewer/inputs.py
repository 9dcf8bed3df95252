"""The user's own files: arrays, images, pairs of question and answer. Each is read or refused in one clear line, and none is ever unpickled."""

from __future__ import annotations

import importlib
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LONG = 250  # characters of a path that a message shows
BROKEN = (ValueError, EOFError, OSError, AttributeError, TypeError, KeyError, MemoryError, OverflowError, zlib.error, zipfile.BadZipFile)


def read_arrays(file: str | Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file.

    Args:
        file: as `numpy.savez` wrote it.
        needed: arrays that must be there.
        optional: arrays that are read where they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is none of plain arrays, or lacks one; the message names them.
    """
    import numpy as np

    file = _file(file, f"an .npz file with the arrays {' and '.join(needed)}")
    how = f"write it with numpy.savez(file, {', '.join(f'{name}=...' for name in needed)})"
    try:
        opened = np.load(file, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with opened:
            names = list(opened.files)
            arrays = {name: opened[name] for name in (*needed, *optional) if name in names}
    except BROKEN as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} cannot be read as an .npz file of plain arrays ({why}); {how}, no array of objects") from error
    for name in needed:
        if name not in arrays:
            raise ValueError(f"{file} has no array {name!r} (it has {', '.join(names) or 'none'}); {how}")
    return arrays


def read_examples(file: str | Path, optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Examples with a label each: `x` [N, ...] of finite numbers and `y` [N] of integers, from an .npz file.

    A folder of such files is read as one, its files in the order of their names; with "client" among `optional` each is a client's.

    Returns:
        x as it is stored, y as int64 class numbers from 0, and the optional arrays that are there, as many rows each.
    """
    import numpy as np

    if Path(file).is_dir():
        return _read_folder(Path(file), optional)
    arrays = read_arrays(file, ["x", "y"], optional)
    x, y = arrays["x"], arrays["y"]
    if x.ndim < 2 or x.dtype.kind not in "fiub" or len(x) == 0:
        raise ValueError(f"{file}: x is {x.shape} {x.dtype}; expected numbers [N, ...] with N >= 1: one row an example")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        row = int(np.argwhere(~np.isfinite(x))[0, 0])
        raise ValueError(f"{file}: x has a NaN or infinite value in row {row}; expected finite numbers: clean or drop that row")
    if y.dtype.kind not in "iub" or y.shape != (len(x),):
        raise ValueError(f"{file}: y is {y.shape} {y.dtype}; expected ({len(x)},) integers: one class number a row of x")
    if y.min() < 0:
        raise ValueError(f"{file}: y holds {y.min()}; expected class numbers from 0: renumber the classes")
    for name in optional:
        if name in arrays and len(arrays[name]) != len(x):
            raise ValueError(f"{file}: {name} has {len(arrays[name])} rows and x {len(x)}; expected as many: one entry a row of x")
    return arrays | {"y": y.astype(np.int64)}


def _read_folder(folder: Path, optional: Sequence[str]) -> dict[str, np.ndarray]:
    import numpy as np

    files = sorted(folder.glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .npz files; expected one a client, each with x and y")
    parts = [read_examples(each, [name for name in optional if name != "client"]) for each in files]
    for each, part in zip(files, parts, strict=True):
        if set(part) != set(parts[0]) or part["x"].shape[1:] != parts[0]["x"].shape[1:]:
            raise ValueError(
                f"{each}: {', '.join(part)} with x {part['x'].shape[1:]}; expected {', '.join(parts[0])} with x {parts[0]['x'].shape[1:]} as in {files[0].name}"
            )
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if "client" in optional:
        whole["client"] = np.repeat(np.arange(len(parts)), [len(part["x"]) for part in parts])
    return whole


def map_array(file: str | Path, what: str = "one array") -> np.ndarray:
    """The array of an .npy file, mapped from disk and read only where it is looked at; FileNotFoundError or ValueError where it is none."""
    import numpy as np

    file = _file(file, f"an .npy file with {what}")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except BROKEN as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{file} cannot be read as an .npy file of plain numbers ({why}); write it with numpy.save(file, array)"
        ) from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{file} is an archive of arrays; expected one array: write it with numpy.save(file, array)")
    return array


def read_images(directory: str | Path, channels: int = 3, size: tuple[int, int] | None = None) -> np.ndarray:
    """The pictures of a folder, sorted by name: uint8 [N, channels, H, W].

    Args:
        channels: 3 for colour, 1 for grey; pictures are turned into that.
        size: (H, W) that each must have; by default all must be as large as the first.

    Raises:
        NotADirectoryError, FileNotFoundError: no such folder, or no pictures in it.
        ValueError: one cannot be read, or has another size; the message names it.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    directory = Path(directory)
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is no folder; expected one with pictures ({', '.join(IMAGES)})")
    files = sorted(file for file in directory.iterdir() if file.suffix.lower() in IMAGES)
    if not files:
        raise FileNotFoundError(f"{directory} has no pictures; expected files that end in {', '.join(IMAGES)}")
    rows = []
    for file in files:
        try:
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
        except (*BROKEN, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} is no whole picture ({' '.join(str(error).split())}); take it out or write it again") from error
        size = size or pixels.shape[:2]
        if pixels.shape[:2] != size:
            given, expected = f"{pixels.shape[1]} x {pixels.shape[0]}", f"{size[1]} x {size[0]}"
            raise ValueError(f"{file} is {given} pixels; expected {expected}: resize the pictures")
        rows.append(pixels.reshape(*size, channels).transpose(2, 0, 1))
    return np.stack(rows)


def read_text(file: str | Path) -> str:
    """The text of a UTF-8 file; FileNotFoundError or ValueError where it is none."""
    file = _file(file, "a text file")
    try:
        return file.read_text("utf8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}); convert it first") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); name another text file") from error


def read_pairs(file: str | Path, names: tuple[str, str] = ("prompt", "completion")) -> list[tuple[str, str]]:
    """The (prompt, completion) pairs of a JSONL file, an object a line; ValueError naming the line that is none."""
    shape = json.dumps(dict.fromkeys(names, "..."))
    pairs = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            pair = (row[names[0]], row[names[1]])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{file}, line {number}: expected {shape}, one object a line") from None
        for name, value in zip(names, pair, strict=True):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{file}, line {number}: its {name} is {json.dumps(value)[:40]}; expected a text: {shape}")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{file} holds no examples; expected {shape}, one object a line")
    return pairs


def stored_tensors(file: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype as the file writes it) of a safetensors file's tensors, from its header; ValueError where it is no whole one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as stored:
            parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} is no whole safetensors file ({why}); copy or write it again") from error


def read_fasta(file: str | Path, letters: str) -> list[tuple[str, str]]:
    """(header, sequence) of each record of a FASTA file, sequences in upper case.

    Args:
        letters: the alphabet, upper case.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no record, one without letters, or a letter of no alphabet; the message names the file, the record and the position.
    """
    records: list[tuple[str, list[str]]] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.startswith(">"):
            records.append((line[1:].strip(), []))
        elif line.strip() and not line.startswith(";"):
            if not records:
                raise ValueError(
                    f"{file}, line {number}: letters before the first '>'; expected a FASTA file: a line '>name', then its letters"
                )
            records[-1][1].append("".join(line.split()).upper())
    if not records:
        raise ValueError(f"{file} holds no sequences; expected a FASTA file: a line '>name', then its letters")
    found = [(header, "".join(parts)) for header, parts in records]
    for number, (header, sequence) in enumerate(found, 1):
        at = next((i for i, letter in enumerate(sequence, 1) if letter not in letters), None)
        if at is not None or not sequence:
            what = f"has {sequence[at - 1]!r} at position {at}" if at else "has no letters"
            raise ValueError(f"{file}, record {number} ({header[:40]}) {what}; expected letters of {letters}: mend or drop that record")
    return found


def load_function(named: str) -> tuple[Callable[[Any], Any], int]:
    """(function, n) of `module:name:BITS`: a user's own function of n bits; its module is imported, from the folder one stands in or as usual.

    Raises:
        ValueError: other words, no such module or function, or a module that raises.
    """
    module, _, rest = named.partition(":")
    name, _, bits = rest.partition(":")
    if not (module and name.isidentifier() and bits.isdecimal() and int(bits)):
        raise ValueError(f"{named!r} names no function; expected module:name:BITS, such as my_rules:score:20")
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ValueError(f"{named!r}: {type(error).__name__}: {error}; mend the module, or name another function") from error
    finally:
        sys.path[:] = before
    if not callable(function):
        raise ValueError(f"{named!r}: {name} is a {type(function).__name__}; expected a function of bits [m, {bits}]")
    return function, int(bits)


def _file(file: str | Path, what: str) -> Path:
    path = Path(file)
    try:
        there, folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):
        there = folder = False
    if not there:
        name = str(file) if len(str(file)) <= LONG else f"...{str(file)[-LONG:]}"
        raise FileNotFoundError(f"{name or repr('')} is {'a folder' if folder else 'no file'}; expected {what}")
    return path
