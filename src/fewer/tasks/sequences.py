"""Sequences of letters as tensors, their families, and how they are compared: what tasks on DNA and proteins share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

ALPHABETS = {"dna": "ACGT", "protein": "ACDEFGHIKLMNPQRSTVWY"}


def encoded(sequences: Sequence[str], letters: str, length: int | None = None) -> tuple[Int[Tensor, "N L"], Tensor]:
    """(tokens, mask of real positions), padded to the longest or to `length`."""
    length = length or max(map(len, sequences))
    tokens, place = torch.zeros(len(sequences), length, dtype=torch.long), {letter: i for i, letter in enumerate(letters)}
    mask = torch.arange(length) < torch.tensor([len(each) for each in sequences])[:, None]
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor([place[letter] for letter in sequence])
    return tokens, mask


def decoded(tokens: Int[Tensor, "N L"], mask: Tensor, letters: str) -> list[str]:
    return ["".join(letters[i] for i in row[real].tolist()) for row, real in zip(tokens, mask, strict=True)]


def one_hots(tokens: Int[Tensor, "N L"], mask: Tensor, num_classes: int) -> Float[Tensor, "N L K"]:
    return F.one_hot(tokens, num_classes).float() * mask[..., None]


def families(sequences: Sequence[str], identity: float = 0.8) -> np.ndarray:
    """A number a sequence, the same for those that a chain of more than `identity` joins (1 - edit distance / longer length)."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import CountVectorizer

    words: Any = CountVectorizer(analyzer="char", ngram_range=(2, 2), lowercase=False).fit_transform(sequences)
    lengths = np.array([len(each) for each in sequences])
    shared = coo_matrix(np.triu((words @ words.T).toarray(), 1))
    longer = np.maximum(lengths[shared.row], lengths[shared.col])
    near = shared.data >= longer - 1 - 2 * (1 - identity) * longer  # an edit takes two pairs of letters away at most
    first, second, longer = shared.row[near], shared.col[near], longer[near]
    left, right = ([str(sequences[i]) for i in side.tolist()] for side in (first, second))
    alike = edit_distances(left, right) < (1 - identity) * longer
    joined = coo_matrix((np.ones(alike.sum()), (first[alike], second[alike])), shape=(len(sequences),) * 2)
    return connected_components(joined, directed=False)[1]


def edit_distances(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    """Levenshtein's, of many pairs at once.

    >>> edit_distances(["KITTEN", "A"], ["SITTING", "A"]).tolist()
    [3, 0]
    """
    if not a:
        return np.zeros(0, dtype=np.int64)
    (left, right), lengths = (_codes(side) for side in (a, b)), np.array([[len(x), len(y)] for x, y in zip(a, b, strict=True)])
    row = np.tile(np.arange(right.shape[1] + 1), (len(a), 1))
    result = np.where(lengths[:, 0] == 0, lengths[:, 1], 0)
    for i in range(left.shape[1]):
        previous, row = row, np.empty_like(row)
        row[:, 0] = i + 1
        for j in range(right.shape[1]):
            replaced = previous[:, j] + (left[:, i] != right[:, j])
            row[:, j + 1] = np.minimum(np.minimum(row[:, j], previous[:, j + 1]) + 1, replaced)
        done = lengths[:, 0] == i + 1
        result[done] = row[done, lengths[done, 1]]
    return result


def _codes(side: Sequence[str]) -> np.ndarray:
    codes = np.zeros((len(side), max(map(len, side))), dtype=np.int64)
    for i, each in enumerate(side):
        codes[i, : len(each)] = [ord(letter) for letter in each]
    return codes


def composition(sequences: Sequence[str], letters: str) -> np.ndarray:
    """Shares of the letters in each sequence, [N, K]."""
    return np.array([[sequence.count(letter) / len(sequence) for letter in letters] for sequence in sequences])


def entropy(sequences: Sequence[str], letters: str) -> float:
    """Of all letters together, in bits."""
    shares = np.array([sum(sequence.count(letter) for sequence in sequences) for letter in letters], dtype=float)
    shares = shares[shares > 0] / shares.sum()
    return float(-(shares * np.log2(shares)).sum())


def word_divergence(a: Int[Tensor, "N L"], b: Int[Tensor, "M L"], word: int, num_classes: int = 4) -> float:
    """Jensen-Shannon distance (root of the divergence in bits) of the counts of words of so many letters."""
    from scipy.spatial.distance import jensenshannon

    place = num_classes ** torch.arange(word - 1, -1, -1)
    counts = [torch.bincount((each.unfold(1, word, 1) * place).sum(-1).flatten(), minlength=num_classes**word).numpy() for each in (a, b)]
    return float(jensenshannon(*counts, base=2))
