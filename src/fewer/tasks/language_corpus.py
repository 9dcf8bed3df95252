"""Real text for the small language model: the running interpreter's own library, or files that a user names; and its tokenizer."""

from __future__ import annotations

import fnmatch
import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fewer.errors import UserError
from fewer.inputs import read_text

LEFT_OUT = (
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "turtledemo", "lib2to3", "ensurepip",
    "config-*", "lib-dynload",
)  # fmt: skip
VALIDATION_BYTE = 13  # a file whose name's SHA-256 begins with a byte below this is validation: about one in twenty
ENOUGH = 5_000_000  # characters
END = "<|eos|>"  # separates documents, ends them, pads: id 0
VOCABULARY = 2048


@dataclass(frozen=True)
class Corpus:
    """Documents in two parts.

    Attributes:
        train, validation: (name, text) of each document, by name.
        origin: where they come from, in words.
    """

    train: tuple[tuple[str, str], ...]
    validation: tuple[tuple[str, str], ...]
    origin: str = field(compare=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all names and texts."""
        whole = hashlib.sha256()
        for part in (self.train, self.validation):
            for name, text in part:
                whole.update(f"{name}\0{len(text)}\0".encode() + text.encode("utf8", "surrogatepass"))
            whole.update(b"\1")
        return whole.hexdigest()


def is_validation(name: str) -> bool:
    """Whether a document of that name is held out: the first byte of the name's SHA-256 decides.

    >>> [is_validation(name) for name in ("abc.py", "ast.py", "json/decoder.py")]
    [False, False, False]
    """
    return hashlib.sha256(name.encode()).digest()[0] < VALIDATION_BYTE


def standard_library(folder: Path | None = None) -> Corpus:
    """The Python files of the running interpreter's library, without its tests and what is installed beside it.

    Raises:
        UserError: fewer than 5 million characters are there (some distributions split the library up).
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in root.rglob("*.py") if not _left_out(file.relative_to(root)))
    named = sorted((file.relative_to(root).as_posix(), file.read_text("utf8", errors="replace")) for file in files)
    size = sum(len(text) for _, text in named)
    if size < ENOUGH:
        raise UserError(
            f"{root} holds {size / 1e6:.1f} million characters of Python; expected at least {ENOUGH / 1e6:.0f} million: name text files with --text"
        )
    return _split(named, f"the standard library in {root.name}")


def text_corpus(files: Sequence[Path | str]) -> Corpus:
    """The texts of UTF-8 files: held out by name, or, of a single file, the last twentieth.

    Raises:
        UserError: a file is not there or is not UTF-8, or nothing is left for one of the parts.
    """
    named = read_texts(files)
    if len(named) == 1:
        name, text = named[0]
        cut = len(text) - len(text) // 20
        corpus = Corpus(((name, text[:cut]),), ((name, text[cut:]),), name)
    else:
        corpus = _split(named, f"{len(named)} files")
    for part, documents in (("training", corpus.train), ("validation", corpus.validation)):
        if not any(text for _, text in documents):
            raise UserError(f"--text: nothing is left for {part} of {corpus.origin}; name more files, or a single longer one")
    return corpus


def read_texts(files: Sequence[Path | str]) -> list[tuple[str, str]]:
    """(name, text) of UTF-8 files; UserError where one cannot be read."""
    named = []
    for file in sorted(map(Path, files)):
        try:
            named.append((file.name, read_text(file)))
        except (ValueError, OSError) as error:
            raise UserError(f"--text {error}") from error
    return named


def _left_out(file: Path) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for part in file.parts[:-1] for pattern in LEFT_OUT)


def _split(named: list[tuple[str, str]], origin: str) -> Corpus:
    parts: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for name, text in named:
        parts[is_validation(name)].append((name, text))
    return Corpus(tuple(parts[False]), tuple(parts[True]), origin)


def train_tokenizer(corpus: Corpus) -> Any:
    """A byte-level BPE tokenizer (a transformers fast tokenizer) of 2,048 tokens, trained on the training documents alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text for _, text in corpus.train), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False)


def token_stream(tokenizer: Any, documents: Sequence[tuple[str, str]]) -> Any:
    """The documents' tokens one after the other, each ended by the tokenizer's end of text where it has one: int64 [tokens]."""
    import numpy as np
    import torch

    encoded = tokenizer.backend_tokenizer.encode_batch([text for _, text in documents])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return torch.from_numpy(np.concatenate([np.array([*each.ids, *end], np.int64) for each in encoded]))
