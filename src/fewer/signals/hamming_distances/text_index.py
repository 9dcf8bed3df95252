"""One text, many patterns: what is made of the text once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from fewer.checks import check_whole
from fewer.files import whole_file
from fewer.inputs import read_arrays
from fewer.signals.hamming_distances.counting.costs import calibrate
from fewer.signals.hamming_distances.counting.letters import Alphabet, Pair, check_kinds, count_letters, read_letters, read_wildcard
from fewer.signals.hamming_distances.counting.matches import Kept
from fewer.signals.hamming_distances.distances import Question, check_length, given_back

FORMAT = 1  # of the file
KINDS = ("str", "bytes", "int")


class TextIndex:
    """A text whose letters are numbered, and whose bit vectors and spectra are kept from pattern to pattern (up to 512 MiB).

    Args:
        text: [n] as `hamming_distances` takes it.
        wildcard: a letter that matches everything, or None.

    Examples:
        >>> index = TextIndex("abracadabra")
        >>> index.distances("abba").tolist()
        [1, 4, 3, 3, 3, 3, 3, 1]
        >>> index.nearest("cad", top=2)
        [(4, 0), (2, 2)]
    """

    def __init__(self, text: Any, wildcard: Any = None) -> None:
        letters, self.kind = read_letters(text, "text")
        if letters.ndim != 1:
            raise ValueError(f"text has shape {letters.shape}; expected one dimension: give one text an index")
        self._tensor = hasattr(text, "detach")
        self._set(letters, read_wildcard(wildcard, self.kind))

    def _set(self, letters: np.ndarray, wildcard: int | None) -> None:
        self.alphabet = Alphabet(letters, wildcard)
        self.codes = self.alphabet.codes(letters)
        self.counts = count_letters(self.codes, self.alphabet.size)
        self._kept = Kept()

    def __len__(self) -> int:
        return len(self.codes)

    def distances(self, pattern: Any, *, return_plan: bool = False, **options: Any) -> Any:
        """The distances of a pattern [m] or of q patterns [q, m], as `hamming_distances(text, pattern, **options)` gives them."""
        patterns, kind = read_letters(pattern, "pattern")
        check_kinds(self.kind, kind)
        check_length(self.codes, patterns)
        question = Question(**options)
        if question.method == "sample" and self.alphabet.wildcard is not None:
            raise ValueError("the index has a wildcard; expected none for method='sample': use method='hash'")
        answers = [question.of(self._pair(each, question), calibrate(), self._kept) for each in np.atleast_2d(patterns)]
        return given_back(answers, patterns.ndim == 2, return_plan, self._tensor, question.positions_only)

    def _pair(self, pattern: np.ndarray, question: Question) -> Pair:
        """Letters that the text lacks are one letter, which stands nowhere; where letters are hashed they are told apart."""
        if question.epsilon is None:
            return Pair(self.codes, self.alphabet.codes(pattern), self.alphabet.size, self.counts)
        alphabet = Alphabet(np.union1d(self.alphabet.letters, pattern.astype(np.int64)), self.alphabet.wildcard)
        letters = np.append(self.alphabet.letters, [0, 0])
        recoded = alphabet.codes(letters)
        recoded[self.alphabet.wild] = alphabet.wild
        codes = recoded[self.codes]
        return Pair(codes, alphabet.codes(pattern), alphabet.size, count_letters(codes, alphabet.size))

    def nearest(self, pattern: Any, top: int = 10, exclusion: int | None = None) -> list[tuple[int, int]]:
        """The nearest windows as (position, distance), nearest first, ties by position.

        Args:
            pattern: [m].
            top: how many at most.
            exclusion: windows that begin within so many letters of a nearer one are left out; None leaves out none.
        """
        check_whole(top=top)
        check_whole(0, exclusion=exclusion, optional=["exclusion"])
        found = self.distances(pattern)
        if found.ndim != 1:
            raise ValueError(f"pattern has {found.shape[0]} rows; expected one pattern: ask for the nearest of each in turn")
        return nearest_windows(np.asarray(found), top, exclusion or 0)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the text to an .npz file of plain arrays; bit vectors and spectra are made again when they are asked for."""
        wild = self.alphabet.wildcard
        with whole_file(path, overwrite, option="path") as part, part.open("wb") as file:
            np.savez(
                file,
                format=np.array(FORMAT),
                kind=np.array(KINDS.index(self.kind)),
                codes=self.codes,
                letters=self.alphabet.letters,
                wildcard=np.array([] if wild is None else [wild], dtype=np.int64),
                tensor=np.array(self._tensor),
            )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """An index that `save` wrote; ValueError where the file is none, or is of a newer format."""
        read = read_arrays(path, ["format", "kind", "codes", "letters", "wildcard", "tensor"])
        codes, letters, wild = read["codes"], read["letters"], read["wildcard"]
        if read["format"].shape != () or int(read["format"]) != FORMAT:
            raise ValueError(
                f"{path} has format {read['format']}; expected {FORMAT}: read it with the fewer that wrote it, or index the text again"
            )
        whole = (
            all(each.dtype.kind in "iu" for each in (codes, letters, wild, read["kind"]))
            and codes.ndim == letters.ndim == wild.ndim == 1
            and len(codes) > 0
            and len(wild) <= 1
            and bool((np.diff(letters) > 0).all())
            and codes.min() >= 0
            and codes.max() < len(letters) + 2 * len(wild)
            and not (codes == len(letters)).any()
            and read["kind"].shape == read["tensor"].shape == ()
            and int(read["kind"]) < len(KINDS)
        )
        if not whole:
            raise ValueError(f"{path} holds no text that fits its letters; expected an index that fewer wrote: index the text again")
        index = cls.__new__(cls)
        index.kind, index._tensor = KINDS[int(read["kind"])], bool(read["tensor"])
        index._set(np.append(letters, [0, *(wild if len(wild) else [0])])[codes], int(wild[0]) if len(wild) else None)
        return index


def nearest_windows(distances: np.ndarray, top: int, exclusion: int = 0) -> list[tuple[int, int]]:
    """(position, distance) of the smallest distances, each farther than `exclusion` from those before it.

    >>> nearest_windows(np.array([3, 0, 1, 2]), top=2, exclusion=1)
    [(1, 0), (3, 2)]
    """
    if not exclusion and top < len(distances):
        bound = np.partition(distances, top - 1)[top - 1]
        order = np.flatnonzero(distances <= bound)
        order = order[np.argsort(distances[order], kind="stable")]
    else:
        order = np.argsort(distances, kind="stable")
    taken: list[int] = []
    free = np.ones(len(distances), dtype=bool)
    for i in order:
        if len(taken) == top:
            break
        if free[i]:
            taken.append(int(i))
            if exclusion:
                free[max(0, i - exclusion) : i + exclusion + 1] = False
    return [(i, int(distances[i])) for i in taken]
