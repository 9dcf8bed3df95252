"""The offsets d_p of each design, and which of them vote on what."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from fewer.signals.spright.bins.bits import Bits, Words, pack, signs
from fewer.signals.spright.bins.code import generator_matrix
from fewer.signals.spright.bins.hashing import add_columns

Design = Literal["so", "nso", "none"]
FLIPS, CODE, LIST = 0, 1, 2  # how a bin is read: by pairs of offsets, by a code, by trying a list of candidates
NOISELESS_OFFSETS = (
    28  # at least: three equal coefficients look like one at an offset with probability 3/4, at all with 3e-4 (not in the paper)
)
SHORT_LIST = 43_745  # candidates of weight <= 3 among 64 variables


@dataclass(frozen=True)
class Offsets:
    """A design's offsets, all distinct, the same for every group.

    Attributes:
        points: the offsets [P, n].
        reading: FLIPS, CODE or LIST.
        votes: FLIPS: the places among the offsets of d_p and of d_p + e_1 ... d_p + e_n [P_1, n + 1]; CODE: of the code's rows
            [1, rate (n + 6)], -1 where a row is a repeated one.
        rate: outputs of the code a step.
        candidates: LIST: the vectors tried, packed [L, W].
        candidate_signs: LIST: their signatures (-1)^<d_p, k> [L, P].
        spread: FLIPS, CODE: what each bit that is read adds to the index, packed [n, W]; the unit vectors, except where flips are random.
    """

    points: Bits
    reading: int
    votes: Int64[np.ndarray, "rows voters"]
    rate: int
    candidates: Words
    candidate_signs: Float64[np.ndarray, "candidates offsets"]
    spread: Words

    @property
    def words(self) -> Words:
        return pack(self.points)


def choose_offsets(n: int, design: Design, max_degree: int | None, rng: np.random.Generator, rate: int = 2) -> Offsets:
    """The offsets of a design for n variables.

    "none": d, d + r_1 ... d + r_n with random independent r_i, and where these are fewer than 28 random ones that do not vote. The r_i take
    the place of the paper's e_i, so that each offset verifies as well as it votes: unit vectors tell equal coefficients of few ones apart
    only with further offsets (not in the paper). "nso": P_1 random d_p, and d_p + e_i for all i. "so": the rows of the
    code, shifted by a common random vector, and P_1 random ones that do not vote; P_1 = max(8, n / 2). With `max_degree` (designs for
    noise): about 2 t log2(n / t) random ones, where the list of candidates is short.

    >>> offsets = choose_offsets(20, "so", None, np.random.default_rng(0))
    >>> offsets.points.shape, offsets.votes.shape
    ((60, 20), (1, 52))
    """
    checks = max(8, math.ceil(n / 2))
    if max_degree is not None and design != "none" and (count := candidate_count(n, max_degree)) <= SHORT_LIST:
        ratio = max(2.0, n / max(max_degree, 1))
        points = distinct([], rng, max(8, math.ceil(2 * max(max_degree, 1) * math.log2(ratio))), n)
        candidates = candidate_words(n, max_degree, count)
        return Offsets(points, LIST, np.zeros((0, 0), dtype=np.int64), 0, candidates, signs(candidates, pack(points)), candidates[:0])
    if design == "so":
        code = generator_matrix(n, rate) ^ rng.integers(0, 2, size=(1, n), dtype=np.uint8)
        points = distinct(code, rng, checks, n)
        votes, seen = places(code, points)[None], set()
        for place, vote in enumerate(votes[0].tolist()):  # the code's first and last outputs repeat: a repeated sample brings nothing
            if vote in seen:
                votes[0, place] = -1
            seen.add(vote)
        return Offsets(points, CODE, votes, rate, *_no_candidates(len(points), n), pack(np.eye(n, dtype=np.uint8)))
    if design == "none":
        bases, (flips, inverse) = rng.integers(0, 2, size=(1, n), dtype=np.uint8), random_basis(n, rng)
    else:
        bases, flips, inverse = distinct([], rng, checks, n), np.eye(n, dtype=np.uint8), np.eye(n, dtype=np.uint8)
    pairs = (bases[:, None] ^ np.concatenate([np.zeros((1, n), dtype=np.uint8), flips])).reshape(-1, n)
    points = distinct(pairs, rng, max(0, NOISELESS_OFFSETS - len(pairs)) if design == "none" else 0, n)
    votes = places(pairs, points).reshape(len(bases), n + 1)
    return Offsets(points, FLIPS, votes, 0, *_no_candidates(len(points), n), pack(inverse))


def random_basis(n: int, rng: np.random.Generator) -> tuple[Bits, Bits]:
    """Random independent r_1 ... r_n [n, n], and what <r_i, k> = 1 adds to k, for each i: the columns of the inverse.

    >>> flips, inverse = random_basis(5, np.random.default_rng(0))
    >>> ((flips.astype(int) @ inverse.T) % 2 == np.eye(5)).all()
    np.True_
    """
    flips = add_columns(np.zeros((0, n), dtype=np.uint8), n, rng)
    both = np.concatenate([flips, np.eye(n, dtype=np.uint8)], axis=1)
    for i in range(n):  # Gauss and Jordan over GF(2)
        pivot = i + int(both[i:, i].argmax())
        both[[i, pivot]] = both[[pivot, i]]
        others = both[:, i].astype(bool)
        others[i] = False
        both[others] ^= both[i]
    return flips, both[:, n:].T.copy()


def candidate_count(n: int, max_degree: int) -> int:
    """Vectors of at most `max_degree` ones among n."""
    return sum(math.comb(n, weight) for weight in range(min(max_degree, n) + 1))


def candidate_words(n: int, max_degree: int, count: int) -> Words:
    """All vectors of at most `max_degree` ones, packed.

    >>> len(candidate_words(5, 2, candidate_count(5, 2)))
    16
    """
    bits = np.zeros((count, n), dtype=np.uint8)
    subsets = itertools.chain.from_iterable(itertools.combinations(range(n), weight) for weight in range(min(max_degree, n) + 1))
    for row, subset in zip(bits, subsets, strict=True):
        row[list(subset)] = 1
    return pack(bits)


def distinct(first: Iterable[np.ndarray], rng: np.random.Generator, more: int, n: int) -> Bits:
    """The distinct rows of `first` in their order, then as many random ones that differ from them and each other (all where 2^n are few)."""
    kept = {row.tobytes(): row for row in first}
    wanted = min(len(kept) + more, 2**n)
    while len(kept) < wanted:
        for row in rng.integers(0, 2, size=(wanted - len(kept), n), dtype=np.uint8):
            kept.setdefault(row.tobytes(), row)
    return np.stack(list(kept.values()))


def places(rows: Bits, points: Bits) -> Int64[np.ndarray, "rows"]:
    """Where each row stands among the points."""
    where = {point.tobytes(): place for place, point in enumerate(points)}
    return np.array([where[row.tobytes()] for row in rows], dtype=np.int64)


def _no_candidates(offsets: int, n: int) -> tuple[Words, Float64[np.ndarray, "candidates offsets"]]:
    return np.zeros((0, max(1, -(-n // 64))), dtype=np.uint64), np.zeros((0, offsets))
