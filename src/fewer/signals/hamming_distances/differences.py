"""The sumset primitive behind the paper's lemma, in practical form: how often each difference of two sets of integers occurs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fewer.checks import check_whole

PAIR, NUMBER = 1.0, 0.5  # relative costs: of sorting a pair, of log2 of a transformed number
SPARSE = 4  # a table may have so many numbers a pair


def difference_counts(X: Any, Y: Any, *, more_than: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The differences x - y of all pairs, and how often each occurs.

    By pairs; by one transform where the range of the numbers is small; and where only frequent differences are asked for, in a range
    too large for that, modulo a random prime first: a frequent difference has a frequent residue, and those few are counted exactly.

    Args:
        X, Y: integers [a] and [b], of magnitudes below 2^61.
        more_than: h: only differences that occur more than h times.
        seed: of the prime; the answer does not depend on it.

    Returns:
        values int64 ascending and counts int64.

    Raises:
        ValueError: no integers, or an h below 0.

    Examples:
        >>> values, counts = difference_counts([3, 5], [1, 3])
        >>> values.tolist(), counts.tolist()
        ([0, 2, 4], [1, 2, 1])
    """
    x, y = _integers(X, "X"), _integers(Y, "Y")
    check_whole(0, more_than=more_than, optional=["more_than"])
    check_whole(0, seed=seed)
    least, pairs = int(x.min()) - int(y.max()), len(x) * len(y)
    universe = int(x.max()) - int(y.min()) - least + 1
    if NUMBER * universe * math.log2(universe + 1) < PAIR * pairs:
        counts = _by_transform(x - x.min(), y.max() - y, universe)
    elif more_than and universe > SPARSE * pairs and pairs > 1 << 16:
        return _frequent(x, y, more_than, np.random.default_rng(seed))
    elif universe <= SPARSE * pairs:
        counts = np.bincount(np.subtract.outer(x, y).reshape(-1) - least, minlength=universe)
    else:
        return _more_than(*np.unique(np.subtract.outer(x, y), return_counts=True), more_than)
    found = np.flatnonzero(counts)
    return _more_than(found + least, counts[found], more_than)


def _by_transform(x: np.ndarray, y: np.ndarray, universe: int) -> np.ndarray:
    """Counts of x + y for non-negative numbers whose sums lie below `universe`."""
    from scipy.fft import next_fast_len

    size = next_fast_len(universe, real=True)
    product = np.fft.rfft(np.bincount(x, minlength=1), size) * np.fft.rfft(np.bincount(y, minlength=1), size)
    exact = np.fft.irfft(product, size)[:universe]
    counts = np.rint(exact)
    if np.abs(exact - counts).max() >= 0.25:  # very many repeats of very few numbers
        return np.bincount(np.add.outer(x, y).reshape(-1), minlength=universe)
    return counts.astype(np.int64)


def _frequent(x: np.ndarray, y: np.ndarray, more_than: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Differences that occur more than h times: those modulo a random prime first, then the pairs behind each frequent residue."""
    pairs = len(x) * len(y)
    prime = _random_prime(max(16, 2 * pairs // max(1, int(math.log(pairs)))), rng)
    x_left, y_left = x % prime, y % prime
    cyclic = _by_transform(x_left, prime - 1 - y_left, 2 * prime - 1)  # at (x - y) mod p + p - 1, or that less p
    residues = cyclic[prime - 1 :].copy()
    residues[1:] += cyclic[: prime - 1]
    order = np.argsort(x_left, kind="stable")
    x_left, x = x_left[order], x[order]
    values = []
    for residue in np.flatnonzero(residues > more_than):
        wanted = (y_left + residue) % prime
        first, last = np.searchsorted(x_left, wanted), np.searchsorted(x_left, wanted, side="right")
        partners = np.repeat(np.arange(len(y)), last - first)
        within = np.arange(len(partners)) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
        found, counts = np.unique(x[first[partners] + within] - y[partners], return_counts=True)
        values.append((found[counts > more_than], counts[counts > more_than]))
    if not values:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    found, counts = (np.concatenate(each) for each in zip(*values, strict=True))
    order = np.argsort(found)
    return found[order], counts[order]


def _random_prime(least: int, rng: np.random.Generator) -> int:
    """A prime of [least, 2 least), drawn uniformly."""
    sieve = np.ones(2 * least, dtype=bool)
    for each in range(2, math.isqrt(2 * least) + 1):
        sieve[each * each :: each] = False
    return int(rng.choice(np.flatnonzero(sieve[least:])) + least)


def _more_than(values: np.ndarray, counts: np.ndarray, more_than: int | None) -> tuple[np.ndarray, np.ndarray]:
    frequent = counts > (more_than or 0)
    return values[frequent].astype(np.int64), counts[frequent].astype(np.int64)


def _integers(given: Any, name: str) -> np.ndarray:
    found = np.asarray(given)
    if found.dtype.kind not in "iu" or found.ndim != 1 or found.size == 0:
        raise ValueError(f"{name} is {found.dtype} of shape {found.shape}; expected at least one integer in one dimension")
    if max(abs(int(found.min())), abs(int(found.max()))) >= 1 << 61:
        raise ValueError(f"{name} holds numbers beyond 2^61; expected smaller ones, so that int64 holds a difference: subtract a constant")
    return found.astype(np.int64)
