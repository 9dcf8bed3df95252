"""The matrices M_c that hash coefficients into bins: full column rank over GF(2), random or disjoint blocks of coordinates."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fewer.signals.spright.bins.bits import Bits, Words, pack

Hashing = Literal["random", "partition"]


def add_columns(columns: Bits, b: int, rng: np.random.Generator) -> Bits:
    """Columns of M [b', n] (M transposed: one row a column) with random ones appended until there are b, all independent over GF(2).

    >>> rank(add_columns(np.zeros((0, 6), dtype=np.uint8), 6, np.random.default_rng(0)))
    6
    """
    while len(columns) < b:  # random columns are independent more often than not
        grown = np.vstack([columns, rng.integers(0, 2, size=(b - len(columns), columns.shape[1]), dtype=np.uint8)])
        if rank(grown) == len(grown):
            return grown
    return columns


def partition_columns(group: int, groups: int, b: int, n: int) -> Bits:
    """The columns e_i of b coordinates that are the group's alone (the paper's choice): every `groups`-th, so that more append to fewer.

    >>> partition_columns(1, 2, 2, 5)
    array([[0, 1, 0, 0, 0],
           [0, 0, 0, 1, 0]], dtype=uint8)
    """
    return np.eye(n, dtype=np.uint8)[group::groups][:b]


def rank(rows: Bits) -> int:
    """The rank over GF(2).

    >>> rank(np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=np.uint8))
    2
    """
    return len(echelon(rows))


def echelon(rows: Bits) -> list[tuple[int, int]]:
    """A basis of the span, as (vector, leading bit) of whole numbers; no vector holds another's leading bit above its own."""
    basis: list[tuple[int, int]] = []
    for row in rows:
        vector = int.from_bytes(np.packbits(row).tobytes(), "big")
        for other, leading in basis:
            if vector & leading:
                vector ^= other
        if vector:
            basis.append((vector, 1 << (vector.bit_length() - 1)))
    return basis


def distinct_offsets(columns: Bits, offsets: Bits) -> int:
    """How many offsets are distinct modulo the span of M's columns: two that are not see the same samples in another order.

    >>> distinct_offsets(np.eye(3, dtype=np.uint8)[:1], np.eye(3, dtype=np.uint8))
    3
    >>> distinct_offsets(np.eye(3, dtype=np.uint8), np.eye(3, dtype=np.uint8))
    1
    """
    left = offsets.copy()
    basis = columns.copy()
    for i in range(len(basis)):
        lead = int(basis[i].argmax())
        others = basis[:, lead].astype(bool)
        others[i] = False
        basis[others] ^= basis[i]
        left[left[:, lead].astype(bool)] ^= basis[i]
    return len(np.unique(pack(left), axis=0))


def span(columns: Words) -> Words:
    """M l for every l in {0,1}^b [2^b, W]; bit i of the row number is l_i.

    >>> span(np.array([[1], [2]], dtype=np.uint64)).ravel()
    array([0, 1, 2, 3], dtype=uint64)
    """
    points = np.zeros((1, columns.shape[1]), dtype=np.uint64)
    for column in columns:
        points = np.concatenate([points, points ^ column])
    return points
