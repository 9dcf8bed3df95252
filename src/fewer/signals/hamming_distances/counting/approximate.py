"""Distances within a factor: the alphabet is hashed to few letters and counted exactly, again and again; or some positions are sampled."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from fewer.signals.hamming_distances.counting.costs import Constants, Plan, choose
from fewer.signals.hamming_distances.counting.letters import Pair, count_letters
from fewer.signals.hamming_distances.counting.matches import exact

MOST_BUCKETS = 1 << 20


def approximate(
    pair: Pair,
    epsilon: float,
    constants: Constants,
    *,
    delta: float = 0.01,
    estimator: str = "max",
    method: str = "auto",
    minimum: int | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[np.ndarray, Plan]:
    """(1 - epsilon) D <= D~ <= D for all windows together with probability 1 - delta, int32 [n - m + 1].

    Where the exact way is predicted to cost less, it is taken and the plan says so. The pair's alphabet must hold the letters of both.
    """
    if method == "sample":
        assert minimum is not None
        return sampled(pair, epsilon, constants, delta, minimum, seed, threads)
    if epsilon < 2 / MOST_BUCKETS:
        if method == "hash":
            raise ValueError(
                f"epsilon is {epsilon} with method='hash'; expected at least {2 / MOST_BUCKETS:.0e}: leave method out, and distances are exact"
            )
        return exact(pair, constants, threads=threads)
    buckets, repetitions = hash_sizes(epsilon, delta, pair.windows)
    if method == "auto":
        n, m = len(pair.text), len(pair.pattern)
        even = choose(np.full(buckets, n / buckets), np.full(buckets, m / buckets), n, m, constants)
        told = choose(pair.in_text, pair.in_pattern, n, m, constants)
        if told.predicted_seconds <= repetitions * even.predicted_seconds:
            return exact(pair, constants, threads=threads)
    return hashed(pair, buckets, repetitions, constants, estimator, seed, threads)


def hash_sizes(epsilon: float, delta: float, windows: int) -> tuple[int, int]:
    """B = 2 / epsilon buckets, so that half of all hashes lose at most epsilon D; and as many repetitions as leave no window to chance.

    >>> hash_sizes(0.2, 0.01, 1000)
    (10, 17)
    """
    return math.ceil(2 / epsilon), math.ceil(math.log2(windows / delta))


def hashed(
    pair: Pair, buckets: int, repetitions: int, constants: Constants, estimator: str = "max", seed: int = 0, threads: int | None = None
) -> tuple[np.ndarray, Plan]:
    """A letter goes to a random bucket: a mismatch is lost with probability 1/B and none is invented, so the largest of all counts is best.

    `estimator="mean"` undoes the loss on average, mean x B / (B - 1), and guarantees nothing.
    """
    start, rng = time.perf_counter(), np.random.default_rng(seed)
    total = np.zeros(pair.windows, dtype=np.int64 if estimator == "mean" else np.int32)
    predicted, plan = 0.0, None
    for _ in range(repetitions):
        table = np.append(rng.integers(buckets, size=pair.letters), [buckets, buckets + 1]).astype(np.uint8 if buckets < 255 else np.int32)
        text = table[pair.text]
        distances, plan = exact(Pair(text, table[pair.pattern], buckets, count_letters(text, buckets)), constants, threads=threads)
        predicted += plan.predicted_seconds
        total = total + distances if estimator == "mean" else np.maximum(total, distances)
    assert plan is not None
    if estimator == "mean":
        total = np.rint(total / repetitions * (buckets / (buckets - 1))).astype(np.int32)
    taken = time.perf_counter() - start
    return total, replace(plan, method="hash", predicted_seconds=predicted, measured_seconds=taken, repetitions=repetitions)


def sample_rate(epsilon: float, delta: float, minimum: int, windows: int) -> float:
    """q = 3 ln(2 N / delta) / (epsilon^2 d_min): Chernoff's bound for every window of distance d_min or more together.

    >>> round(sample_rate(0.5, 0.01, 1000, 1000), 4)
    0.1465
    """
    return min(1.0, 3 * math.log(2 * windows / delta) / (epsilon**2 * minimum))


def sampled(
    pair: Pair, epsilon: float, constants: Constants, delta: float, minimum: int, seed: int = 0, threads: int | None = None
) -> tuple[np.ndarray, Plan]:
    """The distance over a random share q of the pattern's positions, divided by q."""
    start = time.perf_counter()
    rate = sample_rate(epsilon, delta, minimum, pair.windows)
    chosen = np.random.default_rng(seed).random(len(pair.pattern)) < rate
    pattern = np.where(chosen, pair.pattern, pair.letters).astype(pair.pattern.dtype)  # a letter that the text has nowhere
    lost = int(np.count_nonzero(~chosen))
    distances, plan = exact(Pair(pair.text, pattern, pair.letters, pair.in_text), constants, threads=threads)
    found = np.rint((distances - lost) / rate).astype(np.int32)
    return found, replace(plan, method="sample", measured_seconds=time.perf_counter() - start)
