"""What a user points at, recognised by looking: at names of files, at headers, at names and shapes of arrays. No code of its own is run."""

from __future__ import annotations

import ast
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from fewer.errors import UserError
from fewer.files import read_json
from fewer.inputs import BROKEN, IMAGES, map_array, read_text, stored_tensors
from fewer.quantities import show

FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)(?::(\d+))?")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
FASTA = (".fasta", ".fa", ".fna", ".faa")
MOST_BITS = 62
WIDTH = 4  # bytes of a float32, in which studies hold models
EXPECTED = (
    "expected a transformers or diffusers directory, a .onnx or .pt2 network, an .npz, .npy, .txt, .jsonl or .fasta file, a folder of "
    "pictures or videos, a server's address or a Python function module:name:BITS"
)


@dataclass(frozen=True)
class Thing:
    """A thing that methods may apply to.

    Attributes:
        given: as the user named it.
        words: the kinds that it is, of the cards' `applies_to`, the likeliest first.
        about: what was seen, in one line.
        value: as a study's option takes it.
        files: what it is read from.
        memory: bytes that it takes in float32; 0 where that is not known.
    """

    given: str
    words: tuple[str, ...]
    about: str
    value: str
    files: tuple[Path, ...] = ()
    memory: int = 0

    def digest(self, *beside: str) -> str:
        """Tells it from another, and from itself after a change: names, sizes and times of its files and of those beside it."""
        seen = hashlib.sha256(self.value.encode())
        for file in (*self.files, *map(Path, beside)):
            about = file.stat()
            seen.update(f"{file.absolute()} {about.st_size} {about.st_mtime_ns}\n".encode())
        return seen.hexdigest()[:12]


def recognise(given: str) -> Thing:
    """What `given` is.

    Raises:
        UserError: there is no such thing, it cannot be read, or it is of no kind that is known.
    """
    if re.match(r"https?://", given):
        return Thing(given, ("a language model behind an API",), "a server of language models", given)
    path = Path(given)
    try:
        folder, file = path.is_dir(), path.is_file()
    except (OSError, ValueError):
        folder = file = False
    try:
        if folder:
            return _folder(given, path)
        if file:
            look = FILES.get(path.suffix.lower())
            if look is None:
                raise UserError(f"{given} is a {path.suffix or 'plain'} file, of no kind that is known; {EXPECTED}")
            return look(given, path)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if found := FUNCTION.fullmatch(given):
        return _function(given, *found.groups())
    raise UserError(f"{given!r} is not there; {EXPECTED}")


# Directories


def _folder(given: str, path: Path) -> Thing:
    if (path / "model_index.json").is_file():
        return _pipeline(given, path)
    if (path / "config.json").is_file():
        return _transformer(given, path)
    inside = sorted(path.iterdir())
    for endings, word, what in ((IMAGES, "images", "pictures"), (VIDEOS, "videos", "videos")):
        if some := tuple(file for file in inside if file.suffix.lower() in endings):
            return Thing(given, (word,), f"a folder of {len(some):,} {what}", given, some)
    if (arrays := tuple(file for file in inside if file.suffix == ".npz")) and _is_labelled(arrays[0]):
        return Thing(given, ("a federated job",), f"a folder of {len(arrays):,} clients' examples", given, arrays)
    raise UserError(f"{given} is a directory with neither config.json nor model_index.json, pictures, videos or .npz files; {EXPECTED}")


def _transformer(given: str, path: Path) -> Thing:
    config = read_json(path / "config.json")
    kind, classes = config.get("model_type"), config.get("architectures") or []
    if not isinstance(kind, str) or not isinstance(classes, list):
        raise UserError(f"{path / 'config.json'}: model_type is {kind!r}; expected what transformers writes: a word such as llama")
    files, numbers, dtype = _weights(path)
    about = f"{kind}, {_numbers(numbers)} in {dtype}"
    if not any(str(each).endswith(("ForCausalLM", "LMHeadModel")) for each in classes):
        what = ", ".join(map(str, classes)) or "none named"
        raise UserError(f"{given} is a transformers model of {about}, but no causal language model (architectures: {what}); {EXPECTED}")
    return Thing(given, ("a transformers causal LM",), f"a transformers causal LM: {about}", given, files, WIDTH * numbers)


def _pipeline(given: str, path: Path) -> Thing:
    index = read_json(path / "model_index.json")
    files, numbers, dtype = _weights(path)
    parts = ", ".join(sorted(name for name, value in index.items() if isinstance(value, list) and value and value[0]))
    about = f"a diffusers pipeline: {index.get('_class_name', 'of no class')} of {parts}; {_numbers(numbers)} in {dtype}"
    return Thing(given, ("a diffusers pipeline",), about, given, files, WIDTH * numbers)


def _weights(path: Path) -> tuple[tuple[Path, ...], int, str]:
    """Files, how many numbers they hold, and of which type, by their headers alone."""
    files = tuple(sorted(path.rglob("*.safetensors")))
    if not files:
        raise UserError(f"{path} has no weights as safetensors; expected them: save the model with save_pretrained again")
    stored = [tensor for file in files for tensor in stored_tensors(file).values()]
    numbers, dtypes = sum(math.prod(shape) for shape, _ in stored), {dtype for _, dtype in stored}
    config = [each for each in (path / "config.json", path / "model_index.json") if each.is_file()]
    return (*files, *config), numbers, ", ".join(sorted(dtypes))


def _numbers(count: int) -> str:
    return f"{count / 1e9:.3g} billion parameters" if count >= 1e9 else f"{count / 1e6:.3g} million parameters"


# Files


def _npz(given: str, path: Path) -> Thing:
    shapes = dict(_arrays(path))
    names = ", ".join(f"{name} {list(shape)}" for name, (shape, _) in shapes.items())
    if {"x", "edge_index"} <= set(shapes):
        return Thing(given, ("a graph",), f"a graph: {names}", given, (path,))
    if {"u", "y"} <= set(shapes):
        return Thing(given, ("a control loop",), f"a recording of a control loop: {names}", given, (path,))
    if "x" in shapes and "y" in shapes and shapes["y"][1] == "f":
        return Thing(given, ("an operator between functions",), f"pairs of fields: {names}", given, (path,))
    if "x" in shapes and len(shapes["x"][0]) >= 3:
        words = ("a federated job", "images") if "client" in shapes else ("images",)
        what = "examples of clients" if "client" in shapes else "images"
        return Thing(given, words, f"{what}: {names}", given, (path,))
    if any(len(shape) == 4 for shape, _ in shapes.values()):
        return Thing(given, ("videos",), f"videos: {names}", given, (path,))
    raise UserError(
        f"{given} holds {names or 'no arrays'}; expected x and y of images, x, edge_index and labels of a graph, x and y of fields, "
        "u and y of a control loop, or frames of videos"
    )


def _is_labelled(path: Path) -> bool:
    return {"x", "y"} <= {name for name, _ in _arrays(path)}


def _arrays(path: Path) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """(name, (shape, kind of dtype)) of each array, by the headers alone."""
    import zipfile

    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as stored:
                    version = np.lib.format.read_magic(stored)
                    read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(stored)
                yield name.removesuffix(".npy"), (shape, dtype.kind)
    except BROKEN as error:
        raise UserError(f"{path} cannot be read as an .npz file ({' '.join(str(error).split())}); write it with numpy.savez") from error


def _npy(given: str, path: Path) -> Thing:
    values = map_array(path)
    bits = values.size.bit_length() - 1
    if values.ndim == 1 and values.size == 1 << bits and bits:
        return Thing(given, ("a function of bits", "tensors"), f"a function of {bits} bits: its {values.size:,} values", given, (path,))
    return Thing(given, ("tensors",), f"a tensor of shape {list(values.shape)}", given, (path,))


def _network(given: str, path: Path) -> Thing:
    if path.suffix.lower() == ".pt2":
        import zipfile

        if not zipfile.is_zipfile(path):
            raise UserError(f"{given} is no whole .pt2 file; expected what torch.export.save writes")
    size = show(path.stat().st_size, "bytes")
    return Thing(given, ("a small network in C", "a torch network"), f"a network as {path.suffix[1:]}, {size}", given, (path,))


def _text(given: str, path: Path) -> Thing:
    text = read_text(path)
    words = text.split()
    if words and all(map(_is_number, words)):
        return Thing(given, ("numbers",), f"{len(words):,} numbers", given, (path,))
    return Thing(given, ("text",), f"a text of {len(text):,} characters", given, (path,))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _sequences(given: str, path: Path) -> Thing:
    count = read_text(path).count(">")
    return Thing(given, ("sequences", "text"), f"{count:,} sequences", given, (path,))


def _tensors(given: str, path: Path) -> Thing:
    return Thing(given, ("tensors",), f"tensors, {show(path.stat().st_size, 'bytes')}", given, (path,))


FILES: dict[str, Callable[[str, Path], Thing]] = {
    ".npz": _npz,
    ".npy": _npy,
    ".onnx": _network,
    ".pt2": _network,
    ".txt": _text,
    ".jsonl": _text,
    ".safetensors": _tensors,
    **dict.fromkeys(FASTA, _sequences),
}


# Functions


def _function(given: str, module: str, name: str, bits: str | None) -> Thing:
    """By the module's source, which is read and not run."""
    source = _source_of(module)
    if source is None:
        raise UserError(f"{given!r}: there is no module {module} here; {EXPECTED}")
    try:
        tree = ast.parse(source.read_text("utf8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{given!r}: {source} is no Python that can be read ({error}); mend it") from error
    defined = {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
    if name not in defined:
        known = ", ".join(sorted(defined)) or "none"
        raise UserError(f"{given!r}: {source.name} defines no function {name} (it defines {known}); name one of them")
    if bits is None or not 1 <= int(bits) <= MOST_BITS:
        raise UserError(
            f"{given!r}: of how many bits is it? expected {module}:{name}:BITS, 1 to {MOST_BITS}; it is called with masks [m, BITS] of 0 and 1 "
            "and gives m numbers"
        )
    return Thing(given, ("a function of bits", "a black box"), f"a Python function of {bits} bits, {source.name}: {name}", given, (source,))


def _source_of(module: str) -> Path | None:
    """The file of a module in this folder or where Python looks; no parent package is imported."""
    import sys

    places: Any = [str(Path.cwd()), *sys.path]
    for part in module.split("."):
        found = PathFinder.find_spec(part, places)
        if found is None:
            return None
        places = found.submodule_search_locations
    return Path(found.origin) if found.origin and found.origin.endswith(".py") else None
