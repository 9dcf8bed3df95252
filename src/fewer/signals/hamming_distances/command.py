"""The verb `fewer hamming`: where a pattern comes nearest in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from fewer.signals.hamming_distances.contamination import Corpus

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ*-"  # of nucleotides and amino acids, with gaps and stops
Tokens = Literal["char", "word", "byte"]


def hamming(
    pattern: Annotated[str, typer.Argument(help="The pattern: a file as TEXT is one, or with --letters the letters themselves.")],
    text: Annotated[str, typer.Argument(help="Where to look: a UTF-8 text, a FASTA file (--fasta), or an .npy file of integers.")],
    max_distance: Annotated[int | None, typer.Option(min=0, max=2**31 - 2, help="Only windows with at most so many differences.")] = None,
    top: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many windows to print, nearest first.")] = 20,
    tokens: Annotated[Tokens, typer.Option(help="What a letter is: a character, a word between blanks, or a byte.")] = "char",
    fasta: Annotated[bool, typer.Option("--fasta", help="The files are FASTA; windows lie within one record.")] = False,
    case_fold: Annotated[bool, typer.Option("--case-fold", help="Upper and lower case are one letter.")] = False,
    wildcard: Annotated[str, typer.Option(help="A letter that matches everything, such as N.")] = "",
    letters: Annotated[bool, typer.Option("--letters", help="PATTERN is no file: it is the pattern.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The windows of a file that differ least from a pattern, letter by letter.

    The two may stand in either order: of two files the smaller is the pattern, beside letters the file is the text.
    Positions count letters (characters, words, bytes, entries of an array) from 0; in a FASTA file within their record.

    Example: fewer hamming GATTACA genome.fa --letters --fasta --max-distance 1
    """
    from fewer.signals.hamming_distances.contamination import Corpus

    pattern, place = _ordered(pattern, text, letters)
    if place.suffix == ".npy" and (letters or wildcard):
        raise ValueError(f"{place} holds numbers; expected no --letters and no --wildcard beside it: give the pattern as an .npy file too")
    names, texts = _read(place, fasta, tokens, case_fold)
    fold = case_fold or fasta  # the letters of a FASTA file are read in upper case
    if letters:
        patterns: list[Any] = [_split(pattern, tokens, fold)]
    else:
        patterns = _read(Path(pattern), fasta, tokens, case_fold)[1]
        if len(patterns) != 1:
            raise ValueError(f"{pattern} has {len(patterns)} records; expected one pattern: write each to a file of its own")
    wild: Any = (_split(wildcard, "byte" if tokens == "byte" else "char", fold)) or None
    if tokens == "word":
        (patterns, texts), wild = _numbered([patterns, texts]), None
        if wildcard:
            raise ValueError(f"--wildcard {wildcard} with --tokens word; expected it for characters and bytes alone: leave it out")
    found = _nearest(Corpus(texts, wild), patterns[0], top, max_distance)
    if as_json:
        print(json.dumps([{"record": names[at], "position": position, "distance": distance} for at, position, distance in found]))
        return
    for at, position, distance in found:
        print(f"{distance:>10,}  {position:>12,}" + (f"  {names[at]}" if fasta else ""))
    within = "" if max_distance is None else f" within distance {max_distance:,}"
    print(f"{len(found):,} windows{within} of {sum(map(len, texts)):,} letters (distance, position{', record' if fasta else ''})")


def _ordered(first: str, second: str, letters: bool) -> tuple[str, Path]:
    """(pattern, the text's file), however they were given."""
    one, other = Path(first), Path(second)
    if letters:
        swapped = one.is_file() and not other.is_file()
    else:
        swapped = one.is_file() and other.is_file() and one.stat().st_size > other.stat().st_size
    return (second, one) if swapped else (first, other)


def _nearest(corpus: Corpus, pattern: Any, top: int, max_distance: int | None) -> list[tuple[int, int, int]]:
    """(sequence, position, distance) of the nearest windows that lie within one sequence."""
    import numpy as np

    from fewer.signals.hamming_distances.text_index import nearest_windows

    m, longest = len(pattern), int(np.diff(corpus.starts).max())
    if m > longest:
        raise ValueError(f"the pattern has {m:,} letters and the longest record {longest:,}; expected a pattern that fits into one")
    distances = np.asarray(corpus.index.distances(pattern, max_distance=max_distance))
    most = m if max_distance is None else max_distance
    distances = np.where(corpus.inside(m), distances, m + 1)
    return [(*corpus.place(position), distance) for position, distance in nearest_windows(distances, top) if distance <= most]


def _read(file: Path, fasta: bool, tokens: Tokens, case_fold: bool) -> tuple[list[str], list[Any]]:
    """The names and the letters of a file's sequences."""
    import numpy as np

    from fewer.inputs import map_array, read_fasta, read_text

    if fasta:
        found = read_fasta(file, LETTERS)
        lines = [line for line in read_text(file).splitlines() if line and line[0] not in ">;"]
        if not case_fold and any(line != line.upper() for line in lines) and any(line != line.lower() for line in lines):
            low = next(letter for line in lines for letter in line if letter.islower())
            raise ValueError(f"{file} has upper and lower case, such as {low!r}; expected one of them: give --case-fold to make them one")
        return [header for header, _ in found], [sequence for _, sequence in found]
    if file.suffix == ".npy":
        array: np.ndarray = map_array(file, "integers")
        return [file.name], [np.asarray(array)]
    if tokens == "byte":
        if not file.is_file():
            raise FileNotFoundError(f"{file} is {'a folder' if file.is_dir() else 'no file'}; expected a file of bytes")
        content = file.read_bytes()
        return [file.name], [content.upper() if case_fold else content]
    return [file.name], [_split(read_text(file), tokens, case_fold)]


def _split(text: str, tokens: Tokens, case_fold: bool) -> Any:
    if case_fold:  # letter by letter where the upper case of one is two, so that positions stay
        upper = text.upper()
        text = upper if len(upper) == len(text) else "".join(letter.upper()[:1] for letter in text)
    return text.split() if tokens == "word" else text.encode() if tokens == "byte" else text


def _numbered(groups: list[list[list[str]]]) -> list[list[Any]]:
    """Words as numbers, the same word the same number everywhere."""
    import numpy as np

    number: dict[str, int] = {}
    return [[np.array([number.setdefault(word, len(number)) for word in words], dtype=np.int64) for words in group] for group in groups]


COMMANDS = {"hamming": hamming}
