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
    """The slot of rows[row] in an open-addressing table of places among the keys (-1: empty): its own, or the empty one where it belongs."""
    mixed = np.uint64(0x9E3779B97F4A7C15)  # the finaliser of MurmurHash3, word by word
    for word in range(rows.shape[1]):
        mixed ^= rows[row, word]
        mixed ^= mixed >> np.uint64(33)
        mixed *= np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(33)
    mask = np.uint64(table.size - 1)
    slot = mixed & mask
    while table[slot] >= 0:
        place, same = table[slot], True
        for word in range(rows.shape[1]):
            if keys[place, word] != rows[row, word]:
                same = False
                break
        if same:
            break
        slot = (slot + np.uint64(1)) & mask
    return slot  # pyright: ignore[reportReturnType]


@numba.njit(cache=True)
def enter(table: np.ndarray, keys: Words, known: int, rows: Words, numbers: np.ndarray) -> int:  # pragma: no cover - compiled
    """Enter rows among the `known` keys: numbers[i] becomes row i's place; new ones are appended to keys. Returns how many are known then."""
    for i in range(rows.shape[0]):
        slot = find(table, keys, rows, i)
        if table[slot] < 0:
            table[slot] = known
            for word in range(rows.shape[1]):
                keys[known, word] = rows[i, word]
            known += 1
        numbers[i] = table[slot]
    return known
