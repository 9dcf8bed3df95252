"""Is this passage in the training data, a few words changed? As a scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from fewer.signals.hamming_distances.counting.letters import check_kinds, read_letters
from fewer.signals.hamming_distances.text_index import TextIndex


class Corpus:
    """Several sequences end to end, indexed as one text.

    Attributes:
        index: the `TextIndex`.
        starts: where each sequence begins, and the end.
    """

    def __init__(self, sequences: Sequence[Any], wildcard: Any = None) -> None:
        parts, kinds = zip(*(read_letters(each, f"sequence {number}") for number, each in enumerate(sequences)), strict=True)
        for number, kind in enumerate(kinds):
            check_kinds(kinds[0], kind)
            if parts[number].ndim != 1:
                raise ValueError(f"sequence {number} has shape {parts[number].shape}; expected one dimension: one sequence an entry")
        self.kind = kinds[0]
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        letters = np.concatenate(parts)
        text: Any = letters
        if self.kind == "str":
            text = letters.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
        elif self.kind == "bytes":
            text = letters.tobytes()
        self.index = TextIndex(text, wildcard)

    def inside(self, m: int) -> np.ndarray:
        """Whether each window of m letters lies within one sequence."""
        windows = np.arange(len(self.index) - m + 1)
        return windows + m <= self.starts[np.searchsorted(self.starts, windows, side="right")]

    def place(self, position: int) -> tuple[int, int]:
        """(sequence, position in it) of a window."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        return number, int(position - self.starts[number])


class SequenceContamination(BaseEstimator):
    """How near each test passage comes to any place of the training sequences.

    Args:
        wildcard: a letter that matches everything, or None.
        threads: as in `hamming_distances`.

    Attributes:
        corpus_: the indexed training sequences.

    Examples:
        >>> fitted = SequenceContamination().fit(["the cat sat on the mat", "a dog"])
        >>> score, where = fitted.score_samples(["bat sat"])
        >>> score.round(3).tolist(), where.tolist()
        ([0.143], [[0, 4]])
    """

    def __init__(self, *, wildcard: Any = None, threads: int | None = None) -> None:
        self.wildcard, self.threads = wildcard, threads

    def fit(self, train_sequences: Sequence[Any], y: Any = None) -> Self:
        """Index the sequences: str, bytes, or integer arrays such as token ids, all of one type.

        Raises:
            ValueError: none is given, or they are of different types.
        """
        if isinstance(train_sequences, str | bytes) or len(train_sequences) == 0:
            raise ValueError(
                f"train_sequences is {type(train_sequences).__name__} of length {len(train_sequences)}; expected a list of sequences"
            )
        self.corpus_ = Corpus(train_sequences, self.wildcard)
        return self

    def score_samples(self, test_sequences: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The smallest share of letters that differ, float64 [q], and where: (sequence, position) int64 [q, 2].

        Raises:
            ValueError: a passage is longer than every training sequence.
        """
        check_is_fitted(self, "corpus_")
        if isinstance(test_sequences, str | bytes):
            raise ValueError(f"test_sequences is {type(test_sequences).__name__}; expected a list of sequences: wrap it in one")
        scores, places = np.zeros(len(test_sequences)), np.zeros((len(test_sequences), 2), dtype=np.int64)
        for q, passage in enumerate(test_sequences):
            length, longest = len(passage), int(np.diff(self.corpus_.starts).max())
            if length > longest:
                raise ValueError(f"test sequence {q} has {length} letters; expected at most {longest}, the longest of training: cut it")
            found = self.corpus_.index.distances(passage, threads=self.threads)
            found = np.where(self.corpus_.inside(length), np.asarray(found), length + 1)
            best = int(found.argmin())
            scores[q], places[q] = found[best] / length, self.corpus_.place(best)
        return scores, places
