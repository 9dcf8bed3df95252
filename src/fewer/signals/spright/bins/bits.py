"""Bit vectors and how they are held: as uint8 arrays [rows, n], or packed into words of 64 bits [rows, W], so that n knows no limit.

The first bit of a vector is the highest bit of its first word; read as a binary number, first bit first, a vector is its index.
"""

from __future__ import annotations

import numba
import numpy as np
from jaxtyping import Float64, UInt8, UInt64

Bits = UInt8[np.ndarray, "rows n"]
Words = UInt64[np.ndarray, "rows words"]


def pack(bits: Bits) -> Words:
    """Bit vectors [rows, n] as words [rows, ceil(n / 64)].

    >>> pack(np.array([[1, 0, 1]], dtype=np.uint8)) >> np.uint64(61)
    array([[5]], dtype=uint64)
    """
    words = np.zeros((bits.shape[0], max(1, -(-bits.shape[1] // 64))), dtype=np.uint64)
    _pack(bits, words)
    return words


@numba.njit(cache=True)
def _pack(bits: Bits, words: Words) -> None:  # pragma: no cover - compiled
    """numpy.packbits along rows whose length is no multiple of 8 takes three times as long."""
    for row in range(bits.shape[0]):
        for word in range(words.shape[1]):
            start = 64 * word
            end = min(start + 64, bits.shape[1])
            held = np.uint64(0)
            for i in range(start, end):
                held = (held << np.uint64(1)) | np.uint64(bits[row, i])
            words[row, word] = held << np.uint64(start + 64 - end)


def unpack(words: Words, n: int) -> Bits:
    """The inverse of `pack`.

    >>> unpack(pack(np.array([[1, 0, 1]], dtype=np.uint8)), 3)
    array([[1, 0, 1]], dtype=uint8)
    """
    return np.unpackbits(words.astype(">u8").view(np.uint8), axis=1, count=n)


@numba.njit(cache=True)
def parity(a: np.ndarray, b: np.ndarray) -> int:  # pragma: no cover - compiled
    """<a, b> mod 2 of two packed vectors."""
    folded = a[0] & b[0]
    for word in range(1, a.size):
        folded ^= a[word] & b[word]
    folded ^= folded >> np.uint64(32)
    folded ^= folded >> np.uint64(16)
    folded ^= folded >> np.uint64(8)
    folded ^= folded >> np.uint64(4)
    return (np.uint64(0x6996) >> (folded & np.uint64(15))) & np.uint64(1)  # pyright: ignore[reportReturnType]


@numba.njit(cache=True)
def signs(left: Words, right: Words) -> Float64[np.ndarray, "left right"]:  # pragma: no cover - compiled
    """(-1)^<l, r> for every pair of rows."""
    out = np.empty((left.shape[0], right.shape[0]))
    for i in range(left.shape[0]):
        for j in range(right.shape[0]):
            out[i, j] = 1.0 - 2.0 * parity(left[i], right[j])
    return out


@numba.njit(cache=True)
def sum_of_parities(points: Words, indices: Words, values: np.ndarray) -> np.ndarray:  # pragma: no cover - compiled
    """sum_k values[k] (-1)^<k,m> at every point m, without a matrix of all pairs."""
    out = np.empty(points.shape[0])
    for q in range(points.shape[0]):
        total = 0.0
        for k in range(indices.shape[0]):
            total += -values[k] if parity(points[q], indices[k]) else values[k]
        out[q] = total
    return out


@numba.njit(cache=True)
def find(table: np.ndarray, keys: Words, rows: Words, row: int) -> int:  # pragma: no cover - compiled
    """The slot of rows[row] in an open-addressing table of places among the keys (-1: empty): its own, or the empty one where it belongs.

    The first word stands outside the loops: most vectors have no other, and a loop over one word takes ten times as long.
    """
    first, more = rows[row, 0], rows.shape[1] > 1
    mixed = (first ^ (first >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing
    if more:
        for word in range(1, rows.shape[1]):
            mixed ^= rows[row, word] ^ (mixed >> np.uint64(29))
            mixed *= np.uint64(0x9E3779B97F4A7C15)
    mask = np.int64(table.size - 1)
    slot = np.int64(mixed >> np.uint64(32)) & mask
    place = table[slot]
    while place >= 0 and (keys[place, 0] != first or (more and not _same(keys, place, rows, row))):
        slot = (slot + 1) & mask
        place = table[slot]
    return slot  # pyright: ignore[reportReturnType]


@numba.njit(cache=True)
def _same(keys: Words, place: int, rows: Words, row: int) -> bool:  # pragma: no cover - compiled
    """Whether all words are equal."""
    same = True
    for word in range(rows.shape[1]):
        same &= keys[place, word] == rows[row, word]
    return same


@numba.njit(cache=True)
def enter(table: np.ndarray, keys: Words, known: int, rows: Words, numbers: np.ndarray) -> int:  # pragma: no cover - compiled
    """Enter rows among the `known` keys: numbers[i] becomes row i's place; new ones are appended to keys. Returns how many are known then."""
    for i in range(rows.shape[0]):
        slot = find(table, keys, rows, i)
        place = table[slot]
        if place < 0:
            place = known
            table[slot] = known
            keys[known, 0] = rows[i, 0]
            for word in range(1, rows.shape[1]):
                keys[known, word] = rows[i, word]
            known += 1
        numbers[i] = place
    return known
