"""The exact distances: the text in overlapping pieces, the matches of all letters added up in each, and a check of the sum that is free.

A piece has O(m) letters, overlaps the next by m - 1, and is counted in the cache; pieces run in threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fewer.devices import one_thread
from fewer.signals.hamming_distances.counting import kernels
from fewer.signals.hamming_distances.counting.costs import GROUP, WAYS, Constants, Plan, choose
from fewer.signals.hamming_distances.counting.letters import Pair
from fewer.signals.hamming_distances.counting.spectra import Rounded, Transforms, bit_vectors, precisions

PIECE = 1 << 19  # windows of a piece at least
SHORT = 0.02  # seconds of work that threads do not pay for
CHECKED = 8  # windows counted directly, whatever the way
KEPT = 1 << 29  # bytes of bit vectors and spectra that an index keeps at most


@dataclass
class Kept:
    """What an index keeps of a text: bit vectors and spectra, by piece, letter and size."""

    vectors: dict[Any, np.ndarray] = field(default_factory=dict)
    spectra: dict[Any, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(each.nbytes for each in (*self.vectors.values(), *self.spectra.values()))

    def of_piece(self, low: int, high: int) -> dict[Any, Any] | None:
        """The spectra of a piece; None where there is no more room."""
        return self.spectra.setdefault((low, high), _Spectra()) if self.bytes < KEPT else self.spectra.get((low, high))


class _Spectra(dict[Any, Any]):
    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in list(self.values()))  # other pieces' threads add to theirs meanwhile


def choose_threads(threads: int | None, work: float) -> int:
    """The threads that are asked for; by default those of the machine, one where the work is short."""
    if threads is not None:
        return threads
    all_of_them = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return all_of_them if work > SHORT else 1


def in_pieces(windows: int, m: int, work: Callable[[int, int], Any], threads: int) -> list[Any]:
    """`work(low, high)` on windows low..high-1 of every piece; the pieces are the same for any number of threads."""
    size = max(PIECE, 8 * m)
    cuts = [(low, min(low + size, windows)) for low in range(0, windows, size)]
    if threads == 1 or len(cuts) == 1:
        return [work(*cut) for cut in cuts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda cut: work(*cut), cuts))


def count_matches(pair: Pair, plan: Plan, threads: int = 1, kept: Kept | None = None) -> tuple[np.ndarray, float]:
    """M[i] = #{j : T[i + j] = P[j]} of letters of the alphabet, int32 [n - m + 1], and the worst rounding of the transforms.

    Raises:
        RuntimeError: the counts do not add up (a fault of this machine or of ours).
    """
    m, out = len(pair.pattern), np.zeros(pair.windows, dtype=np.int32)
    of = {way: np.flatnonzero((plan.ways == number) & (pair.in_pattern > 0) & (pair.in_text > 0)) for number, way in enumerate(WAYS)}
    first, positions = _positions(pair, of["pairs"])
    groups = [(letters, *_rows(pair, letters)) for letters in np.split(of["bits"], range(GROUP, len(of["bits"]), GROUP)) if len(letters)]
    shares = pair.in_text / len(pair.text)
    comparable = np.where(pair.pattern < pair.letters, pair.pattern, pair.nowhere).astype(pair.text.dtype)

    def piece(low: int, high: int) -> float:
        text, counts = pair.text[low : high + m - 1], out[low:high]
        if len(of["direct"]):
            kernels.add_direct(text, comparable, counts)
        if len(of["pairs"]):
            kernels.add_pairs(text.astype(np.int32), first, positions, m, counts)
        for letters, rows, shifts in groups:
            kernels.add_bits(_vectors(text, letters, m, (low, high), kept), rows, shifts, counts)
        if not len(of["fft"]):
            return 0.0
        for double in precisions(m):
            try:
                transforms, part = Transforms(text, m, double, shares), np.zeros_like(counts)
                worst = transforms.add_matches(pair.pattern, of["fft"], part, kept.of_piece(low, high) if kept else None)
            except Rounded:
                continue
            counts += part
            return worst
        raise RuntimeError(f"float64 transforms of {m:,} letters do not round to whole numbers; count by bits or pairs (method=...)")

    with one_thread():
        worst = max(in_pieces(pair.windows, m, piece, threads), default=0.0)
    check(pair, out)
    return out, worst


def check(pair: Pair, matches: np.ndarray) -> None:
    """RuntimeError unless all shifts together have sum_c a_c b_c matches, less those that hang over, and some windows are right."""
    m = len(pair.pattern)
    head, tail, pattern = (codes.astype(np.int32) for codes in (pair.text[: m - 1], pair.text[pair.windows :], pair.pattern))
    expected = int(pair.in_text @ pair.in_pattern) - kernels.pairs_outside(head, tail, pattern, pair.letters)
    right = int(matches.sum(dtype=np.int64)) == expected
    for i in np.random.default_rng(0).integers(pair.windows, size=CHECKED):
        window = pair.text[i : i + m]
        right &= int(np.count_nonzero((window == pair.pattern) & (window < pair.letters))) == matches[i]
    if not right:
        raise RuntimeError(
            f"the matches of {pair.windows:,} windows do not add up to {expected:,}; expected every count exact: this is a fault of fewer or "
            "of this machine, report it"
        )


def exact(
    pair: Pair, constants: Constants, method: str = "auto", threads: int | None = None, kept: Kept | None = None
) -> tuple[np.ndarray, Plan]:
    """Distances int32 [n - m + 1] with wildcards, and the plan with what it took."""
    start, m = time.perf_counter(), len(pair.pattern)
    plan = choose(pair.in_text, pair.in_pattern, len(pair.text), m, constants, method, bool(kept))
    matches, worst = count_matches(pair, plan, choose_threads(threads, plan.predicted_seconds), kept)
    distances = np.subtract(m, matches, out=matches)
    if pair.has_wildcards:
        distances -= _excused(pair, constants)
    return distances, replace(plan, measured_seconds=time.perf_counter() - start, rounding=worst)


def _excused(pair: Pair, constants: Constants) -> np.ndarray:
    """Positions of each window at which text or pattern is wild: one count each, and one correlation of both, which count twice."""
    in_text, in_pattern, m = pair.text == pair.wild, pair.pattern == pair.wild, len(pair.pattern)
    cumulated = np.concatenate([[0], np.cumsum(in_text)])
    excused = (cumulated[m:] - cumulated[: pair.windows] + np.count_nonzero(in_pattern)).astype(np.int32)
    if in_text.any() and in_pattern.any():
        masks = Pair(  # the letter 0 is "wild"
            (~in_text).astype(np.uint8), (~in_pattern).astype(np.uint8), 1, np.array([np.count_nonzero(in_text)])
        )
        plan = choose(masks.in_text, masks.in_pattern, len(pair.text), m, constants)
        excused -= count_matches(masks, plan)[0]
    return excused


def _positions(pair: Pair, letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pattern's positions sorted by letter, and where each letter's begin: those of other letters are left out."""
    wanted = np.zeros(pair.letters + 2, dtype=bool)
    wanted[letters] = True
    places = np.flatnonzero(wanted[pair.pattern])
    sizes = np.append(pair.in_pattern, [0, 0]) * wanted
    return np.concatenate([[0], np.cumsum(sizes)]), places[np.argsort(pair.pattern[places], kind="stable")]


def _rows(pair: Pair, letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bit vector and the shift of each position of the pattern, filled up to whole eights with the empty vector."""
    row_of = np.full(pair.letters + 2, -1)
    row_of[letters] = np.arange(len(letters))
    rows = row_of[pair.pattern]
    shifts = np.flatnonzero(rows >= 0)
    fill = -len(shifts) % 8
    return np.concatenate([rows[shifts], np.full(fill, len(letters))]), np.concatenate([shifts, np.zeros(fill, dtype=np.int64)])


def _vectors(text: np.ndarray, letters: np.ndarray, m: int, piece: tuple[int, int], kept: Kept | None) -> np.ndarray:
    if kept is None:
        return bit_vectors(text, letters, m)
    key = (*piece, m // 64, letters.tobytes())
    if key not in kept.vectors and kept.bytes < KEPT:
        kept.vectors[key] = bit_vectors(text, letters, m)
    return kept.vectors[key] if key in kept.vectors else bit_vectors(text, letters, m)
