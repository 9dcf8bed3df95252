"""Bin detection and peeling: find the bins that hold one coefficient, subtract it wherever it hashes to, until nothing changes."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from jaxtyping import Float64, Int64

from fewer.signals.spright.bins.bits import Words, find, parity
from fewer.signals.spright.bins.code import OUTPUTS, viterbi
from fewer.signals.spright.bins.offsets import CODE, FLIPS, LIST, Offsets

ZERO, SINGLE, MULTI = 0, 1, 2  # a bin with nothing left, with one coefficient, with more
RELATIVE = 1e-9  # by how much a noiseless single-ton's magnitudes may differ
PEELS_A_BIN = 8  # peeling ends by itself, except where noise lets two wrong readings undo each other for ever


class Limits(NamedTuple):
    """What a bin is held against.

    Attributes:
        noiseless: compare magnitudes instead of energies.
        floor: the magnitude of rounding, below which a bin without noise is empty.
        energy: noisy: (1 + gamma) nu^2 of each group [C].
        magnitude: noisy: rho_min of each group [C].
        max_degree: ones that an index may have.
    """

    noiseless: bool
    floor: float
    energy: Float64[np.ndarray, "groups"]
    magnitude: Float64[np.ndarray, "groups"]
    max_degree: int


class Reading(NamedTuple):
    """How a bin is read: the fields of `Offsets`, the code's outputs, and the candidates of each bin.

    Attributes:
        offsets: packed [P, W].
        kind: FLIPS, CODE or LIST.
        votes, rate, candidates, candidate_signs, spread: as in `Offsets`.
        outputs: of the code, for every content of its register.
        order: the candidates sorted by the bin they fall into, for each group [C, L].
        starts: where each bin's begin [C, B + 1].
    """

    offsets: np.ndarray
    kind: int
    votes: np.ndarray
    rate: int
    outputs: np.ndarray
    candidates: np.ndarray
    candidate_signs: np.ndarray
    spread: np.ndarray
    order: np.ndarray
    starts: np.ndarray


class Found(NamedTuple):
    """What peeling fills: coefficients, packed, with their values; a table of their places; the state of each bin."""

    indices: np.ndarray
    values: np.ndarray
    table: np.ndarray
    state: np.ndarray


class Peeled(NamedTuple):
    """What peeling left.

    Attributes:
        indices: the coefficients found, packed [K, W].
        values: their values [K].
        state: ZERO or MULTI for each bin [C, B].
    """

    indices: Words
    values: Float64[np.ndarray, "coefficients"]
    state: np.ndarray


def peel(bins: Float64[np.ndarray, "groups bins offsets"], columns: Words, offsets: Offsets, n: int, limits: Limits) -> Peeled:
    """Peel the bins U [C, B, P], which are left with what was not found.

    Args:
        bins: U, changed in place.
        columns: of every M_c, packed [C, b, W].
        offsets: the design's.
        n: variables.
        limits: what tells a zero-ton, a single-ton and a multi-ton apart.
    """
    groups, width = bins.shape[:2]
    order, starts = _cosets(columns, offsets.candidates, width)
    o = offsets
    reading = Reading(o.words, o.reading, o.votes, o.rate, OUTPUTS, o.candidates, o.candidate_signs, o.spread, order, starts)
    room = PEELS_A_BIN * groups * width + 16
    found = Found(
        np.empty((room, columns.shape[2]), dtype=np.uint64),
        np.zeros(room),
        np.full(1 << (2 * room).bit_length(), -1, dtype=np.int32),
        np.full((groups, width), MULTI, dtype=np.uint8),
    )
    count = _peel(bins, columns, n, reading, limits, found)
    return Peeled(found.indices[:count], found.values[:count], found.state)


def _cosets(columns: Words, candidates: Words, width: int) -> tuple[Int64[np.ndarray, "groups l"], Int64[np.ndarray, "groups bins"]]:
    """The candidates sorted by the bin they fall into, and where each bin's begin [C, B + 1]."""
    groups = len(columns)
    hashed = np.stack([hash_all(columns[c], candidates) for c in range(groups)])
    starts = np.stack([np.searchsorted(np.sort(hashed[c]), np.arange(width + 1)) for c in range(groups)])
    return np.argsort(hashed, axis=1, kind="stable"), starts


@numba.njit(cache=True)
def hash_all(columns: Words, indices: Words) -> Int64[np.ndarray, "indices"]:  # pragma: no cover - compiled
    """The bin M^T k of each index."""
    out = np.empty(indices.shape[0], dtype=np.int64)
    for k in range(indices.shape[0]):
        out[k] = _bin(columns, indices[k])
    return out


@numba.njit(cache=True)
def _bin(columns: np.ndarray, index: np.ndarray) -> int:  # pragma: no cover - compiled
    j = 0
    for i in range(columns.shape[0]):
        j |= np.int64(parity(columns[i], index)) << i
    return j  # pyright: ignore[reportReturnType]


@numba.njit(cache=True)
def _vote(u: np.ndarray, votes: np.ndarray, bits: np.ndarray) -> None:  # pragma: no cover - compiled
    """Bit i from the soft vote of the pairs: sum_p U[d_p] U[d_p + e_i] < 0."""
    for i in range(bits.size):
        total = 0.0
        for row in range(votes.shape[0]):
            total += u[votes[row, 0]] * u[votes[row, i + 1]]
        bits[i] = total < 0


@numba.njit(cache=True)
def _decode(u: np.ndarray, votes: np.ndarray, rate: int, outputs: np.ndarray, bits: np.ndarray) -> None:  # pragma: no cover - compiled
    """The message that fits the signs up to one global sign: both are tried, the better metric wins."""
    n = bits.size
    received = np.zeros(votes.shape[1])
    for place in range(votes.shape[1]):
        if votes[0, place] >= 0:
            received[place] = u[votes[0, place]]
    other = np.empty_like(bits)
    straight = viterbi(received, n, rate, outputs, bits)
    if viterbi(-received, n, rate, outputs, other) > straight:
        bits[:] = other


@numba.njit(cache=True)
def _best_candidate(u: np.ndarray, candidate_signs: np.ndarray, listed: np.ndarray) -> int:  # pragma: no cover - compiled
    """The candidate whose signature fits best; -1 where the bin has none."""
    best, most = -1, -1.0
    for place in listed:
        fit = 0.0
        for p in range(u.size):
            fit += u[p] * candidate_signs[place, p]
        if abs(fit) > most:
            best, most = place, abs(fit)
    return best


@numba.njit(cache=True)
def _sum_into(bits: np.ndarray, spread: np.ndarray, index: np.ndarray) -> None:  # pragma: no cover - compiled
    """The index whose bits in the basis of `spread` are these."""
    for word in range(index.size):
        index[word] = 0
    for i in range(bits.size):
        if bits[i]:
            for word in range(index.size):
                index[word] ^= spread[i, word]


@numba.njit(cache=True)
def _ones(index: np.ndarray) -> int:  # pragma: no cover - compiled
    ones = 0
    for word in index:
        while word:
            word &= word - np.uint64(1)
            ones += 1
    return ones


@numba.njit(cache=True)
def _can_be_single(u: np.ndarray, noiseless: bool, floor: float, energy_limit: float) -> int:  # pragma: no cover - compiled
    """ZERO, MULTI, or SINGLE where one coefficient may explain the bin.

    A signature is of signs, so what any coefficient leaves is at least what the magnitudes |U_p| leave around their mean: a bin that
    fails there need not be read.
    """
    total, squares, least, most = 0.0, 0.0, np.inf, 0.0
    for p in range(u.size):
        size = abs(u[p])
        total += size
        squares += size * size
        least, most = min(least, size), max(most, size)
    if noiseless:
        if most <= floor:
            return ZERO
        return SINGLE if most - least <= RELATIVE * most + floor else MULTI
    if squares / u.size <= energy_limit:
        return ZERO
    mean, around = total / u.size, 0.0
    for p in range(u.size):
        around += (abs(u[p]) - mean) ** 2
    return SINGLE if around / u.size <= energy_limit else MULTI


@numba.njit(cache=True)
def _read(u: np.ndarray, group: int, j: int, reading, bits: np.ndarray, index: np.ndarray) -> bool:  # pragma: no cover - compiled
    """Write the index that a bin says, were it a single-ton; False where it says none."""
    if reading.kind == LIST:
        listed = reading.order[group, reading.starts[group, j] : reading.starts[group, j + 1]]
        best = _best_candidate(u, reading.candidate_signs, listed)
        if best >= 0:
            index[:] = reading.candidates[best]
        return best >= 0
    if reading.kind == CODE:
        _decode(u, reading.votes, reading.rate, reading.outputs, bits)
    else:
        _vote(u, reading.votes, bits)
    _sum_into(bits, reading.spread, index)
    return True


@numba.njit(cache=True)
def _peel(bins, columns, n, reading, limits, found):  # pragma: no cover - compiled
    """The work queue: a bin that changed is looked at again. Fills `found`; returns how many coefficients were found."""
    groups, width, _ = bins.shape
    queue = np.arange(groups * width)
    queued = np.ones(groups * width, dtype=np.bool_)
    head, waiting, count, peels = 0, groups * width, 0, 0
    bits, row, sign = np.zeros(n, dtype=np.uint8), np.empty((1, columns.shape[2]), dtype=np.uint64), np.empty(bins.shape[2])
    index = row[0]
    while waiting and peels < found.indices.shape[0]:
        place = queue[head]
        head, waiting = (head + 1) % queue.size, waiting - 1
        queued[place] = False
        group, j = place // width, place % width
        u = bins[group, j]
        state = _can_be_single(u, limits.noiseless, limits.floor, limits.energy[group])
        found.state[group, j] = MULTI if state == SINGLE else state  # until it is explained
        if state != SINGLE or not _read(u, group, j, reading, bits, index):
            continue
        if _bin(columns[group], index) != j or _ones(index) > limits.max_degree:
            continue
        value = 0.0
        for p in range(u.size):
            sign[p] = -1.0 if parity(reading.offsets[p], index) else 1.0
            value += u[p] * sign[p]
        value /= u.size
        if not _explains(u, value, sign, limits.noiseless, limits.floor, limits.energy[group], limits.magnitude[group]):
            continue
        if limits.noiseless and _is_nowhere_else(bins, columns, index, group, limits.floor):
            continue
        slot = find(found.table, found.indices, row, 0)
        if found.table[slot] < 0:
            found.indices[count] = index
            found.table[slot] = count
            count += 1
        found.values[found.table[slot]] += value
        peels += 1
        for other in range(groups):
            hashed = _bin(columns[other], index)
            for p in range(u.size):
                bins[other, hashed, p] -= value * sign[p]
            changed = other * width + hashed
            if not queued[changed]:
                queue[(head + waiting) % queue.size] = changed
                queued[changed] = True
                waiting += 1
    for place in range(groups * width):  # bins that were still to be looked at when the peels were used up
        if queued[place]:
            found.state[place // width, place % width] = MULTI
    return count


@numba.njit(cache=True)
def _is_nowhere_else(
    bins: np.ndarray, columns: np.ndarray, index: np.ndarray, group: int, floor: float
) -> bool:  # pragma: no cover - compiled
    """Whether another group's bin, where the coefficient must be, too, is empty: then it is the ghost of several (not in the paper)."""
    for other in range(bins.shape[0]):  # noqa: SIM110 - numba has no generators
        if other != group and np.abs(bins[other, _bin(columns[other], index)]).max() <= floor:
            return True
    return False


@numba.njit(cache=True)
def _explains(
    u: np.ndarray, value: float, sign: np.ndarray, noiseless: bool, floor: float, energy_limit: float, magnitude: float
) -> bool:  # pragma: no cover - compiled
    """Whether the one coefficient explains the bin at all offsets, those included that had no vote."""
    squares, most = 0.0, 0.0
    for p in range(u.size):
        left = abs(u[p] - value * sign[p])
        squares += left * left
        most = max(most, left)
    if noiseless:
        return most <= RELATIVE * abs(value) + floor
    return squares / u.size <= energy_limit and abs(value) >= magnitude


__all__ = ["CODE", "FLIPS", "LIST", "MULTI", "SINGLE", "ZERO", "Limits", "Peeled", "hash_all", "peel"]
