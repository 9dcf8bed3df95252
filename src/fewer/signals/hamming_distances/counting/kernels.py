"""The loops over letters, compiled: pairs, vertical counters of bits, direct comparison, early stops, seeds, and windows of one text.

Codes of letters are int32, or uint8 as well where every letter is compared. Every function releases Python's lock, so that pieces of a text run in threads.
"""

from __future__ import annotations

import numba
import numpy as np

BLOCK = 128  # words of 64 shifts whose counters stay in the first-level cache
FLUSH = 255  # comparisons that a byte can count
ONE, LOW, LAST = np.uint64(1), np.uint64(63), np.uint64(63)
SPREAD = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").view(np.uint64)[:, 0]  # a bit becomes a byte


@numba.njit(cache=True, nogil=True)
def add_pairs(text: np.ndarray, first: np.ndarray, positions: np.ndarray, pattern: int, out: np.ndarray) -> None:  # pragma: no cover
    """out[t - p] += 1 for every pair T[t] = P[p]: the positions of letter c in the pattern are positions[first[c] : first[c + 1]]."""
    windows = out.size
    for t in range(text.size):
        begin, end = first[text[t]], first[text[t] + 1]
        if pattern - 1 <= t < windows:
            for q in range(begin, end):
                out[t - positions[q]] += 1
        else:
            for q in range(begin, end):
                at = t - positions[q]
                if 0 <= at < windows:
                    out[at] += 1


@numba.njit(cache=True, nogil=True)
def add_bits(vectors: np.ndarray, rows: np.ndarray, shifts: np.ndarray, out: np.ndarray) -> None:  # pragma: no cover
    """out[i] += number of j for which bit i + shifts[j] of vectors[rows[j]] is set, 64 windows i in a word.

    Vertical counters: plane l holds bit l of 64 counts a word. Eight shifted vectors go through a tree of carry-save adders into the
    planes of ones, twos and fours; the eights that they carry go on by twos, so that a higher plane is touched half as often.

    Args:
        vectors: [letters, words] uint64, with a word more than any shift reaches.
        rows, shifts: [8 g] int64, the letter and the place in the pattern of each of its positions.
    """
    words, groups = (out.size + 63) // 64, rows.size // 8
    levels = 4
    while (1 << levels) <= rows.size:
        levels += 1
    planes = np.empty((levels, BLOCK), dtype=np.uint64)
    waiting = np.empty((levels + 1, BLOCK), dtype=np.uint64)
    carry, spread = np.empty(BLOCK, dtype=np.uint64), np.empty(8 * BLOCK, dtype=np.uint64)
    for first in range(0, words, BLOCK):
        size = min(BLOCK, words - first)
        planes[:] = 0
        for group in range(groups):
            j = 8 * group
            _eight(vectors, rows[j : j + 8], shifts[j : j + 8], first, planes[0, :size], planes[1, :size], planes[2, :size], carry[:size])
            level = 3
            while (group >> (level - 3)) & 1:
                _carry(planes[level, :size], waiting[level, :size], carry[:size])
                level += 1
            waiting[level, :size] = carry[:size]
        for low in range(3, levels + 1):  # what still waits is rippled up
            if (groups >> (low - 3)) & 1:
                up = waiting[low, :size]
                for level in range(low, levels):
                    plane = planes[level, :size]
                    for k in range(size):
                        both = plane[k] & up[k]
                        plane[k] ^= up[k]
                        up[k] = both
        _read_counters(planes, size, spread, out[64 * first : 64 * (first + size)])


@numba.njit(cache=True, nogil=True)
def _eight(vectors, rows, shifts, first, ones, twos, fours, eights):  # pragma: no cover
    """Eight shifted vectors into ones, twos and fours; what they carry into eights."""
    a, b = vectors[rows[0], first + (shifts[0] >> 6) :], vectors[rows[1], first + (shifts[1] >> 6) :]
    c, d = vectors[rows[2], first + (shifts[2] >> 6) :], vectors[rows[3], first + (shifts[3] >> 6) :]
    e, f = vectors[rows[4], first + (shifts[4] >> 6) :], vectors[rows[5], first + (shifts[5] >> 6) :]
    g, h = vectors[rows[6], first + (shifts[6] >> 6) :], vectors[rows[7], first + (shifts[7] >> 6) :]
    ra, rb, rc, rd = np.uint64(shifts[0]) & LOW, np.uint64(shifts[1]) & LOW, np.uint64(shifts[2]) & LOW, np.uint64(shifts[3]) & LOW
    re, rf, rg, rh = np.uint64(shifts[4]) & LOW, np.uint64(shifts[5]) & LOW, np.uint64(shifts[6]) & LOW, np.uint64(shifts[7]) & LOW
    for k in range(ones.size):
        # a shift by 64 is undefined, so the left one is done in two
        va, vb = (a[k] >> ra) | ((a[k + 1] << ONE) << (LAST - ra)), (b[k] >> rb) | ((b[k + 1] << ONE) << (LAST - rb))
        vc, vd = (c[k] >> rc) | ((c[k + 1] << ONE) << (LAST - rc)), (d[k] >> rd) | ((d[k + 1] << ONE) << (LAST - rd))
        ve, vf = (e[k] >> re) | ((e[k + 1] << ONE) << (LAST - re)), (f[k] >> rf) | ((f[k + 1] << ONE) << (LAST - rf))
        vg, vh = (g[k] >> rg) | ((g[k + 1] << ONE) << (LAST - rg)), (h[k] >> rh) | ((h[k + 1] << ONE) << (LAST - rh))
        one, two, four = ones[k], twos[k], fours[k]
        x = one ^ va
        two_a, one = (one & va) | (x & vb), x ^ vb
        x = one ^ vc
        two_b, one = (one & vc) | (x & vd), x ^ vd
        x = two ^ two_a
        four_a, two = (two & two_a) | (x & two_b), x ^ two_b
        x = one ^ ve
        two_a, one = (one & ve) | (x & vf), x ^ vf
        x = one ^ vg
        two_b, one = (one & vg) | (x & vh), x ^ vh
        x = two ^ two_a
        four_b, two = (two & two_a) | (x & two_b), x ^ two_b
        x = four ^ four_a
        eights[k], fours[k] = (four & four_a) | (x & four_b), x ^ four_b
        ones[k], twos[k] = one, two


@numba.njit(cache=True, nogil=True)
def _carry(plane, waiting, carry):  # pragma: no cover
    """A full adder of three vectors of one weight: the sum stays in the plane, the carry has twice the weight."""
    for k in range(plane.size):
        x = plane[k] ^ waiting[k]
        over = (plane[k] & waiting[k]) | (x & carry[k])
        plane[k] = x ^ carry[k]
        carry[k] = over


@numba.njit(cache=True, nogil=True)
def _read_counters(planes, size, spread, out):  # pragma: no cover
    """Vertical counters back to numbers: a byte of each plane is spread to eight bytes, and eight planes fill them."""
    levels = planes.shape[0]
    for base in range(0, levels, 8):
        for k in range(size):
            for byte in range(8):
                down, eight = np.uint64(8 * byte), np.uint64(0)
                for level in range(base, min(base + 8, levels)):
                    eight |= SPREAD[(planes[level, k] >> down) & np.uint64(255)] << np.uint64(level - base)
                spread[8 * k + byte] = eight
        counts = spread.view(np.uint8)
        for i in range(out.size):
            out[i] += np.int32(counts[i]) << base


@numba.njit(cache=True, nogil=True)
def add_direct(text: np.ndarray, pattern: np.ndarray, out: np.ndarray) -> None:  # pragma: no cover
    """out[i] += number of j with T[i + j] = P[j]: every letter with every letter, many windows at once."""
    block = 4096
    counts = np.empty(block, dtype=np.uint8)
    for first in range(0, out.size, block):
        size = min(block, out.size - first)
        for low in range(0, pattern.size, FLUSH):
            counts[:] = 0
            for j in range(low, min(low + FLUSH, pattern.size)):
                c, window = pattern[j], text[first + j : first + j + size]
                for i in range(size):
                    counts[i] += np.uint8(window[i] == c)
            for i in range(size):
                out[first + i] += counts[i]


@numba.njit(cache=True, nogil=True)
def stop_early(text, pattern, positions, order, block, most, budget, out):  # pragma: no cover
    """out[i] = min(mismatches of window positions[i], most + 1), looking at blocks of the pattern in one order until there are too many.

    Args:
        order: the numbers of the blocks, each of `block` letters, at most 255 (the last one may be shorter).
        budget: letters that may be compared for each window on average; where the rest would cost less otherwise, it is left.

    Returns:
        (windows done, letters compared).
    """
    spent = 0
    for i in range(positions.size):
        if spent > budget * (positions.size - i):
            return i, spent
        at, wrong = positions[i], 0
        for b in range(order.size):
            low = order[b] * block
            high = min(low + block, pattern.size)
            window, piece = text[at + low : at + high], pattern[low:high]
            found = np.uint8(0)
            for j in range(piece.size):
                found = np.uint8(found + np.uint8(window[j] != piece[j]))
            wrong += found
            spent += high - low
            if wrong > most:
                wrong = most + 1
                break
        out[i] = wrong
    return positions.size, spent


@numba.njit(cache=True, nogil=True)
def seeds(text, pattern, starts, length, factor, found):  # pragma: no cover
    """Windows in which one of the pieces pattern[s : s + length], s in starts, stands where it should, by a rolling hash modulo 2^64.

    Equal pieces have equal hashes, so none is missed; what only looks alike is taken out by who counts the mismatches.

    Returns:
        how many windows were written to `found` (some twice), or -1 where it has no room.
    """
    size = 1
    while size < 4 * starts.size:
        size *= 2
    mask, heads, following = np.uint64(size - 1), np.full(size, -1, np.int64), np.full(starts.size, -1, np.int64)
    keys = np.empty(starts.size, np.uint64)
    for s in range(starts.size):
        key = np.uint64(0)
        for j in range(length):
            key = key * factor + np.uint64(pattern[starts[s] + j] + 1)
        keys[s] = key
        place = (key ^ (key >> np.uint64(29))) & mask
        following[s], heads[place] = heads[place], s
    top = np.uint64(1)
    for _ in range(length):
        top *= factor
    windows, count, key = text.size - pattern.size + 1, 0, np.uint64(0)
    for t in range(text.size):
        key = key * factor + np.uint64(text[t] + 1)
        if t >= length:
            key -= top * np.uint64(text[t - length] + 1)
        if t >= length - 1:
            s = heads[(key ^ (key >> np.uint64(29))) & mask]
            while s >= 0:
                at = t - length + 1 - starts[s]
                if keys[s] == key and 0 <= at < windows:
                    if count == found.size:
                        return -1
                    found[count] = at
                    count += 1
                s = following[s]
    return count


@numba.njit(cache=True, nogil=True)
def pairs_outside(head, tail, pattern, letters):  # pragma: no cover
    """Pairs T[t] = P[p] of the first `letters` codes whose shift t - p is no window: what hangs over at both ends of the text.

    Args:
        head, tail: the first and the last m - 1 codes of the text.
    """
    total, counts = 0, np.zeros(letters + 2, dtype=np.int64)
    for t in range(pattern.size - 2, -1, -1):
        counts[pattern[t + 1]] += 1
        if head[t] < letters:
            total += counts[head[t]]
    counts[:] = 0
    for t in range(pattern.size - 1):
        counts[pattern[t]] += 1
        if tail[t] < letters:
            total += counts[tail[t]]
    return total


@numba.njit(cache=True, nogil=True)
def diagonals(text, m, low, high, best):  # pragma: no cover
    """best[i] = min over windows j at distances low..high - 1 from i of (mismatches << 32 | j): a band of diagonals, all at once.

    The mismatches of windows (i + 1, j + 1) are those of (i, j), less the pair of letters that leaves, plus the one that comes.
    """
    windows = text.size - m + 1
    wrong = np.zeros(high - low, dtype=np.int64)
    for d in range(high - low):
        if low + d < windows:
            for j in range(m):
                wrong[d] += text[j] != text[low + d + j]
    for i in range(windows - low):
        size = min(high, windows - i) - low
        if i > 0:
            gone, come = text[i - 1], text[i + m - 1]
            past, ahead = text[low + i - 1 : low + i - 1 + size], text[low + i + m - 1 : low + i + m - 1 + size]
            for d in range(size):
                wrong[d] += np.int64(ahead[d] != come) - np.int64(past[d] != gone)
        mine, others = best[i], best[low + i : low + i + size]
        for d in range(size):
            mine = min(mine, (wrong[d] << 32) | (i + low + d))
            others[d] = min(others[d], (wrong[d] << 32) | i)
        best[i] = mine
